import { client, done, fails, name, ok } from "./harness.mjs";

const c = client();
const box = await c.createSandbox({ name });
const text = (bytes) => Buffer.from(bytes).toString("latin1");
await ok(box, "write", "/srv/a/file.bin", new Uint8Array([0, 255, 10, 13, 65]));
await ok(box, "write", "/srv/a/text.txt", "hay\nneedle\n");
const bytes = [...(await ok(box, "read", "/srv/a/file.bin"))];
const stat = await ok(box, "stat", "/srv/a/text.txt");
const part = await ok(box, "readRange", "/srv/a/text.txt", { start: 4, end: 9, ifRange: stat.etag });
const same = await ok(box, "readRange", "/srv/a/text.txt", { start: 0, ifNoneMatch: stat.etag });
const missing = [];
for (const method of ["read", "stat"]) missing.push(await fails(box, method, "LangSmithResourceNotFoundError", "/srv/missing"));
await fails(box, "readRange", "LangSmithResourceNotFoundError", "/srv/missing", { start: 0 });
await fails(box, "readRange", "LangSmithSandboxOperationError", "/srv/a/text.txt", { start: 100 });
const folder = await fails(box, "write", "LangSmithSandboxOperationError", "/srv/a", "x");
const found = await ok(box, "glob", "**/*.txt", "/srv");
const listed = await ok(box, "ls", "/srv/a");
const lines = await ok(box, "grep", "needle", "/srv/a");
const search = [found, listed, lines].map((answer) => answer.matches.map((match) => match.path).sort());
const nowhere = [];
for (const [method, args] of [["glob", ["*", "/nowhere"]], ["ls", ["/nowhere"]], ["grep", ["x", "/nowhere"]]])
  nowhere.push(await fails(box, method, "LangSmithResourceNotFoundError", ...args));
await box.delete();
done({ bytes, size: stat.size_bytes, part: [text(part.content), part.partial], same: same.unchanged, missing, folder, search, nowhere });

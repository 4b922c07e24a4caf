import { client, done, fails, name, ok } from "./harness.mjs";

const c = client();
const made = await ok(c, "createSandbox", { name, idleTtlSeconds: 0, labels: { a: "b" }, waitForReady: false });
const ready = await ok(c, "waitForSandbox", name, { pollInterval: 0.01 });
const conflict = await fails(c, "createSandbox", "LangSmithSandboxError", { name });
const invalid = await fails(c, "createSandbox", "LangSmithValidationError", { name: `${name}-2`, vCpus: 0 });
const second = await c.createSandbox({ name: `${name}-2` });
const renamed = await fails(c, "updateSandbox", "LangSmithResourceNameConflictError", second.name, { newName: name });
await second.delete();
const listed = (await ok(c, "listSandboxes")).filter((box) => box.name === name).map((box) => box.id);
const updated = await ok(c, "updateSandbox", name, { idleTtlSeconds: 120 });
await ok(c, "stopSandbox", name);
const stopped = (await ok(c, "getSandboxStatus", name)).status;
await ok(c, "startSandbox", name);
const got = await ok(c, "getSandbox", name);
await ok(got, "stop");
await ok(got, "start");
const again = got.status;
await ok(got, "delete");
const gone = [];
for (const method of ["getSandbox", "getSandboxStatus", "waitForSandbox", "startSandbox", "stopSandbox", "deleteSandbox"])
  gone.push(await fails(c, method, "LangSmithResourceNotFoundError", name));
gone.push(await fails(c, "updateSandbox", "LangSmithResourceNotFoundError", name, { idleTtlSeconds: 120 }));
for (const method of ["start", "stop", "delete"]) gone.push(await fails(got, method, "LangSmithResourceNotFoundError"));
const other = await c.createSandbox({ name });
await ok(c, "deleteSandbox", name);
const stranger = client("wrong");
const unauthorized = [];
for (const method of ["listSandboxes", "listSnapshots"]) unauthorized.push(await fails(stranger, method, "LangSmithSandboxAuthenticationError"));
done({
  ids: [made.id, ready.id, ...listed, updated.id, got.id], other: other.id, statuses: [made.status, ready.status, stopped, again],
  ttl: updated.idle_ttl_seconds, labels: ready.labels, conflict, renamed, invalid, gone, unauthorized,
});

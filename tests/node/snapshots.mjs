import { client, done, fails, generated, get, name, ok } from "./harness.mjs";

const c = client();
const image = process.env.IMAGE;
const invalid = "LangSmithValidationError";
const gone = "LangSmithResourceNotFoundError";
const said = {};
const [first] = (await ok(c, "listSnapshots")).filter((one) => one.name === "default");
await ok(c, "getSnapshot", first.id);
await ok(c, "waitForSnapshot", first.id);
for (const method of ["getSnapshot", "waitForSnapshot"]) await fails(c, method, gone, "nobody");
const built = await ok(c, "createSnapshot", name, image, 64 << 20);
said.createSnapshot = await fails(c, "createSnapshot", invalid, name, "Not An Image", 1 << 30);

const box = await c.createSandbox(built.id, { name });
const note = new TextDecoder().decode(await box.read("/note"));
const captured = await ok(c, "captureSnapshot", name, `${name}-captured`);
const again = await ok(box, "captureSnapshot", `${name}-captured`);
said.capture = await fails(c, "captureSnapshot", invalid, name, "Not A Name");
said.captureHere = await fails(box, "captureSnapshot", invalid, "Not A Name");
said.used = await c.deleteSnapshot(built.id).then(() => "", (error) => String(error.message));
await box.delete();
for (const one of [built, captured, again]) await ok(c, "deleteSnapshot", one.id);
await fails(c, "deleteSnapshot", gone, built.id);

const { boxes, snapshots } = generated().sandboxes;
const missing = { docker_image: "oci-archive:/nowhere/image.tar", fs_capacity_bytes: 1 << 30 };
const pending = await ok(snapshots, "create", { name, ...missing });
await fails(snapshots, "create", "UnprocessableEntityError", { name, ...missing, docker_image: "Not An Image" });
await ok(snapshots, "delete", pending.id);
await fails(snapshots, "delete", "NotFoundError", pending.id);
await boxes.create({ name });
const raw = await ok(boxes, "createSnapshot", name, { body_name: name, name });
await fails(boxes, "createSnapshot", "UnprocessableEntityError", name, { body_name: name, name, include_memory: true });
await c.waitForSnapshot(raw.id);
await boxes.delete(name);
await c.deleteSnapshot(raw.id);

const registries = await get(c, "registries");
const account = { name, url: "registry.example.com", username: "robot", password: "x" };
const registry = await ok(registries, "create", account);
await fails(registries, "create", "ConflictError", account);
const same = (await ok(registries, "retrieve", name)).id === registry.id;
const { url } = await ok(registries, "update", name, { url: "other.example.com" });
await ok(registries, "delete", name);
for (const method of ["retrieve", "delete"]) await fails(registries, method, "NotFoundError", name);
await fails(registries, "update", "NotFoundError", name, {});
done({ said, note, tags: again.tags, same, url, told: JSON.stringify(registry).includes("\"x\"") });

import { done, fails, generated, name, ok, refused, seen } from "./harness.mjs";

const { boxes, snapshots, registries } = generated().sandboxes;
const gone = "NotFoundError";
const invalid = "UnprocessableEntityError";
const said = [];
const made = await ok(boxes, "create", { name, labels: { run: name } });
await fails(boxes, "create", "ConflictError", { name });
const started = await ok(boxes, "start", name);
await ok(boxes, "retrieve", name);
const { status } = await ok(boxes, "getStatus", name);
const { idle_ttl_seconds: ttl } = await ok(boxes, "update", name, { idle_ttl_seconds: 120 });
await ok(boxes, "create", { name: `${name}-2`, labels: { run: name } });
const listed = [];
for await (const box of boxes.list({ label: [`run=${name}`], page_size: 1, sort_by: "name" })) listed.push(box.name);
seen("Boxes.list", "ok");
await fails(boxes, "list", invalid, { limit: 0 });
for (const [method, error, body] of [["generateServiceURL", invalid, { port: 80 }], ["deleteServiceURL", gone, { port: 80 }], ["generateDownloadURL", invalid, { path: "/f" }]])
  said.push(await refused(boxes, method, error, name, body));
const shared = [];
for await (const port of boxes.listServiceURLs(name)) shared.push(port);
seen("Boxes.listServiceURLs", "ok");
await fails(boxes, "listServiceURLs", gone, "nobody");
const { registries: known } = await ok(registries, "list");
await fails(registries, "list", invalid, { limit: 0 });
await ok(boxes, "stop", name);
for (const one of [name, `${name}-2`]) await ok(boxes, "delete", one);
for (const method of ["retrieve", "start", "stop", "getStatus", "delete"]) await fails(boxes, method, gone, name);
await fails(boxes, "update", gone, name, { idle_ttl_seconds: 120 });

const found = [];
for await (const snapshot of snapshots.list()) found.push(snapshot.name);
seen("Snapshots.list", "ok");
await fails(snapshots, "list", invalid, { limit: 0 });
for (const method of ["retrieve", "retrieveByName"]) {
  await ok(snapshots, method, "default");
  await fails(snapshots, method, gone, "nobody");
}
await fails(snapshots, "delete", invalid, "default");
await fails(generated("wrong").sandboxes.boxes, "retrieve", "AuthenticationError", name);
done({ made: made.name, started: started.status, status, ttl, listed, found, said, shared, registries: known });

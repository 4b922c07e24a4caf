// Every public method and property of the SDK's sandbox clients: what is there at run time and is declared, not private.
import { readFileSync, readdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { generated, sdk } from "./harness.mjs";

const entry = dirname(fileURLToPath(import.meta.resolve("langsmith/sandbox")));
const declared = ["lib/sandbox", "resources/sandboxes"]
  .flatMap((folder) => readdirSync(join(entry, folder)).map((file) => join(entry, folder, file)))
  .filter((path) => path.endsWith(".d.mts"))
  .map((path) => readFileSync(path, "utf8"))
  .join("\n");
const isDeclared = (member) => new RegExp(`^ {4}(get )?${member}(\\(|<)`, "m").test(declared);

const names = [];
const members = (kind) => {
  for (const member of Object.getOwnPropertyNames(kind.prototype))
    if (!["constructor", "toString"].includes(member) && !member.startsWith("_") && isDeclared(member)) names.push(`${kind.name}.${member}`);
  if (kind.prototype[Symbol.asyncIterator]) names.push(`${kind.name}.asyncIterator`);
};
for (const [name, value] of Object.entries(sdk)) {
  if (typeof value !== "function" || value.prototype instanceof Error) continue;
  if (/^class\b/.test(Function.prototype.toString.call(value))) members(value);
  else names.push(name);
}
const { sandboxes } = generated();
for (const resource of [sandboxes, sandboxes.boxes, sandboxes.snapshots, sandboxes.registries]) members(resource.constructor);
console.log(JSON.stringify({ result: names, calls: {} }));

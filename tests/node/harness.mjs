// What the scenarios share: clients of the service named in the environment, and a record of how every call ended.
import { Langsmith } from "langsmith";
import * as sdk from "langsmith/sandbox";

const { ENDPOINT, KEY, NAME } = process.env;
export const name = NAME; // of sandboxes: no other test uses it
export const calls = {}; // "Class.method" → "ok", "failed", "refused"

export const client = (apiKey = KEY) => new sdk.SandboxClient({ apiEndpoint: `${ENDPOINT}/v2/sandboxes`, apiKey, maxRetries: 0 });
export const generated = (apiKey = KEY) => new Langsmith({ apiKey, baseURL: ENDPOINT, maxRetries: 0 });
export { sdk };

export function seen(what, outcome) {
  (calls[what] ??= new Set()).add(outcome);
}

const label = (object, method) => `${object.constructor.name}.${method}`;

// Call a method that must succeed.
export async function ok(object, method, ...args) {
  const value = await object[method](...args);
  seen(label(object, method), "ok");
  return value;
}

// Read a property that must be there.
export async function get(object, property) {
  const value = await object[property];
  seen(label(object, property), "ok");
  return value;
}

// Call a method, or read a property, that must fail with an error of that class; what it says.
async function ends(outcome, object, method, error, args) {
  try {
    const value = object[method];
    await (typeof value === "function" ? value.apply(object, args) : value);
  } catch (caught) {
    if (caught.constructor.name !== error) throw caught;
    seen(label(object, method), outcome);
    return String(caught.message);
  }
  throw new Error(`${label(object, method)} did not fail`);
}
export const fails = (object, method, error, ...args) => ends("failed", object, method, error, args);
export const refused = (object, method, error, ...args) => ends("refused", object, method, error, args);

// The answer to pytest.
export function done(result = {}) {
  const sorted = Object.fromEntries(Object.entries(calls).map(([what, outcomes]) => [what, [...outcomes].sort()]));
  console.log(JSON.stringify({ result, calls: sorted }));
}

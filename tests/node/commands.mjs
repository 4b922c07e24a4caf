import { client, done, fails, get, name, ok, seen } from "./harness.mjs";

const c = client();
const box = await c.createSandbox({ name });
const plain = await ok(box, "run", "echo out; echo err >&2; exit 3");
const heard = [];
const streamed = await ok(box, "run", "printf 'größe'; echo end >&2", { onStdout: (data) => heard.push(data), onStderr: (data) => heard.push(data) });
const timedOut = await fails(box, "run", "LangSmithCommandTimeoutError", "sleep 1000", { timeout: 1 });

const cat = await box.run("cat; echo end >&2", { wait: false, closeInput: false });
const identity = [typeof (await get(cat, "commandId")), (await get(cat, "pid")) > 0];
await ok(cat, "sendInput", "one\n");
const chunks = [];
for await (const chunk of cat) {
  chunks.push([chunk.stream, chunk.data]);
  if (chunks.length === 1) await ok(cat, "closeInput");
}
seen("CommandHandle.asyncIterator", "ok");
const closed = await fails(cat, "sendInput", "LangSmithSandboxOperationError", "two\n");
const offsets = [await get(cat, "lastStdoutOffset"), await get(cat, "lastStderrOffset")];
const replay = await (await ok(box, "reconnect", cat.commandId, { stdoutOffset: 2 })).result;
const rest = await get(await ok(cat, "reconnect"), "result");

const long = await box.run("echo started; exec sleep 1000", { wait: false });
await ok(long, "kill");
const killed = (await (await box.reconnect(long.commandId)).result).exit_code;

const pty = await box.run("tty; stty size", { pty: true });
const late = await box.run("sleep 1000", { wait: false, timeout: 1 });
await fails(late, "result", "LangSmithCommandTimeoutError");
const iterated = await box.run("sleep 1000", { wait: false, timeout: 1 });
try {
  for await (const _ of iterated);
} catch (error) {
  if (error.constructor.name === "LangSmithCommandTimeoutError") seen("CommandHandle.asyncIterator", "failed");
}
const brief = await box.run("true", { wait: false, ttlSeconds: 0 });
await brief.result;
const expired = [];
for (const [object, args] of [[box, ["no-such-command"]], [brief, []]]) {
  try {
    await (await object.reconnect(...args)).result;
  } catch (error) {
    expired.push(error.constructor.name);
    seen(`${object.constructor.name}.reconnect`, "failed");
  }
}
await box.delete();
done({ plain, heard, streamed, timedOut, identity, chunks, closed, offsets, replay: replay.stdout, rest: rest.stdout, killed, pty: pty.stdout, expired });

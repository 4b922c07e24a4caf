import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { client, done, fails, name, refused, sdk, seen } from "./harness.mjs";

const c = client();
const invalid = "LangSmithValidationError";
const said = {};
const context = mkdtempSync(join(tmpdir(), "conformance-"));
writeFileSync(join(context, "Dockerfile"), "FROM scratch\n");
said.dockerfile = await refused(c, "createSnapshotFromDockerfile", "LangSmithResourceCreationError", name, "Dockerfile", { context });
rmSync(context, { recursive: true });

const secret = sdk.opaqueSecret("x");
const rule = { name: "r", match_hosts: ["example.com"], headers: [{ name: "X", ...secret }, { name: "Y", ...sdk.workspaceSecret("Y") }] };
const box = await c.createSandbox({ name, proxyConfig: sdk.proxyConfig({ rules: [rule] }) });
for (const builder of ["proxyConfig", "opaqueSecret", "workspaceSecret"]) seen(builder, "ok");
said.download = await refused(c, "generateDownloadURL", invalid, name, "/file");
said.downloadHere = await refused(box, "generateDownloadURL", invalid, "/file");
said.service = await refused(c, "serviceUrl", invalid, name, { port: 8000 });
await box.delete();

const aws = sdk.awsAuth({ accessKeyId: secret, secretAccessKey: secret });
const gcp = sdk.gcpAuth({ serviceAccountJson: secret, scopes: ["s"] });
const at = { id: "m", mountPath: "/mnt/m" };
const configs = [
  [["awsAuth"], { proxyConfig: sdk.proxyConfig({ rules: [aws] }) }],
  [["gcpAuth"], { proxyConfig: sdk.proxyConfig({ rules: [gcp] }) }],
  [["mountConfig", "s3Mount"], { mountConfig: sdk.mountConfig({ mounts: [sdk.s3Mount({ ...at, bucket: "b" })], auth: [aws] }) }],
  [["gitMount"], { mountConfig: sdk.mountConfig({ mounts: [sdk.gitMount({ ...at, remoteUrl: "https://example.com/x.git" })] }) }],
  [["gcsMount"], { mountConfig: sdk.mountConfig({ mounts: [sdk.gcsMount({ ...at, bucket: "b" })], auth: [gcp] }) }],
  [["contextHubMount"], { mountConfig: sdk.mountConfig({ mounts: [sdk.contextHubMount({ ...at, repo: "a/b" })] }) }],
];
for (const [builders, options] of configs) {
  said[builders[0]] = await fails(c, "createSandbox", invalid, { name, ...options });
  for (const builder of builders) seen(builder, "refused");
}
const delegation = { mode: "INHERIT" };
sdk.validateAccessDelegation(delegation);
said.delegation = await fails(c, "createSandbox", invalid, { name, accessDelegation: delegation });
seen("validateAccessDelegation", "refused");
const left = (await c.listSandboxes()).filter((one) => one.name === name).length;
done({ said, left });

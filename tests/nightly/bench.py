"""A sandbox with OpenSSH's regression scripts inside, whose sshd is the gateway's SSH front end.

The scripts want one file system on both ends of a connection. So they run inside the sandbox that they log in to: a stand-in for
sshd (inside/sshd.py) carries their connections to a port inside, and a remote forward those to the front end's TCP listener.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import socketserver
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from gatewayd.frontends.ssh.engine import CIPHERS
from tests.e2e.conftest import BIN, Gateway, listening, make

PACKAGE = "openssh-tests"  # Debian's: the scripts of its source package `openssh`, and the programs they need, built
SCRIPTS = Path("usr/lib/openssh/regress")  # in that package
INSIDE = Path(__file__).parent / "inside"
TOP = "/root/regress"  # inside
SANDBOX = "root"  # the scripts log in as the user they are: the sandbox has that name
GATE, KEYS = 4022, 4023  # ports inside; the scripts use 4242 to 4244, 3301 to 3383
REAL_SSHD = "/usr/sbin/sshd"
STAND_IN = f"{TOP}/bin/sshd"
KEY_MESSAGE_MAX = 1 << 20  # bytes


@dataclass(frozen=True)
class Outcome:
    """What a script did."""

    code: int  # 0: it passed; 124: it took too long
    failures: tuple[tuple[str, str], ...]  # (what it said it would do last, what went wrong)
    ignored: tuple[str, ...]  # options of sshd that it set and that the front end does not know
    output: str


@dataclass(frozen=True)
class Suite:
    """OpenSSH's regression scripts."""

    folder: Path  # outside
    version: str  # Debian's, of OpenSSH


def fetch(folder: Path) -> Suite:
    """Debian's package, of the version that apt offers; apt checks its signature."""
    folder.mkdir()
    done = subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"cannot get {PACKAGE} (is `apt-get update` needed?): {done.stderr}"
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    version = subprocess.run(["dpkg-deb", "-f", archive, "Version"], check=True, capture_output=True, text=True).stdout.strip()
    return Suite(folder / SCRIPTS, version)


class _KeyHandler(socketserver.StreamRequestHandler):
    """Takes the keys that may log in from now on: a script writes them inside, the front end reads them outside."""

    def handle(self) -> None:
        message = json.loads(self.rfile.readline(KEY_MESSAGE_MAX))
        assert isinstance(self.server, _KeyServer)
        self.server.bench.set_keys(message["authorized_keys"], message["authorities"])
        self.wfile.write(b"ok\n")


class _KeyServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, bench: Bench) -> None:
        super().__init__(("127.0.0.1", 0), _KeyHandler)
        self.bench = bench


class Bench:
    """One sandbox; scripts run one after the other."""

    def __init__(self, gateway: Gateway, suite: Suite) -> None:
        self.gateway = gateway
        self.suite = suite
        self._lock = threading.Lock()  # held while the files of [ssh] are written
        self._authorized = gateway.root / "authorized_keys"
        self._authorities = gateway.root / "authorities"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]

    def set_keys(self, authorized: str, authorities: str) -> None:
        """Both files of [ssh]; whoever logs in next meets them."""
        with self._lock:
            for path, text in ((self._authorized, authorized), (self._authorities, authorities)):
                draft = path.with_suffix(".new")
                draft.write_text(text, encoding="utf-8")
                draft.chmod(0o600)
                draft.rename(path)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A sandbox with the scripts, and the way out of it."""
        gateway = self.gateway
        gateway.env.pop("PYTHONASYNCIODEBUG", None)
        (gateway.root / "config.toml").write_text(
            f'[ssh]\nlisten = "127.0.0.1:{self._port}"\nauthorized_keys = "{self._authorized}"\n'
            f'trusted_user_ca_keys = "{self._authorities}"\n'
        )
        own = gateway.root / "id_ed25519"
        gateway.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", own)
        self.set_keys(own.with_suffix(".pub").read_text(), "")
        make(gateway, SANDBOX)
        with _KeyServer(self) as keys:
            thread = threading.Thread(target=keys.serve_forever, daemon=True)
            thread.start()
            self._upload(keys.server_address[1])
            way_out = subprocess.Popen(self._client(keys.server_address[1], own), stdin=subprocess.DEVNULL)
            try:
                for port in (GATE, KEYS):
                    listening(gateway, SANDBOX, port)
                assert way_out.poll() is None
                yield
            finally:
                way_out.terminate()
                way_out.wait(20)
                keys.shutdown()
                thread.join()

    def _client(self, keys: int, own: Path) -> list[str]:
        options = ["ExitOnForwardFailure=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        forwards = [f"127.0.0.1:{GATE}:127.0.0.1:{self._port}", f"127.0.0.1:{KEYS}:127.0.0.1:{keys}"]
        words = ["ssh", "-N", "-F", "none", "-p", str(self._port), "-i", str(own)]
        words += [word for option in options for word in ("-o", option)]
        words += [word for forward in forwards for word in ("-R", forward)]
        return [*words, f"{SANDBOX}@127.0.0.1"]

    def _upload(self, keys: int) -> None:
        """The scripts, what stands in for sshd, and the front end's host key as the one the scripts make."""
        host_key = (self.gateway.state / "ssh_host_ed25519_key").read_bytes()
        settings = {"gate": GATE, "keys": KEYS, "log": f"{TOP}/ignored"}
        # The other end of an `scp -O` shall be reached through the front end, as all else; OpenSSH starts it in place.
        wrapper = (self.suite.folder / "scp-ssh-wrapper.sh").read_text()
        start = 'exec $SCP "$@"'
        assert wrapper.count(start) == 1
        wrapper = wrapper.replace(start, f'exec $SSH -F {TOP}/obj/ssh_proxy somehost "$arg"')
        public = asyncssh.import_private_key(host_key).export_public_key().decode()
        files = {
            "bin/sshd": (INSIDE / "sshd.py").read_text(),
            **{f"bin/{name}": (INSIDE / name).read_text() for name in ("run.sh", "sftp-server", "ssh")},
            "bin/sshd.json": json.dumps(settings),
            "src/scp-ssh-wrapper.sh": wrapper,
            "obj/ssh-ed25519": host_key.decode(),
            "obj/ssh-ed25519.pub": public,
        }
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(self.suite.folder, "src", filter=_as_root)
            for name, text in files.items():
                data = text.encode()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                member.mode = 0o600 if name.startswith("obj/") else 0o755
                archive.addfile(member, io.BytesIO(data))
        unpack = f"mkdir -m 755 {TOP} && tar -x -C {TOP}"
        self.gateway.sandbox("exec", SANDBOX, "--", "sh", "-ec", unpack, stdin=packed.getvalue())

    def offer(self) -> None:
        """Let the scripts try no algorithm that the front end does not have."""
        shown = self._inside(f"ssh -vv -F {TOP}/obj/ssh_proxy somehost true 2>&1").stdout
        lines = shown.partition("peer server KEXINIT proposal")[2].splitlines()
        found = list(CIPHERS)
        for line in lines:
            if line.startswith(("debug2: KEX algorithms:", "debug2: MACs ")):
                found += line.split(": ")[2].split(",")
        assert len(found) > len(CIPHERS), shown
        names = "\n".join(found)
        self._inside(f"printf '%s\\n' '{names}' >{TOP}/offered")

    def _inside(self, script: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "sandbox", "exec", SANDBOX, "--", "sh", "-c", script],
            env=self.gateway.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )

    def run(self, script: str, server: str = STAND_IN, *, timeout: int = 120, data: str = "/usr/bin/ssh-agent") -> Outcome:
        """Run one script; it is killed after `timeout` seconds. `data`: the file inside that it copies to and fro."""
        self._inside(f"rm -f {TOP}/ignored {TOP}/output")
        done = self._inside(f"exec {TOP}/bin/run.sh {script} {server} {timeout} {data}", timeout + 60)
        log = self._inside(f"cat {TOP}/obj/failed-regress.log 2>/dev/null").stdout
        ignored = self._inside(f"sort -u {TOP}/ignored 2>/dev/null").stdout.split()
        output = self._inside(f"tail -c 100000 {TOP}/output").stdout
        return Outcome(done.returncode, tuple(dict.fromkeys(_failures(log, output))), tuple(ignored), output + done.stderr)


def _failures(log: str, output: str) -> Iterator[tuple[str, str]]:
    """(step, what went wrong). The log names the last step for each complaint, the output what was written before it."""
    steps: dict[str, list[str]] = {}
    last = ""
    for line in log.splitlines():
        kind, _, text = line.partition(": ")
        if kind == "trace":
            last = text
        elif kind in ("FAIL", "FATAL") and last not in steps.setdefault(text, []):  # what came before is said again
            steps[text].append(last)
    before = ""
    found = set()
    for line in output.splitlines():
        text = line.removeprefix("FATAL: ")
        if text in steps:
            found.add(text)
            yield (before if before in steps[text] else " / ".join([before, *steps[text]])), text
        else:
            before = line
    yield from ((step, text) for text in steps if text not in found for step in steps[text])


def _as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member

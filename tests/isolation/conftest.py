"""Real sandboxes, as root and as a plain user, with a canary on this machine that no sandbox may ever see or touch."""

from __future__ import annotations

import functools
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("driver.py")
CANARY = "canary of this machine"


class Failed(Exception):
    """The runtime refused."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(str(answer))
        self.errno = answer["errno"]  # of an OSError, else None


class Host:
    """One runtime in its own process, and the folder where it lives."""

    def __init__(self, prefix: list[str], python: str, root: Path, state: Path) -> None:
        self.root = root  # everything of this host; the canary lies here
        self.state = state
        self.canary = root / "canary"
        self.process = subprocess.Popen(
            [*prefix, python, "-I", str(DRIVER), str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={"PATH": os.defpath + ":/usr/sbin:/sbin"},
        )

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """One operation of the driver. Raises Failed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"op": op, **fields}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, "the driver died"
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(answer)
        return answer

    def start(self, box: str, **spec: Any) -> str:
        """Returns the note about limits."""
        return str(self.ask("start", box=box, **spec)["note"])

    def run(self, box: str, *argv: str, **options: Any) -> dict[str, Any]:
        return self.ask("run", box=box, argv=argv, **options)

    def sh(self, box: str, script: str, **options: Any) -> str:
        """Output of a shell script that must succeed."""
        done = self.run(box, "/bin/sh", "-c", script, **options)
        assert done["code"] == 0, done
        return str(done["out"])

    def python(self, box: str, script: str, **options: Any) -> str:
        """Output of a Python script that must succeed."""
        done = self.run(box, "python3", "-I", "-c", script, **options)
        assert done["code"] == 0, done["err"]
        return str(done["out"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            assert self.process.wait(30) == 0
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


@functools.cache
def plain_user() -> tuple[list[str], str] | str:
    """How to become an unprivileged user, and its Python; or why that cannot be."""
    if os.getuid() != 0:
        return "the suite does not run as root: its own user is tested"
    if missing := [name for name in ("setpriv", "newuidmap") if shutil.which(name) is None]:
        return f"{', '.join(missing)} not installed"
    for line in Path("/etc/subuid").read_text().splitlines():
        try:
            account = pwd.getpwnam(line.split(":")[0])
        except KeyError:
            continue
        if account.pw_uid == 0 or not line.rpartition(":")[2].isdecimal() or int(line.rpartition(":")[2]) < 65535:
            continue
        prefix = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups", "--inh-caps=-all"]
        for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
            script = f"import sys; open({str(DRIVER)!r}); sys.exit(sys.version_info < (3, 11))"
            # by a shell: setpriv itself may still look where the user may not
            tried = [*prefix, "sh", "-c", '"$@"', "sh", python, "-I", "-c", script]
            if subprocess.run(tried, capture_output=True, check=False).returncode == 0:
                return prefix, python
        return f"user {account.pw_name} can run no Python 3.11 or cannot read this source tree"
    return "no unprivileged user here has a range of 65,536 ids in /etc/subuid"


def make_host(kind: str) -> Iterator[Host]:
    """A host of that kind, closed at the end; skips where it cannot be."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    prefix: list[str] = []
    python = sys.executable
    if kind == "rootless":
        found = plain_user()
        if isinstance(found, str):
            pytest.skip(f"no rootless run: {found}")
        prefix, python = found
    root = Path(tempfile.mkdtemp(prefix="isolation-"))
    state = root / "state"
    state.mkdir(mode=0o700)
    (root / "canary").write_text(CANARY)
    root.chmod(0o777)
    if prefix:
        uid, gid = (int(word.partition("=")[2]) for word in prefix[1:3])
        os.chown(state, uid, gid)
        os.chown(root / "canary", uid, gid)  # its own user's file: only the sandbox stands between
    host = Host(prefix, python, root, state)
    try:
        yield host
    finally:
        try:
            host.close()
            assert host.canary.read_text() == CANARY
            assert sorted(path.name for path in root.iterdir()) == ["canary", "state"]
        finally:
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module", params=["own", "rootless"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """`own`: the user of this test run, root in CI."""
    yield from make_host(request.param)


@pytest.fixture(scope="module")
def box(host: Host) -> str:
    """A sandbox that the tests of one module share."""
    host.start("shared")
    return "shared"


@pytest.fixture
def fresh(host: Host, request: pytest.FixtureRequest) -> Iterator[str]:
    """The id of a sandbox that this test starts, and may ruin."""
    name = f"f{abs(hash(request.node.name)) % 10**8}"
    yield name
    host.ask("stop", box=name)
    assert name not in host.ask("remove", box=name)["disks"]

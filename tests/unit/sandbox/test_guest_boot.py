"""Finding, storing and starting the guest: the scripts as real shells and Pythons run them, and what is made of their answers."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gatewayd.errors import GatewayError
from gatewayd.sandbox import guest_boot
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.guest_boot import boot, guest_file
from tests.unit.fakeservice import FakeService

CONTENT = guest_file()[2] + b"# %s\n" % os.urandom(8).hex().encode()  # a guest of our own: it is ended here
DIGEST = hashlib.sha256(CONTENT).hexdigest()
NAME = f"guest-{DIGEST[:16]}.py"
LINE = f"GATEWAYD-GUEST 1 4711 {'0f' * 32} 99"


class Box:
    """Runs the script as the service would, in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.pids: list[int] = []

    def run(self, uploaded: str = "", **env: str) -> list[str]:
        """The lines that it prints, but for those about guests of other tests."""
        done = subprocess.run(
            ["/bin/sh", "-c", guest_boot.FIND_PYTHON],
            env={
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                "HOME": str(self.home),
                "GATEWAYD_PYTHONS": "python3",
                "GATEWAYD_PREPARE": guest_boot.PREPARE,
                "GATEWAYD_NAME": NAME,
                "GATEWAYD_SHA256": DIGEST,
                "GATEWAYD_UPLOADED": uploaded,
                **env,
            },
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        lines = [line for line in done.stdout.splitlines() if not line.startswith("GATEWAYD-OTHER ")]
        for line in lines:
            if line.startswith("GATEWAYD-GUEST 1 "):
                self.pids.append(int(line.split()[-1]))
        return lines

    def upload(self, line: str, content: bytes = CONTENT) -> str:
        """Store the guest where the script wants it."""
        word, _, path = line.partition(" ")
        assert word == "GATEWAYD-UPLOAD"
        Path(path).write_bytes(content)
        return path


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    for pid in set(made.pids):
        os.kill(pid, signal.SIGKILL)
    for folder in Path("/tmp").glob(f".gatewayd-guest-*-{DIGEST[:16]}*"):
        shutil.rmtree(folder)


def test_uploaded_once_started_once_found_again(box: Box) -> None:
    (line,) = box.run()
    folder = box.home / ".cache/gatewayd"
    assert guest_boot._UPLOAD.fullmatch(line)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (started,) = box.run(box.upload(line))
    assert guest_boot._STARTED.fullmatch(started)
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert box.run() == [started]
    environ = Path(f"/proc/{box.pids[0]}/environ").read_bytes()
    assert b"GATEWAYD_" not in environ


def test_a_damaged_upload_is_not_run(box: Box) -> None:
    (line,) = box.run()
    path = box.upload(line, CONTENT[:-1])
    assert box.run(path) == ["GATEWAYD-DAMAGED"]
    assert not Path(path).exists()


def test_a_damaged_file_is_replaced(box: Box) -> None:
    folder = box.home / ".cache/gatewayd"
    folder.mkdir(parents=True, mode=0o700)
    (folder / NAME).write_bytes(b"import os; os.abort()")
    (line,) = box.run()
    (started,) = box.run(box.upload(line))
    assert guest_boot._STARTED.fullmatch(started)


@pytest.mark.parametrize("damage", ["writable", "link", "file"])
def test_folders_that_others_could_write_to_are_not_used(box: Box, damage: str) -> None:
    folder = box.home / ".cache/gatewayd"
    folder.parent.mkdir()
    if damage == "writable":
        folder.mkdir()
        folder.chmod(0o777)
        (folder / NAME).write_bytes(CONTENT)
    elif damage == "link":
        (box.home / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(box.home / "elsewhere")
    else:
        folder.write_text("")
    (line,) = box.run()
    assert guest_boot._UPLOAD.fullmatch(line)
    path = Path(line.partition(" ")[2])
    assert path.parent == Path(f"/tmp/.gatewayd-{os.getuid()}")
    shutil.rmtree(path.parent, ignore_errors=True)


def test_uploads_that_broke_off_are_removed(box: Box) -> None:
    folder = box.home / ".cache/gatewayd"
    folder.mkdir(parents=True, mode=0o700)
    long_ago, lately = folder / f"{NAME}.0123abcd", folder / f"guest-{'0' * 16}.py.89efabcd"
    others = [folder / f"guest-{'0' * 16}.py", folder / "notes"]
    for path in (long_ago, lately, *others):
        path.write_bytes(b"x")
        if path != lately:
            os.utime(path, (0, 0))
    box.run()
    assert set(folder.iterdir()) == {lately, *others}


def test_no_home(box: Box) -> None:
    (line,) = box.run(HOME="")
    path = Path(line.partition(" ")[2])
    assert path.parent == Path(f"/tmp/.gatewayd-{os.getuid()}")
    shutil.rmtree(path.parent, ignore_errors=True)


def test_no_python(box: Box, tmp_path: Path) -> None:
    assert box.run(GATEWAYD_PYTHONS="no-such-python nor-this-one") == ["GATEWAYD-NO-PYTHON"]


def test_pythons_that_are_too_old_or_broken_are_passed_over(box: Box, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, code in (("old", 93), ("shim", 127), ("killed", 137)):
        (programs / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin"
    assert box.run(GATEWAYD_PYTHONS="old shim killed", PATH=path) == ["GATEWAYD-NO-PYTHON"]
    (line,) = box.run(GATEWAYD_PYTHONS="old shim killed python3", PATH=path)
    assert guest_boot._UPLOAD.fullmatch(line)


# -- what is made of the answers


async def test_one_request_when_it_is_there(service: FakeService, account: Account) -> None:
    service.add_box("x", dataplane_url=f"{service.endpoint}/dp/x")
    bodies: list[dict[str, Any]] = []

    def execute(body: dict[str, Any]) -> dict[str, Any]:
        bodies.append(body)
        return {"stdout": f"noise\n{LINE}\n", "stderr": "", "exit_code": 0}

    service.execute = execute
    address = await boot(account, Directory(), "x")
    assert (address.port, address.token, address.pid) == (4711, b"\x0f" * 32, 99)
    assert "0f0f" not in repr(address)
    assert len(bodies) == 1
    assert bodies[0]["shell"] == "/bin/sh"
    assert bodies[0]["env"]["GATEWAYD_SHA256"] == guest_file()[1]


async def test_guests_of_other_versions(service: FakeService, account: Account) -> None:
    service.add_box("x", dataplane_url=f"{service.endpoint}/dp/x")
    other = "GATEWAYD-OTHER 1 {} {} 5"
    lines = [LINE, *(other.format(5000 + number, "ab" * 32) for number in range(6)), other.format(1, "short")]
    service.execute = lambda body: {"stdout": "\n".join(lines), "stderr": "", "exit_code": 0}
    address = await boot(account, Directory(), "x")
    assert address.port == 4711
    assert [(each.port, each.token, each.pid) for each in address.others] == [(5000 + n, b"\xab" * 32, 5) for n in range(4)]


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ({"stdout": "GATEWAYD-NO-PYTHON\n", "exit_code": 0}, "unsupported", "sandbox 'x' has no Python 3.6 or newer"),
        ({"stdout": "", "stderr": "no such file", "exit_code": 127}, "unsupported", "has no /bin/sh"),
        ({"stdout": "GATEWAYD-NOWHERE\n", "exit_code": 0}, "failed", "no folder there can be written"),
        ({"stdout": "GATEWAYD-DAMAGED\n", "exit_code": 0}, "failed", "arrives damaged"),
        ({"stdout": "", "exit_code": 0}, "failed", "it says 'nothing'"),
        ({"stdout": "hello\x1b[2J", "exit_code": 0}, "failed", r"it says 'hello \[2J'"),
        ({"stdout": LINE.replace("4711", "70000"), "exit_code": 0}, "failed", "it says port 70000"),
        ({"stdout": f"{LINE}\nGATEWAYD-OTHER 1 65536 {'0f' * 32} 1", "exit_code": 0}, "failed", "it says port 65536"),
        ({"stdout": LINE.replace("4711", "0"), "exit_code": 0}, "failed", "it says 'GATEWAYD-GUEST"),
        ({"stdout": LINE.replace("0f", "0F"), "exit_code": 0}, "failed", "it says 'GATEWAYD-GUEST"),
        ({"stdout": "GATEWAYD-UPLOAD ../etc/passwd", "exit_code": 0}, "failed", "it says 'GATEWAYD-UPLOAD"),
        ({"stdout": "", "stderr": "Traceback\n\x07boom", "exit_code": 1}, "failed", "Traceback  boom"),
        ({"stdout": 3, "exit_code": 0}, "failed", "the script failed"),
    ],
)
async def test_answers(service: FakeService, account: Account, answer: dict[str, Any], kind: str, text: str) -> None:
    service.add_box("x", dataplane_url=f"{service.endpoint}/dp/x")
    service.execute = lambda body: answer
    with pytest.raises(GatewayError, match=text) as caught:
        await boot(account, Directory(), "x")
    assert caught.value.kind == kind
    assert caught.value.message.isprintable()


def test_the_script_is_valid_shell() -> None:
    subprocess.run(["/bin/sh", "-n", "-c", guest_boot.FIND_PYTHON], check=True)

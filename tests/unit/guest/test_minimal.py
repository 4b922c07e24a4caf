"""What the guest needs: Debian's python3-minimal alone, or any Python since 3.6."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.guest.guestclient import GUEST, Client, Guest

# Not in Debian's python3-minimal, and tempting.
MISSING = {"asyncio", "ctypes", "hmac", "json", "mmap", "multiprocessing", "pty", "secrets", "tarfile", "termios", "tty", "uuid"}


def check(guest: Guest) -> None:
    """Every kind of session that runs other code than the loop's."""
    client = Client(guest).process("sh", "-c", "stty size; exit 3", pty=1, cols=70, rows=20)
    assert client.finish() == {"code": b"3"}
    assert client.output[1] == b"20 70\r\n"
    client.close()
    client = Client(guest).open(("kind", "sftp"))
    client.opened()
    client.input(b"\0\0\0\x05\x01\0\0\0\x03" + b"\0\0\0\x0a\x10\0\0\0\x01\0\0\0\x01.")
    client.wait_output(b"limits@openssh.com")
    client.wait_output(b"\0\0\0\x01\0\0\0\x01")
    client.send(3)
    assert client.finish() == {"code": b"0"}
    client.close()
    client = Client(guest).open(("kind", "tcp"), ("host", "no-such-host.invalid"), ("port", 9))
    assert client.wait(0x47)["kind"] == b"not-found"
    client.close()
    guest.check_clean()
    guest.stop()


def test_python3_minimal_is_enough(tmp_path: Path) -> None:
    """With the library of python3-minimal and nothing else."""
    python = Path("/usr/bin/python3").resolve()
    package = f"lib{python.name}-minimal"
    if not shutil.which("dpkg-query") or python.parent != Path("/usr/bin"):
        pytest.skip("needs a Debian with its own Python")
    done = subprocess.run(["dpkg-query", "-L", package], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the package {package}")
    library = Path("/usr/lib") / python.name
    for line in done.stdout.splitlines():
        path = Path(line)
        if path.is_file() and path.is_relative_to(library):
            target = tmp_path / "lib" / path.relative_to("/usr/lib")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for name in ("json", "termios", "resource", "hmac", "asyncio"):
        command = ["env", f"PYTHONHOME={tmp_path}", str(python), "-s", "-S", "-c", f"import {name}"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1, "this is not the minimal library"
    check(Guest(tmp_path, python=("env", f"PYTHONHOME={tmp_path}", str(python), "-s", "-S")).start())


def test_it_imports_nothing_else() -> None:
    code = (
        "import runpy, sys\ntry: runpy.run_path(sys.argv[1], run_name='__main__')\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, GUEST], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "socket" in loaded
    assert loaded & MISSING == set()


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8", "3.9", "3.10", "3.12", "3.13", "3.14"])
def test_other_versions_of_python(tmp_path: Path, version: str) -> None:
    candidates = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    python = next((str(each) for each in candidates if each and ".pyenv/shims" not in str(each)), None)
    if python is None:
        pytest.skip(f"needs Python {version}")
    check(Guest(tmp_path, python=(python, "-I", "-S")).start())

"""`guest.py start`: one guest for a user and a content, whatever else is in the sandbox."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.guest.guestclient import GUEST, Client, Guest, until


def test_a_second_start_finds_the_first(own_guest: Guest) -> None:
    first = own_guest.run_start()
    own_guest.start()
    assert own_guest.run_start().stdout == first.stdout
    assert own_guest.folder().stat().st_mode & 0o777 == 0o700
    assert (own_guest.folder() / "state").stat().st_mode & 0o777 == 0o600


def test_starts_at_the_same_time_agree(own_guest: Guest) -> None:
    with ThreadPoolExecutor(6) as pool:
        lines = {done.stdout for done in pool.map(lambda _: own_guest.run_start(), range(6))}
    assert len(lines) == 1
    own_guest.start()
    assert lines == {own_guest.run_start().stdout}


def test_another_content_is_another_guest(own_guest: Guest, tmp_path: Path) -> None:
    own_guest.start()
    other = Guest(tmp_path).start()
    assert (other.port, other.pid) != (own_guest.port, own_guest.pid)
    other.stop()


def others(guest: Guest) -> list[list[str]]:
    """What the guest's `start others` tells of others: port, token, process id."""
    done = subprocess.run([*guest.command, "start", "others"], capture_output=True, text=True, timeout=30, check=True)
    first, *rest = done.stdout.splitlines()
    assert first == guest.run_start().stdout.rstrip()
    assert {line.split()[0] for line in rest} <= {"GATEWAYD-OTHER"}
    return [line.split()[2:] for line in rest]


def test_it_tells_of_guests_of_other_contents(own_guest: Guest, tmp_path: Path) -> None:
    own_guest.start()
    mine = [str(own_guest.port), own_guest.token.hex(), str(own_guest.pid)]
    every = ("MAX_OTHERS, OTHERS_TRIED = 4, 8", "MAX_OTHERS, OTHERS_TRIED = 500, 500")  # as many as other tests may run
    other = Guest(tmp_path, replace=every).start()
    assert mine in others(other)
    assert [str(other.port), other.token.hex(), str(other.pid)] in others(own_guest)
    assert len(others(own_guest)) <= 4
    state = own_guest.folder() / "state"
    state.chmod(0o640)
    assert mine not in others(other)
    state.chmod(0o600)
    own_guest.folder().chmod(0o750)
    assert mine not in others(other)
    own_guest.folder().chmod(0o700)
    assert mine in others(other)
    folder = own_guest.folder()
    os.kill(own_guest.pid, signal.SIGKILL)
    until(lambda: not own_guest.alive())
    assert mine not in others(other)
    shutil.rmtree(folder)
    other.stop()


def test_it_is_no_longer_its_starter_s(own_guest: Guest) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    done = subprocess.run(
        [*own_guest.command, "start"], stdout=subprocess.PIPE, timeout=30, check=True, pass_fds=(writer,), start_new_session=True
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b""  # so nobody has the writing end any more
    own_guest.start()
    assert own_guest.pid == int(done.stdout.split()[-1])
    stat = Path(f"/proc/{own_guest.pid}/stat").read_text().rpartition(")")[2].split()
    assert int(stat[3]) not in (own_guest.pid, os.getsid(0))  # a session that it does not lead
    assert Path(f"/proc/{own_guest.pid}/cwd").readlink() == Path("/")
    assert {Path(f"/proc/{own_guest.pid}/fd/{fd}").readlink() for fd in (0, 1, 2)} == {Path("/dev/null")}


def test_after_a_kill_a_new_one_starts(own_guest: Guest) -> None:
    own_guest.start()
    first = own_guest.pid
    os.kill(first, signal.SIGKILL)
    own_guest.start()
    assert own_guest.pid != first
    client = Client(own_guest).process("true")
    assert client.finish() == {"code": b"0"}
    client.close()


def test_a_state_file_without_sense_is_no_guest(own_guest: Guest) -> None:
    own_guest.start()
    folder = own_guest.folder()
    os.kill(own_guest.pid, signal.SIGKILL)
    (folder / "state").write_bytes(b"\xff\0garbage")
    assert own_guest.start().folder() == folder


@pytest.mark.parametrize("trap", ["link", "open", "file", "foreign"])
def test_a_folder_that_others_could_have_made_is_not_used(own_guest: Guest, tmp_path: Path, trap: str) -> None:
    own_guest.start()
    folder = own_guest.folder()
    own_guest.stop()
    try:
        if trap == "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            folder.symlink_to(tmp_path / "elsewhere")
        elif trap == "open":
            folder.mkdir()
            folder.chmod(0o777)
        elif trap == "file":
            folder.touch()
        elif os.geteuid():
            pytest.skip("needs root, to make a folder of somebody else's")
        else:
            folder.mkdir(mode=0o700)
            os.chown(folder, 65534, 65534)
        own_guest.start()
        assert own_guest.folder().name == folder.name
        assert own_guest.folder() != folder
        assert own_guest.run_start().stdout.split()[-1] == str(own_guest.pid)
    finally:
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink()


def test_it_ends_when_nobody_needs_it(tmp_path: Path) -> None:
    guest = Guest(tmp_path, replace=("IDLE_SECONDS = 3600.0", "IDLE_SECONDS = 0.3"))
    guest.start()
    folder = guest.folder()
    client = Client(guest).process("sleep", "0.8")
    assert client.finish() == {"code": b"0"}  # it outlasted the time
    client.close()
    until(lambda: not (folder / "state").exists())
    until(lambda: not guest.alive())
    shutil.rmtree(folder)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    for args in ([], ["stop"], ["start", "now"]):
        done = subprocess.run([sys.executable, GUEST, *args], capture_output=True, timeout=30, check=False)
        assert done.returncode == 2
        assert done.stdout == b""
        assert b"usage" in done.stderr


def test_it_is_python_3_6() -> None:
    tree = ast.parse(GUEST.read_text(), feature_version=(3, 6))
    assert isinstance(tree, ast.Module)

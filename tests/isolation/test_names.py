"""Files with hostile names, and processes inside that swap files and folders while the service reads and writes them."""

from __future__ import annotations

import errno
import os

import pytest

from .conftest import CANARY, Failed, Host

NASTY = ["-rf", "new\nline", "tab\tand \x1b[31mred", "\udcff\udcfe", "x" * 255, "ü" * 127, " ", "...", "$(reboot)", ";&|'\"", "*"]


@pytest.mark.parametrize("name", NASTY, ids=lambda name: ascii(name)[:20])
def test_hostile_names_are_names(host: Host, box: str, name: str) -> None:
    path = f"/root/names/{name}"
    host.ask("write", box=box, path=path, data="content")
    assert host.ask("read", box=box, path=path)["data"] == "content"
    listed = host.python(box, "import os, sys; sys.stdout.buffer.write(b'\\0'.join(os.listdir(b'/root/names')))")
    assert name in listed.split("\0")


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("x" * 256, errno.ENAMETOOLONG),
        ("x/" * 3000, errno.ENAMETOOLONG),
        ("a/../" * 20_000, errno.ENAMETOOLONG),
        ("nul\0byte", errno.EINVAL),
        ("", errno.EISDIR),
        ("/", errno.EISDIR),
        ("..", errno.EISDIR),
    ],
    ids=["name", "path", "dots", "nul", "empty", "root", "up"],
)
def test_impossible_names_are_refused(host: Host, box: str, path: str, number: int) -> None:
    for op in ({"op": "read"}, {"op": "write", "data": "x"}):
        with pytest.raises(Failed) as caught:
            host.ask(box=box, path=path, **op)
        assert caught.value.errno == number
    assert host.sh(box, "echo alive") == "alive\n"


def test_whatever_a_sandbox_made_can_be_removed(host: Host, fresh: str) -> None:
    """The fixture removes it, and sees that it is gone."""
    host.start(fresh)
    host.python(
        fresh,
        """
import os
os.makedirs("/root/deep")
os.chdir("/root/deep")
for _ in range(10_000):
    os.mkdir("d" * 100)
    os.chdir("d" * 100)
open("at the bottom", "w").close()
os.makedirs("/root/wide")
os.chdir("/root/wide")
for number in range(500):
    open(b"\\xff\\n" + b"%d" % number + b"w" * 240, "w").close()
os.mkdir("/root/closed", 0)
os.symlink("/" * 4000, "/root/long link")
os.symlink("loop", "/root/loop")
os.mkfifo("/root/fifo", 0)
os.chown("/root/wide", 4242, 4242)
import socket
socket.socket(socket.AF_UNIX).bind("/root/socket")
""",
    )
    host.ask("stop", box=fresh)
    assert fresh not in host.ask("remove", box=fresh)["disks"]
    assert list((host.state / "trash").iterdir()) == []


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "device", "loop"])
def test_only_files_are_read_and_written(host: Host, box: str, kind: str) -> None:
    made = {
        "fifo": ("mkfifo /root/fifo", errno.EINVAL, errno.EINVAL),
        "socket": ("python3 -c 'import socket; socket.socket(1).bind(\"/root/socket\")'", errno.ENXIO, errno.EINVAL),
        "folder": ("mkdir /root/folder", errno.EISDIR, errno.EISDIR),
        "device": ("ln -s /dev/zero /root/device", errno.EINVAL, errno.EINVAL),
        "loop": ("ln -s loop /root/loop", errno.ELOOP, errno.EINVAL),
    }
    script, reading, writing = made[kind]
    host.sh(box, script)
    with pytest.raises(Failed) as caught:
        host.ask("read", box=box, path=kind)
    assert caught.value.errno == reading
    with pytest.raises(Failed) as caught:
        host.ask("write", box=box, path=kind, data="x")
    assert caught.value.errno == writing


SWAPPER = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
one, other = os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2])
print("up", flush=True)
while True:
    libc.renameat2(-100, one, -100, other, 2)  # RENAME_EXCHANGE
"""


@pytest.mark.parametrize("user", ["user", None])
def test_a_folder_swapped_for_a_link_leads_nowhere_new(host: Host, fresh: str, user: str | None) -> None:
    """Written as the user, nothing lands where the user may not write; as root, nothing lands outside of the sandbox."""
    host.start(fresh)
    outside = str(host.root)
    target = "/etc" if user else outside
    host.sh(fresh, f"mkdir -p /home/user/place {outside}; chown user /home/user/place; ln -s {target} /home/user/link")
    swapper = ["python3", "-c", SWAPPER, "/home/user/place", "/home/user/link"]
    assert host.ask("launch", box=fresh, argv=swapper, user="user")["line"] == "up\n"
    counts = host.ask("race", box=fresh, path="/home/user/place/canary", user=user, times=300, reading=False)["counts"]
    raced = (errno.EACCES, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ELOOP, errno.EINVAL)  # EINVAL: readlink(2)
    assert set(counts) <= {"fine", *map(str, raced)}, counts
    assert counts.get("fine"), counts
    assert host.canary.read_text() == CANARY
    assert host.sh(fresh, "ls /etc/canary 2>/dev/null || true") == ""
    assert host.sh(fresh, f"ls -A /etc /home/user/place {outside} | grep gatewayd || true") == ""  # no half-written file is left


def test_a_file_swapped_for_a_link_is_read_with_the_users_rights(host: Host, fresh: str) -> None:
    host.start(fresh)
    host.sh(fresh, "echo secret > /etc/secret; chmod 600 /etc/secret; ln -s /etc/secret /home/user/link")
    host.sh(fresh, "echo open > /home/user/file", user="user")
    swapper = ["python3", "-c", SWAPPER, "/home/user/file", "/home/user/link"]
    assert host.ask("launch", box=fresh, argv=swapper, user="user")["line"] == "up\n"
    answer = host.ask("race", box=fresh, path="/home/user/file", user="user", times=500, reading=True)
    assert answer["seen"] == ["open\n"], answer["counts"]


def test_a_sticky_folder_protects_others_files(host: Host, box: str) -> None:
    host.sh(box, "echo roots > /tmp/roots; chmod 666 /tmp/roots")
    with pytest.raises(Failed) as caught:
        host.ask("write", box=box, path="/tmp/roots", data="users", user="user")
    assert caught.value.errno in (errno.EPERM, errno.EACCES)
    assert host.sh(box, "cat /tmp/roots; ls -A /tmp | grep gatewayd || true") == "roots\n"


def test_no_file_of_the_sandbox_is_open_to_others_here(host: Host, box: str) -> None:
    host.sh(box, "echo public > /root/public; chmod 777 /root /root/public; cp /bin/true /root/suid; chmod 4755 /root/suid")
    assert host.state.stat().st_mode & 0o077 == 0
    assert os.access(host.state, os.R_OK)

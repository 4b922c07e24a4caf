"""Sockets that the service makes inside: no trick with names leads it to another place, as root or as a plain user."""

from __future__ import annotations

import errno
from pathlib import PurePosixPath

from tests.isolation.conftest import Host

ASK = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(b"question")
sock.shutdown(socket.SHUT_WR)
print(sock.recv(100, socket.MSG_WAITALL).decode())
"""

# Puts links to /srv in the place of every new folder below /tmp, and back, as fast as it can.
SWAP = """
import os, sys, time
print("ready", flush=True)
end = time.monotonic() + 20
while time.monotonic() < end and not os.path.exists("/tmp/enough"):
    for name in os.listdir("/tmp"):
        if name.startswith("gatewayd-") and not name.endswith("+"):
            path = "/tmp/" + name
            try:
                os.rename(path, path + "+")
                os.symlink("/srv", path)
                os.unlink(path)
                os.rename(path + "+", path)
            except OSError:
                pass
"""


def test_a_socket_answers_its_user_and_nobody_else(host: Host, box: str) -> None:
    for user, other in ((None, "user"), ("user", "sshd")):
        path = str(host.ask("listen", box=box, user=user)["path"])
        assert host.run(box, "python3", "-c", ASK, path, user=user)["out"] == "QUESTION\n"
        refused = host.run(box, "python3", "-c", ASK, path, user=other)
        assert "PermissionError" in refused["err"]
        assert host.sh(box, f"stat -c %U {path}") == f"{user or 'root'}\n"
        host.ask("unlisten", path=path)
        assert host.run(box, "ls", "-d", str(PurePosixPath(path).parent))["code"] != 0


def test_folders_swapped_for_links(host: Host, fresh: str) -> None:
    host.start(fresh)
    host.sh(fresh, "chmod 1777 /srv; rm -rf /tmp/*")
    host.ask("launch", box=fresh, argv=["python3", "-c", SWAP], user="user")
    counts = host.ask("race_listen", box=fresh, user="user", times=300)["counts"]
    host.ask("launch", box=fresh, argv=["python3", "-c", SWAP])
    for outcome, count in host.ask("race_listen", box=fresh, user=None, times=300)["counts"].items():
        counts[outcome] = counts.get(outcome, 0) + count
    host.sh(fresh, "touch /tmp/enough")
    tricked = {str(number) for number in (errno.ENOTDIR, errno.ELOOP, errno.ENOENT)}  # told as what it is
    assert set(counts) <= {"fine", *tricked}
    assert counts["fine"] > 100
    assert host.sh(fresh, "ls -A /srv") == ""


def test_a_hundred_and_more_are_refused(host: Host, fresh: str) -> None:
    host.start(fresh)
    paths = [str(host.ask("listen", box=fresh)["path"]) for _ in range(128)]
    counts = host.ask("race_listen", box=fresh, user=None, times=2)["counts"]
    assert counts == {str(errno.EMFILE): 2}
    assert host.run(fresh, "python3", "-c", ASK, paths[-1])["out"] == "QUESTION\n"
    for path in paths:
        host.ask("unlisten", path=path)
    assert host.sh(fresh, "ls -A /tmp") == ""

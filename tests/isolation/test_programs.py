"""What people run in a sandbox works under the filter and without new privileges; what is not installed here is skipped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .conftest import Host

POSTGRESQL = sorted(Path("/usr/lib/postgresql").glob("*/bin"))

# name → (program that must be installed, user, script, last line of its output)
PROGRAMS = {
    "python": (
        "python3",
        "user",
        'python3 -c \'import subprocess, threading; print(subprocess.run(["echo", "fine"]).returncode)\'',
        "0",
    ),
    "multiprocessing": (
        "python3",
        "user",
        "python3 -c 'import multiprocessing as m; print(m.Pool(2).map(abs, [-1, -2]))'",
        "[1, 2]",
    ),
    "node": ("node", "user", 'node -e \'require("fs").readFile("/etc/hosts", () => console.log(1 + 1))\'', "2"),
    "git": (
        "git",
        "user",
        "cd; git init -q r; cd r; git config user.email a@b; git config user.name a; echo x > f; git add f; git commit -qm x;"
        " git clone -q . ../c; cat ../c/f",
        "x",
    ),
    "tmux": ("tmux", "user", "tmux -f /dev/null new-session -d 'sleep 100'; tmux list-sessions -F '#{session_windows}'", "1"),
    "strace": ("strace", "user", "strace -f -o /tmp/trace sh -c 'echo traced; exit 0'; grep -c execve /tmp/trace", "1"),
    "gdb": (
        "gdb",
        "user",
        "gdb -nx -batch -ex run --args /bin/echo fine 2>/dev/null | grep -o 'exited normally'",
        "exited normally",
    ),
    "redis": (
        "redis-server",
        "user",
        "cd; redis-server --port 6390 --daemonize yes --save '' >/dev/null;"
        " until redis-cli -p 6390 ping >/dev/null 2>&1; do sleep .05; done;"
        " redis-cli -p 6390 set k v >/dev/null; redis-cli -p 6390 get k",
        "v",
    ),
    "sshd": (
        "sshd",
        None,
        "mkdir -p /run/sshd /root/.ssh; chmod 755 /run/sshd; ssh-keygen -q -t ed25519 -N '' -f /root/key;"
        " cp /root/key.pub /root/.ssh/authorized_keys;"
        " /usr/sbin/sshd -f /dev/null -h /root/key -p 2222 -o UsePAM=no;"
        " ssh -p 2222 -i /root/key -o StrictHostKeyChecking=no -o LogLevel=ERROR"
        " -tt 127.0.0.1 'test -t 0 && echo fine' | tr -d '\\r'",
        "fine",
    ),
    "dpkg": (
        "dpkg-deb",
        None,
        "mkdir -p /root/p/DEBIAN /root/p/opt; echo content > /root/p/opt/packaged;"
        " printf 'Package: p\\nVersion: 1\\nArchitecture: all\\nMaintainer: a <a@b>\\nDescription: d\\n'"
        " > /root/p/DEBIAN/control;"
        " dpkg-deb --build /root/p /root/p.deb >/dev/null;"
        " mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates; touch /var/lib/dpkg/status;"
        " dpkg --force-all -i /root/p.deb >/dev/null 2>&1; cat /opt/packaged",
        "content",
    ),
    "apt": ("apt-get", None, "apt-get --version | head -1 | cut -d' ' -f1", "apt"),
    "compiler": ("gcc", "user", "cd; echo 'int main(){return 0;}' > a.c; gcc -o a a.c && ./a && echo fine", "fine"),
    "su": ("su", None, "su user -s /bin/sh -c 'id -u'", "1000"),
    "chroot": ("chroot", None, "chroot / id -u", "0"),
    "threads": ("openssl", "user", "openssl speed -seconds 1 -bytes 64 -multi 2 sha256 >/dev/null 2>&1 && echo fine", "fine"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_work(host: Host, box: str, name: str) -> None:
    program, user, script, last = PROGRAMS[name]
    if shutil.which(program, path="/usr/bin:/usr/sbin:/bin:/sbin") is None:
        pytest.skip(f"{program} is not installed")
    done = host.run(box, "/bin/sh", "-c", script, user=user)
    assert done["out"].splitlines()[-1:] == [last], done


@pytest.mark.skipif(not POSTGRESQL, reason="PostgreSQL is not installed")
def test_postgresql_as_a_user(host: Host, box: str) -> None:
    script = """
set -e; cd; export PATH=FOLDER:$PATH
initdb -D data --no-sync -A trust >/dev/null
pg_ctl -D data -s -w -l log -o "-k /tmp -p 5440 -c fsync=off" start
psql -h 127.0.0.1 -p 5440 -d postgres -qc 'create table t as select generate_series(1, 1000) n'
psql -h /tmp -p 5440 -d postgres -Atc 'set max_parallel_workers_per_gather = 2; select sum(n) from t' | tail -1
pg_ctl -D data -s -m fast stop
""".replace("FOLDER", str(POSTGRESQL[-1]))
    assert host.sh(box, script, user="user") == "500500\n"


def test_privileges_are_not_gained(host: Host, box: str) -> None:
    if shutil.which("sudo") is None:
        pytest.skip("sudo is not installed")
    done = host.run(box, "sudo", "-n", "id", user="user")
    assert done["code"] != 0

"""Attempts to get out of a sandbox, made from inside as its root; this machine must look the same afterwards."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import CANARY, Failed, Host

# Names of system calls → numbers that the script's machine uses; helpers for attempts in Python.
TOOLS = """
import ctypes, errno, json, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
def call(*arguments):
    result = libc.syscall(*(ctypes.c_long(word) if isinstance(word, int) else word for word in arguments))
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]
def attempt(function, *arguments):
    try:
        function(*arguments)
        return "done"
    except OSError as exc:
        return errno.errorcode[exc.errno]
"""


def attempts(host: Host, box: str, script: str, **options: object) -> dict[str, str]:
    """Outcomes by name: "done" or the errno."""
    found: dict[str, str] = json.loads(host.python(box, TOOLS + script, **options))
    return found


def test_no_process_leads_to_this_machines_files(host: Host, box: str) -> None:
    found = attempts(
        host,
        box,
        f"""
found = {{}}
for pid in filter(str.isdecimal, os.listdir("/proc")):
    for way in ("root", "cwd"):
        found[pid + way] = attempt(os.stat, f"/proc/{{pid}}/{{way}}{host.canary}")
        found[pid + way + "up"] = attempt(os.stat, f"/proc/{{pid}}/{{way}}/../../../../..{host.canary}")
found["plain"] = attempt(os.stat, "{host.canary}")
os.makedirs("/root/jail", exist_ok=True)
out = os.open("/", os.O_RDONLY)
os.chroot("/root/jail")  # the classic: leave a jail through a descriptor from outside it
os.fchdir(out)
for _ in range(64):
    os.chdir("..")
os.chroot(".")
found["chroot"] = attempt(os.stat, "{host.canary}")
print(json.dumps(found))
""",
    )
    assert set(found.values()) <= {"ENOENT", "EACCES"}, found


def test_kernel_settings_stay(host: Host, box: str) -> None:
    before = Path("/proc/sys/kernel/core_pattern").read_text(), Path("/proc/sys/vm/overcommit_memory").read_text()
    names = ["core_pattern", "modprobe", "hostname", "randomize_va_space", "domainname", "sysrq"]
    found = attempts(
        host,
        box,
        f"""
def write(path):
    with open(path, "w") as file:
        file.write("1")
paths = ["/proc/sys/kernel/" + name for name in {names}]
paths += ["/proc/sys/vm/overcommit_memory", "/proc/sys/fs/file-max", "/proc/sysrq-trigger", "/proc/sys/fs/protected_symlinks"]
print(json.dumps({{path: attempt(write, path) for path in paths if os.path.exists(path)}}))
""",
    )
    assert found
    assert set(found.values()) <= {"EACCES", "EPERM", "EROFS"}, found
    assert before == (Path("/proc/sys/kernel/core_pattern").read_text(), Path("/proc/sys/vm/overcommit_memory").read_text())
    assert "domain" not in host.sh(box, "ls /sys 2>/dev/null || true")


def test_no_devices(host: Host, box: str) -> None:
    found = attempts(
        host,
        box,
        """
rows = [line.split() for line in open("/proc/partitions")][2:]
disk = os.makedev(int(rows[0][0]), int(rows[0][1])) if rows else os.makedev(8, 0)
found = {}
loop, memory = os.makedev(7, 0), os.makedev(1, 1)
for name, kind, device in (("disk", 0o060000, disk), ("mem", 0o020000, memory), ("loop", 0o060000, loop)):
    for folder in ("/root", "/tmp", "/dev"):
        found[name + folder] = attempt(os.mknod, f"{folder}/{name}", kind | 0o600, device)
print(json.dumps(found))
""",
    )
    assert set(found.values()) == {"EPERM"}, found
    listed = set(host.sh(box, "find /dev -type b -o -type c").split())
    allowed = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "pts/ptmx")}
    assert {path for path in listed if not path.removeprefix("/dev/pts/").isdecimal()} <= allowed


def test_no_mounts_and_no_namespaces(host: Host, box: str) -> None:
    found = attempts(
        host,
        box,
        """
NEWUSER, NEWNS, SIGCHLD = 0x10000000, 0x20000, 17
mount = libc.mount
def mounted(*arguments):
    return "done" if mount(*arguments) == 0 else errno.errorcode[ctypes.get_errno()]
found = {
    "tmpfs": mounted(b"none", b"/mnt", b"tmpfs", 0, None),
    "proc": mounted(b"none", b"/mnt", b"proc", 0, None),
    "bind": mounted(b"/etc", b"/mnt", None, 4096, None),
    "remount": mounted(None, b"/usr", None, 32 | 4096, None),
    "umount": "done" if libc.umount2(b"/usr", 2) == 0 else errno.errorcode[ctypes.get_errno()],
    "pivot_root": call(155 if X86 else 41, b"/mnt", b"/mnt"),
    "unshare": "done" if libc.unshare(NEWUSER | NEWNS) == 0 else errno.errorcode[ctypes.get_errno()],
    "clone": call(56 if X86 else 220, NEWUSER | SIGCHLD, 0, 0, 0, 0),
    "clone3": call(435, struct.pack("8Q", NEWUSER, 0, 0, 0, SIGCHLD, 0, 0, 0), 64),
    "fsopen": call(430, b"tmpfs", 0),
    "open_tree": call(428, -100, b"/", 1),
    "handle": call(304 if X86 else 265, 3, struct.pack("IiQ", 8, 1, 2), 0),
}
for pid in ("1", "2"):
    for kind in ("mnt", "user", "net", "pid"):
        def join(path):
            if libc.setns(os.open(path, os.O_RDONLY), 0) != 0:
                raise OSError(ctypes.get_errno(), "")
        found["setns" + pid + kind] = attempt(join, f"/proc/{pid}/ns/{kind}")
print(json.dumps(found))
""",
    )
    assert found.pop("clone3") == "ENOSYS"
    assert set(found.values()) <= {"EPERM", "EACCES"}, found


def test_the_agent_cannot_be_taken_over(host: Host, box: str) -> None:
    agent = host.sh(box, "pgrep -x gatewayd-agent").strip()
    found = attempts(
        host,
        box,
        f"""
agent = {agent}
vector = struct.pack("QQ", id(agent), 8)
pidfd = libc.syscall(434, agent, 0)
found = {{
    "attach": call(101 if X86 else 117, 16, agent, 0, 0),
    "seize": call(101 if X86 else 117, 0x4206, agent, 0, 0),
    "readv": call(310 if X86 else 270, agent, vector, 1, vector, 1, 0),
    "getfd": call(438, pidfd, 0, 0),
}}
for name in ("mem", "environ", "maps", "auxv", "syscall", "stack"):
    found[name] = attempt(lambda: open(f"/proc/{{agent}}/{{name}}", "rb").read(1))
for name in ("exe", "cwd", "root", "ns/user"):
    found[name] = attempt(os.readlink, f"/proc/{{agent}}/{{name}}")
found["fd"] = attempt(os.listdir, f"/proc/{{agent}}/fd")
print(json.dumps(found))
""",
    )
    assert set(found.values()) <= {"EPERM", "EACCES", "ENOENT"}, found


def test_every_process_is_filtered_and_poor(host: Host, box: str) -> None:
    processes = json.loads(
        host.python(
            box,
            """
import json, os
def status(pid):
    with open(f"/proc/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
print(json.dumps([status(pid) for pid in os.listdir("/proc") if pid.isdecimal()]))
""",
        )
    )
    assert len(processes) >= 3
    for status in processes:
        assert status["NoNewPrivs"] == "1", status
        assert status["Seccomp"] == "2" or os.uname().machine not in ("x86_64", "aarch64"), status
        for name in ("CapPrm", "CapEff", "CapInh", "CapAmb"):
            assert int(status[name], 16) & ~0xA004_25FB == 0, (name, status)  # `kernel.SANDBOX_CAPABILITIES`


def test_nothing_inside_names_this_machines_folders(host: Host, box: str) -> None:
    shown = host.sh(box, "cat /proc/[0-9]*/cmdline /proc/[0-9]*/comm /proc/self/mountinfo /proc/cmdline | tr '\\0' ' '")
    assert str(host.root) not in shown
    assert "monitor.py" not in shown
    assert host.sh(box, "cat /proc/1/environ 2>/dev/null | wc -c") == "0\n"


def test_no_keyrings(host: Host, box: str) -> None:
    found = attempts(
        host,
        box,
        """
numbers = (248, 249, 250) if X86 else (217, 218, 219)
print(json.dumps({
    "add": call(numbers[0], b"user", b"x", b"x", 1, -4),
    "request": call(numbers[1], b"user", b"x", None, -4),
    "describe": call(numbers[2], 6, -3, 0, 0),
    "proc": attempt(lambda: open("/proc/keys").read(1)),
}))
""",
    )
    assert found == {"add": "EPERM", "request": "EPERM", "describe": "EPERM", "proc": found["proc"]}
    assert found["proc"] in ("EACCES", "ENOENT")


def test_dangerous_calls_and_sockets(host: Host, box: str) -> None:
    found = attempts(
        host,
        box,
        """
print(json.dumps({
    "bpf": call(321 if X86 else 280, 0, b"\\0" * 64, 64),
    "perf": call(298 if X86 else 241, b"\\0" * 128, 0, -1, -1, 0),
    "userfaultfd": call(323 if X86 else 282, 0),
    "io_uring": call(425, 8, b"\\0" * 120),
    "syslog": call(103 if X86 else 116, 3, b"\\0" * 64, 64),
    "x32": call(0x40000000 | 39),
    "packet": attempt(socket.socket, 17, socket.SOCK_RAW, 0x300),
    "vsock": attempt(socket.socket, 40, socket.SOCK_STREAM),
    "alg": attempt(socket.socket, 38, socket.SOCK_SEQPACKET),
}))
""",
    )
    assert found == {
        **dict.fromkeys(("bpf", "perf", "userfaultfd", "syslog"), "EPERM"),
        **dict.fromkeys(("io_uring", "x32"), "ENOSYS"),
        **dict.fromkeys(("packet", "vsock", "alg"), "EAFNOSUPPORT"),
    }


def test_a_terminal_cannot_be_typed_into(host: Host, box: str) -> None:
    script = TOOLS + 'import fcntl, termios\nprint(attempt(fcntl.ioctl, 0, termios.TIOCSTI, b"x"))'
    assert host.run(box, "python3", "-I", "-c", script, pty=True)["out"].strip() == "EPERM"


def test_a_user_stays_a_user(host: Host, box: str) -> None:
    host.sh(box, "cp /bin/bash /home/user/up; chmod 4755 /home/user/up")
    assert host.sh(box, "/home/user/up -p -c 'id -u'", user="user") == "1000\n"


@pytest.fixture
def listeners() -> Iterator[dict[str, int]]:
    """Servers of this machine that a sandbox would like to talk to."""
    tcp = socket.create_server(("0.0.0.0", 0))
    tcp6 = socket.create_server(("::1", 0), family=socket.AF_INET6) if socket.has_ipv6 else tcp
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("0.0.0.0", 0))
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unix.bind("\0gatewayd-isolation")
    unix.listen()
    for sock in (tcp, tcp6, udp, unix):
        sock.setblocking(False)
    yield {"tcp": tcp.getsockname()[1], "tcp6": tcp6.getsockname()[1], "udp": udp.getsockname()[1]}
    for sock in (tcp, tcp6, unix):
        with pytest.raises(BlockingIOError):
            sock.accept()
    with pytest.raises(BlockingIOError):
        udp.recv(16)
    for sock in {tcp, tcp6, udp, unix}:
        sock.close()


def test_this_machines_sockets_are_out_of_reach(host: Host, box: str, listeners: dict[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only asks which address of ours faces the world
            own = probe.getsockname()[0]
        except OSError:
            own = "127.0.0.1"
    found = attempts(
        host,
        box,
        f"""
def tcp(*address):
    socket.create_connection(address, timeout=2).close()
def unix(path):
    socket.socket(socket.AF_UNIX).connect(path)
def udp(*address):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(address)
    sock.send(b"x")
    sock.settimeout(0.2)
    sock.recv(1)
found = {{"abstract": attempt(unix, "\\0gatewayd-isolation"), "tcp6": attempt(tcp, "::1", {listeners["tcp6"]})}}
for address in ("127.0.0.1", "127.0.0.2", "{own}", "0.0.0.0"):
    found["tcp" + address] = attempt(tcp, address, {listeners["tcp"]})
    found["udp" + address] = attempt(udp, address, {listeners["udp"]})
print(json.dumps(found))
""",
    )
    # EPERM: a datagram that the packet filter has refused (sendto(2) says so at once)
    assert set(found.values()) <= {"ECONNREFUSED", "ENETUNREACH", "EPERM"}, found
    assert {name for name, outcome in found.items() if outcome == "EPERM"} <= {f"udp{own}"}
    assert host.sh(box, "ls /sys/class/net 2>/dev/null; cut -d: -f1 -s /proc/net/dev").split() == ["lo"]
    for port in (listeners["tcp"], listeners["tcp6"]):
        with pytest.raises(Failed):
            host.ask("connect", box=box, port=port)


def test_another_sandbox_is_out_of_reach(host: Host, box: str, fresh: str) -> None:
    host.start(fresh)
    server = """
import socket, time
tcp = socket.create_server(("127.0.0.1", 7777))
unix = socket.socket(socket.AF_UNIX)
unix.bind("\\0neighbour")
unix.listen()
open("/root/secret", "w").write("of the neighbour")
open("/tmp/secret", "w").write("of the neighbour")
open("/dev/shm/secret", "w").write("of the neighbour")
print("up", flush=True)
time.sleep(1000)
"""
    assert host.ask("launch", box=fresh, argv=["python3", "-c", server])["line"] == "up\n"
    host.sh(fresh, "ipcmk -M 64 >/dev/null")
    host.ask("connect", box=fresh, port=7777)
    with pytest.raises(Failed):
        host.ask("connect", box=box, port=7777)
    found = attempts(
        host,
        box,
        """
def unix(path):
    socket.socket(socket.AF_UNIX).connect(path)
found = {
    "tcp": attempt(lambda: socket.create_connection(("127.0.0.1", 7777), timeout=2)),
    "unix": attempt(unix, "\\0neighbour"),
    **{path: attempt(os.stat, path) for path in ("/root/secret", "/tmp/secret", "/dev/shm/secret")},
}
print(json.dumps(found))
""",
    )
    assert set(found.values()) <= {"ECONNREFUSED", "ENOENT"}, found
    assert host.sh(box, "ipcs -m | grep -c 0x || true") == "0\n"
    assert host.sh(box, "pgrep -f [n]eighbour || true") == ""
    assert host.sh(box, "cat /proc/self/mountinfo | grep -c [s]ecret || true") == "0\n"


def test_ids_inside_are_nobody_outside(host: Host, box: str) -> None:
    host.sh(box, "touch /root/mine; chown 1000 /root/mine")
    rows = [line.split() for line in host.sh(box, "cat /proc/self/uid_map").splitlines()]
    if "rootless" in str(host.process.args):
        assert len(rows) == 2
    for inside, outside, _ in rows:
        assert outside != "0", (inside, outside)


def test_what_the_agent_opens_is_the_sandboxes(host: Host, box: str) -> None:
    """The agent's own links and memory are no files of the sandbox, and the way to this machine's Python is none."""
    for path in ("/proc/self/exe", "/proc/self/root/etc/passwd", "/proc/thread-self/exe"):
        with pytest.raises(Failed) as caught:
            host.ask("read", box=box, path=path)
        assert caught.value.errno == errno.ELOOP, path
    for path in ("/proc/self/maps", "/proc/self/environ", "/proc/self/mem", "/proc/thread-self/maps"):
        with pytest.raises(Failed) as caught:
            host.ask("read", box=box, path=path)
        assert caught.value.errno in (errno.EACCES, errno.EPERM), path
    host.sh(box, f"ln -sf {host.canary} /root/link; ln -sf /proc/self/maps /root/maps")
    for path in ("link", "maps", str(host.canary)):
        with pytest.raises(Failed):
            host.ask("read", box=box, path=path)
    host.ask("write", box=box, path="link", data="inside")  # makes a file of that name inside
    assert host.canary.read_text() == CANARY
    assert host.sh(box, f"cat {host.canary}; rm -r /{host.canary.parts[1]}/{host.canary.parts[2]}") == "inside"


def test_a_32_bit_program_finds_no_system_calls(host: Host, box: str) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("x86 only")
    # mov eax, 20 (getpid); int 0x80; ret
    script = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
    done = host.run(box, "python3", "-I", "-c", script)
    # a kernel without 32-bit support ends the process itself
    assert done["out"].strip() == str(-errno.ENOSYS) or done["code"] == 139, done
    assert struct.calcsize("P") == 8

"""Processes: how they start, what they get, how they end."""

from __future__ import annotations

import os
import pwd
import re
import struct
from pathlib import Path

import pytest

from tests.unit.guest.guestclient import (
    CLOSE,
    ERROR,
    EXIT,
    INPUT_EOF,
    INPUT_STOP,
    RESIZE,
    SIGNAL,
    STOP_OUTPUT,
    Client,
    Guest,
    until,
)

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to run as somebody else")


def run(guest: Guest, *args: str | bytes, **options: str | bytes | int) -> Client:
    client = Client(guest).process(*args, **options)
    client.finish()
    client.close()
    return client


def gone(pid: bytes | int) -> bool:
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # nobody has waited yet
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_arguments_are_exact(guest: Guest) -> None:
    words = [b"", b"a b", b"$HOME", b"*", b"\xff\xfe", "ü".encode(), b"-n", b"\n"]
    assert run(guest, "printf", "[%s]", *words).output[1] == b"".join(b"[%s]" % word for word in words)


def test_output_errors_and_code(guest: Guest) -> None:
    client = run(guest, command="echo out; echo err >&2; exit 7")
    assert client.output == {1: bytearray(b"out\n"), 2: bytearray(b"err\n")}
    assert client.find(EXIT) == {"code": b"7"}


def test_binary_input_to_its_end(guest: Guest) -> None:
    data = os.urandom(3_000_000)
    client = Client(guest).process("cat")
    client.input(data)
    client.send(INPUT_EOF)
    assert client.finish() == {"code": b"0"}
    assert client.output[1] == data
    client.close()


@pytest.mark.parametrize(
    ("options", "kind", "number"),
    [
        ({"args": ("no-such-program",)}, b"not-found", b"2"),
        ({"args": ("/etc/passwd",)}, b"permission", b"13"),
        ({"args": ("/etc/passwd/x",)}, b"not-found", b"20"),
        ({"args": ("true",), "cwd": "/no/such"}, b"not-found", b"2"),
        ({"args": ("true",), "user": "nosuchuser"}, b"not-found", None),
    ],
)
def test_what_cannot_start(guest: Guest, options: dict[str, str], kind: bytes, number: bytes | None) -> None:
    rest = {key: value for key, value in options.items() if key != "args"}
    client = Client(guest).process(*options["args"], **rest)
    error = client.wait(ERROR)
    assert (error["kind"], error.get("errno")) == (kind, number)
    assert client.events[0][0] == ERROR  # and not OPENED
    client.close()


def test_a_script_without_a_shebang(guest: Guest, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$0 $1"\n')
    script.chmod(0o755)
    assert run(guest, str(script), "x").output[1] == f"{script} x\n".encode()


def test_its_environment(tmp_path: Path) -> None:
    guest = Guest(tmp_path)
    guest.env = {"PATH": "/usr/bin:/bin", "COLOUR": "red", "OLDPWD": "/x", "TERM": "dumb", "HOME": str(tmp_path)}
    guest.start()
    user = pwd.getpwuid(os.geteuid())
    client = Client(guest)
    client.open(("kind", "process"), ("arg", "env"), ("env", "A=b=c"), ("env", b"BYTES=\xff"), ("env", "COLOUR=green"))
    client.finish()
    client.close()
    found = dict(line.split(b"=", 1) for line in bytes(client.output[1]).splitlines())
    assert found == {
        b"PATH": b"/usr/bin:/bin",
        b"COLOUR": b"green",
        b"A": b"b=c",
        b"BYTES": b"\xff",
        b"HOME": str(tmp_path).encode(),
        b"USER": user.pw_name.encode(),
        b"LOGNAME": user.pw_name.encode(),
        b"SHELL": user.pw_shell.encode(),
    }
    assert run(guest, "pwd").output[1].strip() == str(tmp_path).encode()
    assert run(guest, "pwd", cwd="/usr/lib").output[1] == b"/usr/lib\n"
    assert run(guest, "sh", "-c", "umask").output[1] == b"0022\n"
    guest.check_clean()
    guest.stop()


def test_signals_are_as_a_shell_has_them(guest: Guest) -> None:
    status = run(guest, "cat", "/proc/self/status").output[1]
    masks = [line.split() for line in bytes(status).splitlines()]
    internal = 3 << 31  # 32 and 33 are the C library's own, which no program can set: they are as this test's process has them
    found = [int(words[1], 16) & ~internal for words in masks if words[0] in (b"SigBlk:", b"SigIgn:", b"SigCgt:")]
    assert found == [0, 0, 0]


def test_it_has_no_descriptor_but_three(guest: Guest) -> None:
    assert run(guest, "sh", "-c", "ls /proc/$$/fd").output[1].split() == [b"0", b"1", b"2"]


def test_it_dies_of_a_broken_pipe(guest: Guest) -> None:
    """As users expect of `yes | head -1`."""
    client = Client(guest).process("sh", "-c", "yes; echo $? >&2")
    client.wait_output(b"y\n")
    client.send(STOP_OUTPUT, b"\x01")
    client.wait_eof(1)
    assert client.finish() == {"code": b"0"}
    assert client.output[2] == b"141\n"
    client.close()


def test_nobody_reads_its_input(guest: Guest) -> None:
    client = Client(guest).process("sh", "-c", "exec <&-; echo closed; sleep 100")
    client.wait_output(b"closed")
    client.wait(INPUT_STOP)
    client.input(bytes(1_000_000))  # goes nowhere, and does not wait
    client.close()


def test_it_ends_by_a_signal(guest: Guest) -> None:
    assert run(guest, "sh", "-c", "kill -KILL $$").find(EXIT) == {"signal": b"KILL"}


@pytest.mark.parametrize("name", ["TERM", "HUP", "USR1", "KILL"])
def test_a_signal_reaches_the_whole_group(guest: Guest, name: str) -> None:
    client = Client(guest).process("sh", "-c", "sleep 100 & echo $!; wait; wait")
    client.wait_output(b"\n")
    client.send(SIGNAL, name.encode())
    assert client.finish() == {"signal": name.encode()}
    until(lambda: gone(bytes(client.output[1])))
    client.close()


def test_unknown_signals_are_ignored(guest: Guest) -> None:
    client = Client(guest).process("cat")
    for name in (b"", b"NOSUCH", b"int", b"SIGINT", b"9", b"\xff"):
        client.send(SIGNAL, name)
    client.send(INPUT_EOF)
    assert client.finish() == {"code": b"0"}
    client.close()


def test_output_goes_on_after_its_end(guest: Guest) -> None:
    client = Client(guest).process("sh", "-c", "exec 3<&0; (read x <&3; echo $x) & exit 0")
    assert client.wait(EXIT) == {"code": b"0"}
    assert client.eof == set()
    client.input(b"late\n")
    client.wait_eof(1, 2)
    assert client.output[1] == b"late\n"
    client.close()


def test_close_hangs_up(guest: Guest) -> None:
    client = Client(guest).process("sh", "-c", "trap 'echo hup >&2; exit 1' HUP; echo ready; while :; do sleep 0.05; done")
    client.wait_output(b"ready")
    pid = int(client.opened()["pid"])
    client.close()
    until(lambda: gone(pid))


@pytest.mark.parametrize("pty", [0, 1])
def test_close_kills_what_does_not_hang_up(tmp_path: Path, pty: int) -> None:
    guest = Guest(tmp_path, replace=("KILL_SECONDS = 5.0", "KILL_SECONDS = 0.3")).start()
    client = Client(guest).process("sh", "-c", "trap '' HUP; echo ready; while :; do sleep 0.05; done", pty=pty)
    client.wait_output(b"ready")
    pid = int(client.opened()["pid"])
    client.close()
    until(lambda: gone(pid))
    guest.check_clean()
    guest.stop()


def test_nobody_comes_back(guest: Guest) -> None:
    client = Client(guest).process("sleep", "100", linger=0)
    pid = int(client.opened()["pid"])
    client.cut()
    until(lambda: gone(pid))


def test_a_list_shows_how_it_ended(guest: Guest) -> None:
    clients = [Client(guest).process(command="exit 3", name="one"), Client(guest).process("sh", "-c", "kill -9 $$", pty=1)]
    for client in clients:
        client.finish()
    clients[1].cut()
    until(lambda: [item["attached"] for item in listing(guest)] == [b"1", b"0"])
    one, two = listing(guest)
    assert (one["name"], one["code"], one["command"], one["pty"], one["pid"]) == (
        b"one",
        b"3",
        b"exit 3",
        b"0",
        clients[0].opened()["pid"],
    )
    assert (two["signal"], two["pty"], two["id"]) == (b"KILL", b"1", clients[1].id.hex().encode())
    for client in clients:
        client.close()


def listing(guest: Guest) -> list[dict[str, bytes]]:
    client = Client(guest).open(("kind", "list"))
    assert client.wait(EXIT) == {"code": b"0"}
    client.close()
    return sorted(client.items(), key=lambda item: item["attached"], reverse=True)


@root
def test_another_user(guest: Guest) -> None:
    nobody = pwd.getpwnam("nobody")
    client = run(guest, "sh", "-c", "id -u; id -g; id -G; echo $HOME $USER $LOGNAME; pwd", user="nobody")
    groups = os.getgrouplist("nobody", nobody.pw_gid)
    assert client.output[1].decode().splitlines() == [
        str(nobody.pw_uid),
        str(nobody.pw_gid),
        " ".join(str(each) for each in groups),
        f"{nobody.pw_dir} nobody nobody",
        nobody.pw_dir if Path(nobody.pw_dir).is_dir() else "/",
    ]
    assert client.opened()["user"] == b"nobody"


@root
def test_another_user_s_terminal(guest: Guest) -> None:
    client = run(guest, "sh", "-c", "stat -c '%u %a' $(tty)", user="nobody", pty=1)
    assert client.output[1].split() in ([b"65534", b"620"], [b"65534", b"600"])
    client = Client(guest).process("sleep", "100", user="nobody")
    client.opened()
    client.send(SIGNAL, b"TERM")
    assert client.finish() == {"signal": b"TERM"}
    client.close()


@root
def test_only_root_becomes_somebody_else() -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    guest = Guest(Path("/tmp"), python=(*nobody, "/usr/bin/python3", "-I", "-S"))
    guest.start()
    client = Client(guest).process("id", "-u", user="nobody")
    assert client.finish() == {"code": b"0"}
    assert client.output[1] == b"65534\n"
    client.close()
    client = Client(guest).process("id", user="root")
    assert client.wait(ERROR)["kind"] == b"permission"
    client.close()
    guest.check_clean()
    guest.stop()
    guest.path.unlink()


# -- terminals


def test_a_login_shell(guest: Guest) -> None:
    client = Client(guest).process(pty=1, term="xterm-256color", cols=91, rows=17)
    client.input(b"echo $0:$TERM:$(stty size); exit 5\r")
    assert client.finish() == {"code": b"5"}
    # The first character of argv[0] says that it is a login shell.
    assert re.search(rb"-\w+:xterm-256color:17 91\r\n", client.output[1])
    assert client.opened()["tty"].startswith(b"/dev/pts/")
    client.close()


def test_a_login_shell_without_a_terminal(guest: Guest) -> None:
    client = Client(guest).process()
    client.input(b"echo $0; exit 4\n")
    assert client.finish() == {"code": b"4"}
    assert client.output[1].startswith(b"-")
    client.close()


def test_resizes_are_seen(guest: Guest) -> None:
    client = Client(guest).process("bash", "-c", "trap 'stty size' WINCH; echo ready; while :; do sleep 0.02; done", pty=1)
    client.wait_output(b"ready")
    client.send(RESIZE, struct.pack(">4H", 132, 43, 0, 0))
    client.wait_output(b"43 132\r\n")
    client.close()


def test_modes_of_the_terminal(guest: Guest) -> None:
    modes = b"".join(
        struct.pack(">BI", opcode, value)
        for opcode, value in ((1, 24), (2, 255), (5, 26), (53, 0), (51, 0), (36, 0), (42, 0), (72, 0), (129, 9600), (77, 1))
    )
    client = run(guest, "stty", "-a", pty=1, modes=modes + b"\0")
    words = client.output[1].decode().replace(";", " ; ").split()
    assert {"-echo", "-icanon", "-icrnl", "-iutf8", "-onlcr", "9600"} <= set(words)
    text = client.output[1].decode()
    assert "intr = ^X;" in text
    assert "quit = <undef>;" in text
    assert "eof = ^Z;" in text


def test_a_signal_goes_to_the_foreground(guest: Guest) -> None:
    client = Client(guest).process("bash", "-ic", "sleep 100; echo after $?", pty=1)
    pid = int(client.opened()["pid"])
    until(lambda: Path(f"/proc/{pid}/task/{pid}/children").read_text().strip())
    # The sleep's group has the terminal.
    until(lambda: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[5]) != pid)
    client.send(SIGNAL, b"TERM")
    client.wait_output(b"after 143")
    assert client.finish()["code"] in (b"0", b"143")
    client.close()


def test_the_interrupt_character(guest: Guest) -> None:
    client = Client(guest).process("sh", "-c", "echo ready; exec sleep 100", pty=1)
    client.wait_output(b"ready")
    client.input(b"\x03")
    assert client.finish() == {"signal": b"INT"}
    client.close()


@pytest.mark.parametrize("data", [b"whole line\n", b"part of a line"])
def test_the_end_of_input_at_a_terminal(guest: Guest, data: bytes) -> None:
    client = Client(guest).process("sh", "-c", "stty -echo; echo ready; wc -c", pty=1)
    client.wait_output(b"ready")
    client.input(data)
    client.send(INPUT_EOF)
    assert client.finish() == {"code": b"0"}
    assert client.output[1].split() == [b"ready", b"%d" % len(data)]
    client.close()


def test_a_terminal_ends_with_its_leader(guest: Guest) -> None:
    """All of the leader's output comes, although somebody else holds the terminal."""
    client = Client(guest).process("sh", "-c", "(trap '' HUP; sleep 3) & seq 20000", pty=1)
    assert client.finish() == {"code": b"0"}
    assert client.output[1].split()[-1] == b"20000"
    assert len(client.output[1].split()) == 20000
    client.close()


def test_all_output_of_a_terminal_comes_to_a_slow_client(guest: Guest) -> None:
    client = Client(guest, window=5000)
    client.auto_grant = False
    client.process("seq", "3000", pty=1)
    client.wait_until(lambda: client.allowed[1] == 0)
    client.auto_grant = True
    client.grant(1, 5000)
    client.finish()
    assert client.output[1].split() == [b"%d" % each for each in range(1, 3001)]
    client.close()


def test_a_terminal_whose_output_nobody_reads(guest: Guest, tmp_path: Path) -> None:
    done = tmp_path / "done"
    client = Client(guest).process("sh", "-c", f"echo ready; read x; seq 100000; touch {done}", pty=1)
    client.wait_output(b"ready")
    client.send(STOP_OUTPUT, b"\x01")
    client.input(b"\r")
    assert client.finish() == {"code": b"0"}
    assert done.exists()
    client.close()


def test_closing_a_terminal_hangs_up(guest: Guest) -> None:
    client = Client(guest).process("bash", "-ic", "echo ready; sleep 100", pty=1)
    client.wait_output(b"ready")
    pid = int(client.opened()["pid"])
    client.send(CLOSE)
    until(lambda: gone(pid))
    client.cut()


def test_no_output_without_a_grant(guest: Guest) -> None:
    client = Client(guest, window=100_000)
    client.auto_grant = False
    client.process("head", "-c", "1000000", "/dev/zero")
    client.wait_until(lambda: client.allowed[1] == 0)
    assert client.find(EXIT) is None
    assert client.opened()
    client.grant(1, 900_000)
    client.finish()  # the end needs no credit
    assert len(client.output[1]) == 1_000_000
    client.close()

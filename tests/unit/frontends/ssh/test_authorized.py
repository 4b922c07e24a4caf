"""Lines of authorized_keys."""

from __future__ import annotations

import asyncssh
import pytest

from gatewayd.frontends.ssh.authorized import (
    PERMIT_LISTEN,
    PERMIT_OPEN,
    UNIX,
    AuthorizedKeys,
    expiry_time,
    parse_line,
    parse_lines,
)

KEY = asyncssh.generate_private_key("ssh-ed25519")
PUBLIC = KEY.export_public_key().decode().strip()
ALL = {f"no-{name}": True for name in ("pty", "port-forwarding", "agent-forwarding", "X11-forwarding", "user-rc")}


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ("", {}),
        ('command="a \\"b\\" \\n c, d"', {"command": 'a "b" \\n c, d'}),
        ("no-pty,NO-x11-forwarding", {"no-pty": True, "no-X11-forwarding": True}),
        ("restrict", ALL),
        ("restrict,pty,Port-Forwarding", ALL | {"no-pty": False, "no-port-forwarding": False}),
        ("pty,restrict", ALL),
        ('environment="A=1",environment="A=2",environment="B="', {"environment": {"A": "1", "B": ""}}),
        ('no-touch-required,tunnel="1"', {"no-touch-required": True}),
    ],
)
def test_options(options: str, want: dict[str, object]) -> None:
    line = parse_line(f'{options}\t {PUBLIC} cömment, with "quotes'.strip())
    assert line.key == KEY.convert_to_public()
    assert line.options == want


@pytest.mark.parametrize(
    "options",
    [
        "unknown",
        "ptyx",
        'unknown="x"',
        "verify-required",
        "no-restrict",
        "no-cert-authority",
        "command",
        "command=x",
        'command="x',
        'command="x\\"',
        'command="x"y',
        'command="x",command="x"',
        'restrict="yes"',
        "pty,",
        ",pty",
        "pty,,restrict",
        "pty, restrict",
        'from=""',
        'from="a",from="b"',
        'principals=","',
        'environment="A"',
        'environment="A B=c"',
        'tunnel="x"',
        'permitopen="80"',
        'permitopen="host:0"',
        'permitopen="host:65536"',
        'permitlisten="host:x"',
        'expiry-time="19990101x"',
        'expiry-time="2020"',
        'expiry-time="20201301"',
        'expiry-time="20200101250000"',
        'expiry-time="20200101 120000"',
        'expiry-time=""',
    ],
)
def test_what_is_not_understood_is_refused(options: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_line(f"{options} {PUBLIC}")


def test_the_other_lines_of_a_file_hold() -> None:
    good, bad = parse_lines(f"# keys\n\n  {PUBLIC}\r\nfuture-option {PUBLIC}\nno-pty {PUBLIC}\nssh-ed25519 AAAA\n")
    assert [line.number for line in good] == [3, 5]
    assert len(bad) == 2
    assert bad[0] == "line 4: unknown option future-option"


def test_forwards() -> None:
    line = parse_line(
        f'permitopen="localhost:80",permitopen="[::1]:*",permitopen="*:443",permitlisten="8000",permitlisten="a:9" {PUBLIC}'
    )
    to, on = line.options[PERMIT_OPEN], line.options[PERMIT_LISTEN]
    allowed = [("localhost", 80), ("::1", 7), ("other", 443)]
    assert all(to.allow(*pair) for pair in allowed)
    assert not any(to.allow(*pair) for pair in [("localhost", 81), ("127.0.0.1", 80), ("/run/x", UNIX), ("*", UNIX)])
    assert on.allow("anything", 8000)
    assert on.allow("a", 9)
    assert not on.allow("b", 9)


def test_expiry_times() -> None:
    assert expiry_time("20200101Z") == 1577836800
    assert expiry_time("202001010130Z") == 1577836800 + 5400
    assert expiry_time("20200101013059UTC") == 1577836800 + 5459
    assert abs(expiry_time("20200101") - 1577836800) <= 14 * 3600  # of this machine's zone
    line = parse_line(f'expiry-time="20300101Z",expiry-time="20200101Z" {PUBLIC}')
    assert line.valid_before == 1577836800


def test_who_comes_in() -> None:
    lines, _ = parse_lines(
        f'expiry-time="20200101Z",command="first" {PUBLIC}\nfrom="10.0.0.0/8,!10.1.*",command="second" {PUBLIC}\n'
        f'cert-authority,principals="ada,bob",command="third" {PUBLIC}\n'
    )
    now = 0.0
    keys = AuthorizedKeys(lines, lambda: now)
    public = KEY.convert_to_public()

    def command(address: str, principals: list[str] | None = None, ca: bool = False) -> object:
        options = keys.validate(public, "", address, principals, ca)
        return options and options["command"]

    assert command("192.0.2.1") == "first"
    now = 1577836799
    assert command("192.0.2.1") == "first"
    now = 1577836800
    assert command("192.0.2.1") is None
    assert command("10.2.0.1") == "second"
    assert command("10.1.0.1") is None
    assert command("") is None
    assert command("192.0.2.1", ["x", "bob"], True) == "third"
    assert command("192.0.2.1", ["*"], True) is None
    assert keys.validate(asyncssh.generate_private_key("ssh-ed25519").convert_to_public(), "", "10.2.0.1") is None

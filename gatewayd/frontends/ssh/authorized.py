"""The lines of an authorized_keys file, read as strictly as sshd(8) does: an option that is not understood spoils its line.

asyncssh keeps what it does not know as a flag that nobody asks for; so it gets options only in the form that it obeys.
"""

from __future__ import annotations

import calendar
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncssh
from asyncssh.misc import ip_address
from asyncssh.pattern import HostPatternList

from gatewayd.errors import printable

log = logging.getLogger(__name__)

PERMISSIONS = ("pty", "port-forwarding", "agent-forwarding", "X11-forwarding", "user-rc")  # what `restrict` takes away
PERMIT_OPEN, PERMIT_LISTEN = "gatewayd permitopen", "gatewayd permitlisten"  # keys of options: a Permits
UNIX = -1  # the port of a Unix socket: no pair of permitopen= or permitlisten= is about one
LINE_MAX = 65536  # characters
_FLAGS = {name.lower(): name for name in PERMISSIONS}
_TIME = re.compile(r"(\d{4})(\d\d)(\d\d)(?:(\d\d)(\d\d)(\d\d)?)?(Z|z|UTC)?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9_]+")
_OPTION = re.compile(r'([A-Za-z0-9-]+)(?:="((?:\\"|[^"\\]|\\(?!"))*)")?(?=([, \t]|$))')
_KEY = re.compile(r"([a-z0-9@.-]+[ \t]+[A-Za-z0-9+/=]+)(?:[ \t].*)?", re.DOTALL)


@dataclass(frozen=True)
class Permits:
    """Where a key may forward to, or listen: pairs of host ("*": any) and port (None: any)."""

    pairs: frozenset[tuple[str, int | None]] = frozenset()

    def allow(self, host: str, port: int) -> bool:
        """Whether one pair fits. No names are looked up, as sshd does it."""
        return port != UNIX and any(known in ("*", host) and number in (None, port) for known, number in self.pairs)


@dataclass
class Line:
    """One key, and what it may."""

    number: int  # in its file, from 1
    key: asyncssh.SSHKey = field(init=False)  # set by parse_line
    authority: bool = False  # it signs the keys of others
    peers: HostPatternList | None = None  # from=; None: from anywhere
    principals: frozenset[str] | None = None  # of certificates; None: the user name
    valid_before: float | None = None  # Unix time
    options: dict[str, Any] = field(default_factory=dict)  # as asyncssh obeys them, and PERMIT_OPEN, PERMIT_LISTEN

    def refuses(self, host: str, address: str, principals: Sequence[str] | None, now: float) -> str:
        """Why a client that has the key, or a certificate of it, may not come in; "" when it may."""
        if self.valid_before is not None and now >= self.valid_before:
            return "it has expired"
        if self.peers is not None and not (address and self.peers.matches(host, address, ip_address(address))):
            return f"not from {printable(address, 64)}"
        if principals is not None and self.principals is not None and self.principals.isdisjoint(principals):
            return "no principal of the certificate is permitted"
        return ""


class AuthorizedKeys(asyncssh.SSHAuthorizedKeys):
    """What asyncssh asks about the keys of clients."""

    def __init__(self, lines: Sequence[Line] = (), clock: Callable[[], float] = time.time) -> None:
        """`clock`: Unix time."""
        super().__init__()
        self._lines = list(lines)
        self._clock = clock

    def validate(
        self,
        key: asyncssh.SSHKey,
        client_host: str,
        client_addr: str,
        cert_principals: Sequence[str] | None = None,
        ca: bool = False,
    ) -> Mapping[str, object] | None:
        """The options of the first line that lets the client in. None: there is none."""
        for line in self._lines:
            if line.authority == ca and line.key == key:
                because = line.refuses(client_host, client_addr, cert_principals, self._clock())
                if not because:
                    return line.options
                log.info("ssh: the key in line %d of the authorized keys is refused: %s", line.number, because)
        return None

    def validate_x509(self, *_: Any) -> tuple[None, None]:
        """sshd knows no such certificates."""
        return None, None


def parse_lines(text: str) -> tuple[list[Line], list[str]]:
    """The lines that can be used, and what is wrong with the others, naming the line."""
    good, bad = [], []
    for number, text_line in enumerate(text.split("\n"), 1):
        stripped = text_line.strip()
        if stripped and not stripped.startswith("#"):
            try:
                good.append(parse_line(stripped, number))
            except ValueError as exc:
                bad.append(f"line {number}: {printable(exc, 200)}")
    return good, bad


def parse_line(text: str, number: int = 1) -> Line:
    """``[options] type base64 [comment]``. Raises ValueError."""
    if len(text) > LINE_MAX:
        raise ValueError(f"longer than {LINE_MAX} characters")
    line = Line(number)
    if (key := _key(text)) is None:
        rest = len(text)
        seen: set[str] = set()
        for name, value, rest in _options(text):  # noqa: B007 - where the last one ends
            _apply(line, name, value, seen)
        key = _key(text[rest:].strip())
        if key is None:
            raise ValueError("no public key after the options")
    line.key = key
    if line.principals is not None:
        line.options["principals"] = True  # asyncssh then leaves principals to us
    return line


def _key(text: str) -> asyncssh.SSHKey | None:
    found = _KEY.fullmatch(text)
    try:
        return asyncssh.import_public_key(found[1]) if found else None
    except (ValueError, asyncssh.KeyImportError):
        return None


def _options(text: str) -> Iterator[tuple[str, str | None, int]]:
    """Name, value (None: a flag) and the index after it, up to the first blank outside of quotes."""
    at = 0
    while True:
        found = _OPTION.match(text, at)
        if found is None:
            raise ValueError(f"neither a key nor an option: {printable(text[at : at + 40])!r}")
        name, value, then = found.groups()
        yield name, None if value is None else value.replace('\\"', '"'), found.end()
        if then != ",":
            return
        at = found.end() + 1


def _apply(line: Line, name: str, value: str | None, seen: set[str]) -> None:
    """Put one option into a line. Names are not case-sensitive. Raises ValueError."""
    wanted = name.lower()
    if value is None:
        _apply_flag(line, wanted, name)
    elif wanted in _VALUES:
        handler, often = _VALUES[wanted]
        if wanted in seen and not often:
            raise ValueError(f"option {wanted} more than once")
        handler(line, value)
    else:
        raise ValueError(f"unknown option {name}=")
    seen.add(wanted)


def _apply_flag(line: Line, wanted: str, name: str) -> None:
    positive = wanted.removeprefix("no-")
    if wanted == "restrict":
        line.options |= {f"no-{permission}": True for permission in PERMISSIONS}
    elif wanted == "cert-authority":
        line.authority = True
    elif wanted == "no-touch-required":
        line.options[wanted] = True
    elif positive in _FLAGS:
        line.options[f"no-{_FLAGS[positive]}"] = wanted != positive
    elif wanted == "verify-required":
        raise ValueError("option verify-required, which this server cannot check")
    else:
        raise ValueError(f"unknown option {name}")


def _command(line: Line, value: str) -> None:
    line.options["command"] = value


def _environment(line: Line, value: str) -> None:
    name, equals, content = value.partition("=")
    if not equals or _NAME.fullmatch(name) is None:
        raise ValueError("environment= wants NAME=value")
    line.options.setdefault("environment", {}).setdefault(name, content)  # the first one counts


def _from(line: Line, value: str) -> None:
    if not value.strip():
        raise ValueError("from= is empty")
    line.peers = HostPatternList(value)


def _principals(line: Line, value: str) -> None:
    line.principals = frozenset(name.strip() for name in value.split(",") if name.strip())
    if not line.principals:
        raise ValueError("principals= is empty")


def _expiry(line: Line, value: str) -> None:
    moment = expiry_time(value)
    line.valid_before = moment if line.valid_before is None else min(moment, line.valid_before)


def expiry_time(value: str) -> float:
    """``YYYYMMDD[HHMM[SS]]``, of this machine's zone or, with a Z behind it, UTC: Unix time. Raises ValueError."""
    found = _TIME.fullmatch(value)
    if found is None:
        raise ValueError("expiry-time= wants YYYYMMDD[HHMM[SS]][Z]")
    *parts, zone = found.groups()
    try:
        moment = time.strptime(" ".join(part or "00" for part in parts), "%Y %m %d %H %M %S")
        return float(calendar.timegm(moment)) if zone else time.mktime((*moment[:8], -1))
    except (ValueError, OverflowError) as exc:
        raise ValueError("expiry-time= is no moment") from exc


def _permit(line: Line, option: str, name: str, value: str, default: str = "") -> None:
    host, colon, port = value.rpartition(":")
    if not colon:
        host = default
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not host or not (port == "*" or (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536)):
        raise ValueError(f"{name}= wants {'[HOST:]' if default else 'HOST:'}PORT")
    pair = (host, None if port == "*" else int(port))
    line.options[option] = Permits(line.options.get(option, Permits()).pairs | {pair})


def _permit_open(line: Line, value: str) -> None:
    _permit(line, PERMIT_OPEN, "permitopen", value)


def _permit_listen(line: Line, value: str) -> None:
    _permit(line, PERMIT_LISTEN, "permitlisten", value, "*")


def _tunnel(line: Line, value: str) -> None:
    """Restricts what nobody gets here."""
    if not (value.isascii() and value.isdigit()):
        raise ValueError("tunnel= wants a number")


_VALUES: dict[str, tuple[Callable[[Line, str], None], bool]] = {  # handler, and whether the option may come again
    "command": (_command, False),
    "environment": (_environment, True),
    "expiry-time": (_expiry, True),
    "from": (_from, False),
    "permitlisten": (_permit_listen, True),
    "permitopen": (_permit_open, True),
    "principals": (_principals, False),
    "tunnel": (_tunnel, False),
}

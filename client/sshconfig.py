"""What `ssh-setup` writes below ~/.ssh, and how it is undone.

::

    ~/.ssh/config                one line more, the first: Include …/gatewayd/config
    ~/.ssh/gatewayd/config       a header, and one block per sandbox
    ~/.ssh/gatewayd/known_hosts  the host keys, under the name of the block

Everything is bytes here: what is not ours is kept byte for byte. The header remembers how ~/.ssh/config looked before
(`Origin`), so that removing the last block restores it exactly.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from client import atomic
from client.proxy import Failure
from gatewayd.api import ErrorKind

DIRECTORY = "gatewayd"  # below ~/.ssh
CONFIG_MAX = 4 << 20  # bytes; a larger ssh configuration is none
HEADER = b"# Written by `sandbox ssh-setup`, one block per sandbox; a block is replaced as a whole.\n"
ORIGIN = b"# ssh-config: "  # the second line of the header, followed by an Origin
AUTHORIZED = b"# authorized: "  # in a block: a key that ssh-setup added inside the sandbox
PROFILE = b"# profile: "  # in a block: the profile under which the sandbox was found


class Origin:
    """How ~/.ssh/config looked before our line came."""

    ALL = "made with ~/.ssh"  # not even ~/.ssh: remove that, too, when it is empty
    MADE = "made"  # there was none: remove it when it is empty again
    ADDED = "added"  # it was there without our line: take the line out
    PRESENT = "present"  # somebody had written our line: leave it


@dataclass(frozen=True)
class Entry:
    """One sandbox, as ssh shall know it."""

    name: str  # the sandbox's
    user: str  # login name inside
    host_keys: Sequence[str]  # "TYPE BASE64", checked
    proxy: Sequence[str]  # the ProxyCommand's words
    identity: Path | None = None  # IdentityFile; None: whatever the agent offers
    authorized: Sequence[str] = field(default=())  # key lines that were added inside, to be taken out again
    profile: str = ""  # the profile under which it was found, for taking them out

    @property
    def host(self) -> str:
        """What the user types after ``ssh``; also the HostKeyAlias."""
        return f"sandbox-{self.name}"


class SshConfig:
    """~/.ssh of one home directory."""

    def __init__(self, home: Path, *, tilde: bool = True) -> None:
        self.ssh = home / ".ssh"
        self.main = self.ssh / "config"
        self.own = self.ssh / DIRECTORY
        self.config = self.own / "config"
        self.known_hosts = self.own / "known_hosts"
        self.tilde = tilde  # whether ssh's own ~ is `home`; else paths are written in full

    @property
    def include(self) -> bytes:
        """The line in ~/.ssh/config.

        Raises:
            Failure: ``config`` for a path that it cannot express.
        """
        if self.tilde:
            return f"Include ~/.ssh/{DIRECTORY}/config\n".encode()
        if any(bad in str(self.config) for bad in "%?*["):  # patterns, and from OpenSSH 9.9 on tokens: they cannot be escaped
            raise Failure(ErrorKind.CONFIG, f"cannot use {str(self.config)!r} in an ssh configuration")
        return f"Include {_quoted(self.config)}\n".encode()

    # --- what the files say --------------------------------------------------------------------------

    def render(self, entry: Entry) -> bytes:
        """The block of `entry`.

        Raises:
            Failure: ``config`` for a path that an ssh configuration cannot express.
        """
        # ssh expands % and hands the line to the user's shell.
        command = " ".join(shlex.quote(word) for word in entry.proxy).replace("%", "%%")
        if not command.isprintable():
            raise Failure(ErrorKind.CONFIG, f"cannot use {entry.proxy!r} in an ssh configuration")
        lines = [f"Host {entry.host}", f"User {entry.user}", f"HostKeyAlias {entry.host}"]
        lines += [f"UserKnownHostsFile {_quoted(self.known_hosts)}", "StrictHostKeyChecking yes", "CheckHostIP no"]
        if entry.identity is not None:
            lines += [f"IdentityFile {_quoted(entry.identity)}", "IdentitiesOnly yes"]
        lines += [f"ProxyCommand {command}", "ProxyUseFdpass yes"]
        begin, end = _marks(entry.name)
        notes = [AUTHORIZED.decode() + key for key in entry.authorized]
        if entry.profile:
            notes.insert(0, PROFILE.decode() + entry.profile)
        body = [*notes, lines[0], *(f"    {line}" for line in lines[1:])]
        return begin + "".join(f"{line}\n" for line in body).encode() + end

    def known_lines(self, entry: Entry) -> bytes:
        """The lines of known_hosts for `entry`."""
        return "".join(f"{entry.host} {' '.join(key.split()[:2])}\n" for key in entry.host_keys).encode()

    def authorized(self, name: str) -> list[str]:
        """The key lines that ssh-setup has added inside sandbox `name`."""
        return self._notes(name, AUTHORIZED)

    def profile(self, name: str) -> str:
        """The profile that the block of sandbox `name` was made with, or ""."""
        return next(iter(self._notes(name, PROFILE)), "")

    def _notes(self, name: str, mark: bytes) -> list[str]:
        block = _find(self._read(self.config) or b"", name, self.config)[1]
        return [line[len(mark) :].decode().strip() for line in block.splitlines() if line.startswith(mark)]

    def has(self, name: str) -> bool:
        """Whether there is a block for sandbox `name`."""
        return bool(_find(self._read(self.config) or b"", name, self.config)[1])

    # --- changing them -------------------------------------------------------------------------------

    def add(self, entry: Entry) -> None:
        """Write or replace what concerns `entry`. Doing it twice changes nothing.

        Raises:
            Failure: ``config``; a file cannot be read, written or understood. What was written before that is harmless.
        """
        block, include = self.render(entry), self.include
        fresh = not self.ssh.exists()
        with self._files():
            main = self._read(self.main)
            text = self._read(self.config)
            self.own.mkdir(mode=0o700, exist_ok=True)
            known = self._read(self.known_hosts) or b""
            self._write(self.known_hosts, _with_host(known, entry.host, self.known_lines(entry)), known)
            before, old, after = _find(_with_origin(text, self._origin(main, text, fresh)), entry.name, self.config)
            if not old and before and not before.endswith(b"\n"):
                before += b"\n"
            self._write(self.config, before + block + after, text)
            if not _includes(main or b"", include):
                atomic.replace(self._target(), include + (main or b""))

    def remove(self, name: str) -> bool:
        """Take out what concerns sandbox `name`; with the last one, everything. Returns whether there was anything.

        Raises:
            Failure: as for `add`.
        """
        if not self.own.is_dir():
            return False
        with self._files():
            text = self._read(self.config) or b""
            before, old, after = _find(text, name, self.config)
            known = self._read(self.known_hosts) or b""
            known_left = _with_host(known, f"sandbox-{name}", b"")
            left = before + after
            found = bool(old) or known_left != known
            if left.strip() and _body(left).strip():
                self._write(self.config, left, text)
                self._write(self.known_hosts, known_left, known)
                return found
            origin = _origin_of(text)
            self._restore_main(origin)  # first: a crash after this loses nothing, a crash after the rest would lose the origin
            for path, rest in ((self.config, b""), (self.known_hosts, known_left)):
                if not rest.strip():
                    path.unlink(missing_ok=True)
            with suppress(OSError):  # something of the user's is in it
                self.own.rmdir()
            atomic.sync_dir(self.ssh)
        if origin == Origin.ALL:
            with suppress(OSError):  # it is not empty
                self.ssh.rmdir()
        return found

    def _restore_main(self, origin: str) -> None:
        main = self._read(self.main)
        if main is None or origin == Origin.PRESENT:
            return
        rest = _without_include(main, self.include)
        if origin in (Origin.ALL, Origin.MADE) and not rest:
            self._target().unlink()
        elif rest != main:
            atomic.replace(self._target(), rest)

    def _origin(self, main: bytes | None, text: bytes | None, fresh: bool) -> str:
        """What the header shall say: once recorded it stays, unless our line has gone meanwhile."""
        recorded = _origin_of(text) if text else ""
        if fresh:
            return Origin.ALL
        if main is None:
            return recorded if recorded in (Origin.ALL, Origin.MADE) else Origin.MADE
        if _includes(main, self.include):
            return recorded or Origin.PRESENT
        return recorded if recorded in (Origin.ALL, Origin.MADE) and not main else Origin.ADDED

    # --- files ---------------------------------------------------------------------------------------

    @contextmanager
    def _files(self) -> Iterator[None]:
        """One writer at a time; failures of the file system become failures for the user."""
        try:
            self.ssh.mkdir(mode=0o700, exist_ok=True)
            with atomic.locked(self.ssh):
                yield
        except OSError as exc:
            what = exc.filename or self.ssh
            raise Failure(ErrorKind.CONFIG, f"cannot change {what}: {exc.strerror or exc}") from exc

    def _target(self) -> Path:
        """~/.ssh/config, or what it links to."""
        return Path(os.path.realpath(self.main))

    def _read(self, path: Path) -> bytes | None:
        """The content of a file of text, None if there is no such file.

        Raises:
            Failure: ``config`` for anything else.
        """
        try:
            if path.exists() and not path.is_file():
                raise Failure(ErrorKind.CONFIG, f"cannot use {path}: it is not a file")
            with path.open("rb") as file:
                data = file.read(CONFIG_MAX + 1)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise Failure(ErrorKind.CONFIG, f"cannot read {path}: {exc.strerror}") from exc
        if len(data) > CONFIG_MAX:
            raise Failure(ErrorKind.CONFIG, f"cannot use {path}: it is larger than {CONFIG_MAX >> 20} MiB")
        try:
            data.decode()
        except UnicodeDecodeError as exc:
            raise Failure(ErrorKind.CONFIG, f"cannot use {path}: byte {exc.start} is not UTF-8 text") from None
        if b"\0" in data:
            raise Failure(ErrorKind.CONFIG, f"cannot use {path}: it is not text")
        return data

    def _write(self, path: Path, data: bytes, before: bytes | None) -> None:
        if data != before:
            atomic.replace(path, data, 0o600)


def _marks(name: str) -> tuple[bytes, bytes]:
    return f"# begin sandbox-{name}\n".encode(), f"# end sandbox-{name}\n".encode()


def _find(text: bytes, name: str, path: Path) -> tuple[bytes, bytes, bytes]:
    """`text` as what stands before the block of `name`, the block, and what follows; without a block, all of it stands before.

    Raises:
        Failure: ``config``; the block has no end.
    """
    begin, end = _marks(name)
    start = 0 if text.startswith(begin) else text.find(b"\n" + begin) + 1
    if not start and not text.startswith(begin):
        return text, b"", b""
    stop = text.find(b"\n" + end, start)
    if stop < 0:
        marks = (mark.decode().strip() for mark in (begin, end))
        raise Failure(ErrorKind.CONFIG, "cannot use {}: the line {!r} has no {!r} after it".format(path, *marks))
    stop += 1 + len(end)
    return text[:start], text[start:stop], text[stop:]


def _body(text: bytes) -> bytes:
    """`text` without the header."""
    lines = text.splitlines(keepends=True)
    return b"".join(line for line in lines if line != HEADER and not line.startswith(ORIGIN))


def _origin_of(text: bytes) -> str:
    for line in text.splitlines():
        if line.startswith(ORIGIN):
            return line[len(ORIGIN) :].decode().strip()
    return Origin.ADDED


def _with_origin(text: bytes | None, origin: str) -> bytes:
    """`text` with a header that says `origin`; the rest stays as it is."""
    line = ORIGIN + origin.encode() + b"\n"
    if not text:
        return HEADER + line
    lines = text.splitlines(keepends=True)
    for number, old in enumerate(lines):
        if old.startswith(ORIGIN):
            lines[number] = line
            return b"".join(lines)
    return HEADER + line + text


def _global_lines(main: bytes) -> Iterator[tuple[int, bytes]]:
    """Start and text of each line before the first Host or Match: only these are read for every host."""
    start = 0
    for line in main.splitlines(keepends=True):
        words = line.replace(b"=", b" ").split(maxsplit=1)
        if words and words[0].lower() in (b"host", b"match"):
            return
        yield start, line
        start += len(line)


def _includes(main: bytes, include: bytes) -> bool:
    return any(line.strip() == include.strip() for _, line in _global_lines(main))


def _without_include(main: bytes, include: bytes) -> bytes:
    for start, line in _global_lines(main):
        if line.strip() == include.strip():
            return main[:start] + main[start + len(line) :]
    return main


def _with_host(known: bytes, host: str, lines: bytes) -> bytes:
    """known_hosts with `lines` in the place of those of `host`, or at its end."""
    kept: list[bytes] = []
    place = -1
    for line in known.splitlines(keepends=True):
        if line.split(maxsplit=1)[:1] != [host.encode()]:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
        elif place < 0:
            place = len(kept)
    kept.insert(place if place >= 0 else len(kept), lines)
    return b"".join(kept)


def _quoted(path: Path) -> str:
    """`path` as one word of an ssh configuration.

    Raises:
        Failure: ``config``; ssh offers no way to write it.
    """
    text = str(path)
    if not text.isprintable() or any(bad in text for bad in ('"', "\\", "${")):
        raise Failure(ErrorKind.CONFIG, f"cannot use {text!r} in an ssh configuration")
    return f'"{text.replace("%", "%%")}"' if any(c in text for c in " '#=,") else text.replace("%", "%%")

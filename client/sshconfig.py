"""What `ssh-setup` writes below ~/.ssh, and how it is undone.

::

    ~/.ssh/config                one line more, the first: Include …/gatewayd/config
    ~/.ssh/gatewayd/config       a header, and the blocks (`client.sshblocks`)
    ~/.ssh/gatewayd/known_hosts  the host keys: the gateway's, and those of sandboxes that are reached directly

With ``--inline`` a copy of the blocks stands in ~/.ssh/config in the place of the line, for programs that know no Include.

Everything is bytes here: what is not ours is kept byte for byte, and removing the last block restores ~/.ssh/config exactly
(`client.sshorigin`). Each change is worked out whole before the first file is written; each file is replaced atomically; what a
crash leaves behind in between is harmless, and the same command once more completes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from client import atomic, sshblocks, sshtext
from client.proxy import Failure
from client.sshblocks import ANY, AUTHORIZED, PROFILE, Entry, Gateway
from client.sshorigin import HEADER, Origin, body, origin_of, with_origin
from client.sshtext import unusable
from gatewayd.api import SSH_PREFIX, ErrorKind

DIRECTORY = "gatewayd"  # below ~/.ssh
CONFIG_MAX = 4 << 20  # bytes; a larger ssh configuration is none
INLINE = "gatewayd"  # label of the copy in ~/.ssh/config


@dataclass(frozen=True)
class Change:
    """One file before and after; None: there is none."""

    path: Path  # where it really is: no link
    before: bytes | None
    after: bytes | None
    mode: int | None = None  # permission bits; None: those it has


Texts = tuple[bytes, bytes]  # of gatewayd/config and gatewayd/known_hosts


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
        return f"Include {sshtext.quoted(self.config)}\n".encode()

    # --- what the files say --------------------------------------------------------------------------

    def gateway(self) -> Gateway | None:
        """The block for all sandboxes, if there is one. Raises Failure, ``config``, if it makes no sense."""
        return self._gateway(self._read(self.config) or b"")

    def direct(self) -> list[str]:
        """The sandboxes that have a block of their own."""
        return _direct(self._read(self.config) or b"")

    def has(self, name: str) -> bool:
        """Whether sandbox `name` has one."""
        return name in self.direct()

    def authorized(self, name: str) -> list[str]:
        """The key lines that ssh-setup has added inside sandbox `name`."""
        return sshtext.notes(self._block(name), AUTHORIZED)

    def profile(self, name: str) -> str:
        """The profile that the block of sandbox `name` was made with, or ""."""
        return next(iter(sshtext.notes(self._block(name), PROFILE)), "")

    def _block(self, name: str) -> bytes:
        return sshtext.find(self._read(self.config) or b"", SSH_PREFIX + name, self.config)[1]

    def _gateway(self, text: bytes) -> Gateway | None:
        block = sshtext.find(text, ANY, self.config)[1]
        return Gateway.parse(block, self.config) if block else None

    # --- changing them -------------------------------------------------------------------------------
    # All of these return what they changed; with `dry`, what they would change. Doing the same twice changes nothing.
    # `inline` None: in the manner that is there. They raise Failure, ``config``, when a file cannot be read, written, understood.

    def add(self, entry: Entry, *, inline: bool | None = None, dry: bool = False) -> list[Change]:
        """Write or replace the block of a sandbox that is reached directly."""
        block = entry.render(self.known_hosts)

        def edit(text: bytes, known: bytes) -> Texts:
            gateway = self._gateway(text)
            if gateway is not None:
                text = self._replaced(text, ANY, _without(gateway, entry.name))
            known = sshtext.with_hosts(known, lambda host: host == entry.host, entry.known_lines())
            return self._replaced(text, entry.host, block), known

        return self._change(edit, inline, dry)

    def set_gateway(
        self,
        edit: Callable[[Gateway | None], Gateway],
        host_key: str,
        *,
        name: str | None = None,
        inline: bool | None = None,
        dry: bool = False,
    ) -> list[Change]:
        """Write or replace the block for all sandboxes; `edit` makes the new one from the old one.

        Sandbox `name` is then one of them, even if it had a block of its own.
        """

        def change(text: bytes, known: bytes) -> Texts:
            gateway = edit(self._gateway(text))
            if name is not None:
                text, known = self._replaced(text, SSH_PREFIX + name, b""), _forget(known, name)
            line = sshblocks.gateway_known_line(host_key, ())
            known = sshtext.with_hosts(known, _is_gateway, line)
            return self._replaced(text, ANY, gateway.render(())), known

        return self._change(change, inline, dry)

    def relist(self, edit: Callable[[Gateway], Gateway]) -> list[Change]:
        """Change what the block for all sandboxes lists; without one, nothing."""

        def change(text: bytes, known: bytes) -> Texts:
            gateway = self._gateway(text)
            if gateway is None:
                return text, known
            return self._replaced(text, ANY, edit(gateway).render(())), known

        return self._change(change, None, False) if self.config.exists() else []

    def remove(self, name: str, *, dry: bool = False) -> list[Change]:
        """Take out what concerns sandbox `name`; with the last one that ssh-setup was run for, everything."""

        def edit(text: bytes, known: bytes) -> Texts:
            gateway = self._gateway(text)
            if gateway is not None:
                text = self._replaced(text, ANY, _without(gateway, name))
            return self._replaced(text, SSH_PREFIX + name, b""), _forget(known, name)

        return self._change(edit, None, dry) if self._is_set_up() else []

    def remove_all(self, *, dry: bool = False) -> list[Change]:
        """Take out everything."""

        def edit(text: bytes, known: bytes) -> Texts:
            for label in [ANY, *(SSH_PREFIX + name for name in _direct(text))]:
                text = self._replaced(text, label, b"")
            return text, sshtext.with_hosts(known, lambda host: host.startswith(SSH_PREFIX), b"")

        return self._change(edit, None, dry) if self._is_set_up() else []

    def _is_set_up(self) -> bool:
        return self.own.is_dir() or bool(self._inlined(self._read(self.main) or b"")[1])

    def _replaced(self, text: bytes, label: str, block: bytes) -> bytes:
        """`text` with `block` in the place of the one of `label`. A new one goes before the one for all, or to the end."""
        before, old, after = sshtext.find(text, label, self.config)
        if not old and block and label != ANY:
            before, old, after = sshtext.find(text, ANY, self.config)
            after = old + after
        if block and before and not before.endswith(b"\n"):
            before += b"\n"
        return before + block + after

    def _change(self, edit: Callable[[bytes, bytes], Texts], inline: bool | None, dry: bool) -> list[Change]:
        fresh = not self.ssh.exists()
        if fresh and not inline:
            self.include  # noqa: B018 - a path that cannot be used is told before anything is made
        with nullcontext() if dry else self._files():
            main, text, known = (self._read(path) for path in (self.main, self.config, self.known_hosts))
            new_text, new_known = edit(text or b"", known or b"")
            new_text, new_known = self._settled(new_text, new_known)
            changes = self._plan(main, text, known, new_text, new_known, inline, fresh)
            if not dry:
                self._apply(changes, everything=not body(new_text).strip(), origin=origin_of(text or b""))
        return changes

    def _settled(self, text: bytes, known: bytes) -> Texts:
        """The block and the key of the gateway, with the direct sandboxes left out of them."""
        gateway, direct = self._gateway(text), _direct(text)
        if gateway is None:
            return text, sshtext.with_hosts(known, _is_gateway, b"")
        text = self._replaced(text, ANY, gateway.without_names(direct).render(direct))
        words = [line.decode().split(maxsplit=1) for _, line in sshtext.lines(known)]
        keys = [word[1] for word in words if len(word) > 1 and _is_gateway(word[0])]
        return text, sshtext.with_hosts(known, _is_gateway, sshblocks.gateway_known_line(keys[0], direct) if keys else b"")

    def _plan(
        self,
        main: bytes | None,
        text: bytes | None,
        known: bytes | None,
        new_text: bytes,
        new_known: bytes,
        inline: bool | None,
        fresh: bool,
    ) -> list[Change]:
        """The files that change, in the order in which they are written."""
        config_path, known_path, main_path = (Path(os.path.realpath(path)) for path in (self.config, self.known_hosts, self.main))
        if not body(new_text).strip():
            changes = [
                # The main file first: a crash after this loses nothing, a crash after the rest would lose the origin.
                Change(main_path, main, self._restored(main, origin_of(text or b""))),
                Change(config_path, text, None),
                Change(known_path, known, new_known if new_known.strip() else None, 0o600),
            ]
        else:
            origin = self._origin(main, text, fresh)
            new_text = with_origin(new_text, origin)
            changes = [
                Change(known_path, known, new_known if new_known or known is not None else None, 0o600),
                Change(config_path, text, new_text, 0o600),
                Change(main_path, main, self._led(main or b"", body(new_text), inline, origin)),
            ]
        return [change for change in changes if change.before != change.after]

    def _apply(self, changes: list[Change], *, everything: bool, origin: str) -> None:
        if not everything:
            self.own.mkdir(mode=0o700, exist_ok=True)
        for change in changes:
            if change.after is None:
                change.path.unlink()
            else:
                atomic.replace(change.path, change.after, change.mode)
        if everything:
            with suppress(OSError):  # something of the user's is in it
                self.own.rmdir()
            atomic.sync_dir(self.ssh)
            if origin == Origin.ALL:
                with suppress(OSError):
                    self.ssh.rmdir()

    # --- ~/.ssh/config itself ------------------------------------------------------------------------

    def _inlined(self, main: bytes) -> tuple[bytes, bytes, bytes]:
        """What stands before our copy, the copy, and what follows.

        Raises:
            Failure: ``config``; its marks are damaged, or it has come to stand below a Host or Match, which decides about it.
        """
        before, copy, after = sshtext.find(main, INLINE, self.main)
        if copy:  # else all of it stands before
            for _, line in sshtext.lines(before):
                if sshtext.keyword(line) in (b"host", b"match"):
                    mark = f"# begin {INLINE}"
                    raise unusable(
                        self.main, f"{line.decode().strip()!r} stands before {mark!r}", "move that block to the top of the file"
                    )
        return before, copy, after

    def _led(self, main: bytes, blocks: bytes, inline: bool | None, origin: str) -> bytes:
        """`main` with what makes ssh read our blocks before its own."""
        before, copy, after = self._inlined(main)
        if inline or (inline is None and copy):
            if not copy:
                before, after = b"", self._unlinked(main, origin)
            # The last line opens a section for every host again: what follows stood outside of all sections.
            return before + sshtext.marked(INLINE, HEADER + blocks + b"Host *\n") + after
        main = before + after
        return main if sshtext.includes(main, self.include) else self.include + main

    def _unlinked(self, main: bytes, origin: str) -> bytes:
        """`main` without our line, unless it is not ours."""
        if origin != Origin.PRESENT:
            with suppress(Failure):  # a path that the line cannot express is not in there
                return sshtext.without_include(main, self.include)
        return main

    def _restored(self, main: bytes | None, origin: str) -> bytes | None:
        if main is None:
            return None
        before, _, after = self._inlined(main)
        rest = self._unlinked(before + after, origin)
        return None if origin in (Origin.ALL, Origin.MADE) and not rest else rest

    def _origin(self, main: bytes | None, text: bytes | None, fresh: bool) -> str:
        """What the header shall say: once recorded it stays, unless our line has gone meanwhile."""
        recorded = origin_of(text) if text else ""
        if fresh:
            return Origin.ALL
        if main is None:
            return recorded if recorded in (Origin.ALL, Origin.MADE) else Origin.MADE
        if self._inlined(main)[1]:
            return recorded or Origin.ADDED
        with suppress(Failure):
            if sshtext.includes(main, self.include):
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

    def _read(self, path: Path) -> bytes | None:
        """The content of a file of text, None if there is no such file.

        Raises:
            Failure: ``config`` for anything else.
        """
        try:
            if path.exists() and not path.is_file():
                raise unusable(path, "it is not a file")
            with path.open("rb") as file:
                data = file.read(CONFIG_MAX + 1)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise Failure(ErrorKind.CONFIG, f"cannot read {path}: {exc.strerror}") from exc
        if len(data) > CONFIG_MAX:
            raise unusable(path, f"it is larger than {CONFIG_MAX >> 20} MiB")
        try:
            data.decode()
        except UnicodeDecodeError as exc:
            raise unusable(path, f"byte {exc.start} is not UTF-8 text") from None
        if b"\0" in data:
            raise unusable(path, "it is not text")
        return data


def _direct(text: bytes) -> list[str]:
    names = [label.removeprefix(SSH_PREFIX) for label in sshtext.labels(text) if label.startswith(SSH_PREFIX) and label != ANY]
    return list(dict.fromkeys(names))


def _without(gateway: Gateway, name: str) -> bytes:
    """The block for all when `name` is no longer asked for: b"" with the last one."""
    gateway = gateway.without_names([name])
    if gateway.asked is None:
        return gateway.render(())
    asked = gateway.asked - {name}
    return replace(gateway, asked=asked).render(()) if asked else b""


def _is_gateway(host: str) -> bool:
    return host.split(",")[0] == ANY


def _forget(known: bytes, name: str) -> bytes:
    return sshtext.with_hosts(known, lambda host: host == SSH_PREFIX + name, b"")

"""The blocks of ~/.ssh/gatewayd/config: one for all sandboxes through the gateway, one for each that is reached directly.

::

    # begin sandbox-one             direct: the sandbox's own sshd, with keys of its own
    Host sandbox-one
        …
    # end sandbox-one
    # begin sandbox-*               every other sandbox: the gateway is the ssh server
    # profile: local
    # for: *                        or the names that `ssh-setup NAME` was run for
    Host sandbox-two                known by name, so that programs which list hosts show it
    Host sandbox-three
        # profile: work             found under another profile
        ProxyCommand …
    Host sandbox-* !sandbox-one
        …
    # end sandbox-*
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from client import sshtext
from client.proxy import is_name
from client.sshtext import unusable
from gatewayd.api import SSH_PREFIX, SSH_USER

ANY = f"{SSH_PREFIX}*"  # the pattern, and the label, of the block for all
AUTHORIZED = b"# authorized: "  # in a direct block: a key that ssh-setup added inside the sandbox
PROFILE = b"# profile: "  # the profile under which a sandbox is found
ASKED = b"# for: "  # in the block for all: ALL, or names
ALL = "*"
LISTED_MAX = 1000  # sandboxes that are known by name; every one is reached


@dataclass(frozen=True)
class Entry:
    """One sandbox whose own sshd ssh shall talk to."""

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
        return SSH_PREFIX + self.name

    def render(self, known_hosts: Path) -> bytes:
        """Its block.

        Raises:
            Failure: ``config`` for a path that an ssh configuration cannot express.
        """
        body = [PROFILE.decode() + self.profile] if self.profile else []
        body += [AUTHORIZED.decode() + key for key in self.authorized]
        body += [f"Host {self.host}", f"    User {self.user}", f"    HostKeyAlias {self.host}", *_pinned(known_hosts)]
        if self.identity is not None:
            body += [f"    IdentityFile {sshtext.quoted(self.identity)}", "    IdentitiesOnly yes"]
        body += [f"    ProxyCommand {sshtext.command(self.proxy)}", "    ProxyUseFdpass yes"]
        return sshtext.marked(self.host, _lines(body))

    def known_lines(self) -> bytes:
        """Its lines of known_hosts."""
        return _lines(f"{self.host} {' '.join(key.split()[:2])}" for key in self.host_keys)


@dataclass(frozen=True)
class Gateway:
    """The block for all sandboxes."""

    options: bytes  # the lines below ``Host sandbox-*``
    profile: str = ""  # under which a sandbox is found that is not listed otherwise; "": as the environment says then
    asked: frozenset[str] | None = None  # what ssh-setup was run for; None: for all
    listed: Mapping[str, bytes] = field(default_factory=dict)  # known sandboxes: name → lines below its own Host

    def render(self, direct: Iterable[str]) -> bytes:
        """The block; `direct` are the sandboxes with blocks of their own, to which nothing of this one applies."""
        head = [PROFILE + self.profile.encode()] if self.profile else []
        head.append(ASKED + (ALL if self.asked is None else " ".join(sorted(self.asked))).encode())
        body = b"".join(line + b"\n" for line in head)
        for name in sorted(self.listed):
            body += f"Host {SSH_PREFIX}{name}\n".encode() + self.listed[name]
        others = "".join(f" !{SSH_PREFIX}{name}" for name in sorted(direct))
        return sshtext.marked(ANY, body + f"Host {ANY}{others}\n".encode() + self.options)

    @classmethod
    def parse(cls, block: bytes, path: Path) -> Gateway:
        """What `render` has written.

        Raises:
            Failure: ``config``; it has been changed to something else.
        """
        profile, current, ended = "", "", False
        asked: frozenset[str] | None = None
        parts: dict[str, bytes] = {}  # "": what stands before the first Host; ANY: the block's own options
        for _, line in list(sshtext.lines(block))[1:-1]:
            words = line.decode().split()
            if sshtext.keyword(line) in (b"host", b"match"):
                name = words[1].removeprefix(SSH_PREFIX) if len(words) > 1 else ""
                if ended or words[0] != "Host" or (words[1:2] != [ANY] and (len(words) != 2 or not is_name(name))):
                    raise unusable(path, f"the line {line.decode().strip()!r} is not one of `sandbox ssh-setup`", _HINT)
                ended = words[1] == ANY
                current = ANY if ended else name
                parts[current] = b""
            elif not current and line.startswith(PROFILE):
                profile = line[len(PROFILE) :].decode().strip()
            elif not current and line.startswith(ASKED):
                asked = None if words[2:] == [ALL] else frozenset(words[2:])
            else:
                parts[current] = parts.get(current, b"") + line
        if not ended:
            raise unusable(path, f"its block has no line 'Host {ANY}'", _HINT)
        options = parts.pop(ANY)
        parts.pop("", None)
        return cls(options, profile, asked, parts)

    def with_names(self, profile: str, names: Iterable[str], helper: Sequence[str]) -> Gateway:
        """The sandboxes of `profile` are now exactly `names`."""
        kept = {name: own for name, own in self.listed.items() if self._profile_of(own) != profile}
        return replace(self, listed=_some(kept, {name: self._own(profile, helper) for name in names}))

    def with_name(self, profile: str, name: str, helper: Sequence[str]) -> Gateway:
        """One sandbox more."""
        return replace(self, listed=_some(dict(self.listed), {name: self._own(profile, helper)}))

    def without_names(self, names: Iterable[str], profile: str | None = None) -> Gateway:
        """Some sandboxes fewer; with `profile`, only those that are found under it."""
        gone = {name for name in names if profile is None or self._profile_of(self.listed.get(name, b"")) == profile}
        return replace(self, listed={name: own for name, own in self.listed.items() if name not in gone})

    def moved(self, profile: str, helper: Sequence[str]) -> Gateway:
        """The same sandboxes with `profile` as that of all others: each listed one stays where it was found."""
        listed = {}
        for name, own in self.listed.items():
            found = self._profile_of(own)
            listed[name] = b"" if found == profile else own_options(found, helper)
        return replace(self, profile=profile, listed=listed)

    def _own(self, profile: str, helper: Sequence[str]) -> bytes:
        return b"" if profile == self.profile else own_options(profile, helper)

    def _profile_of(self, own: bytes) -> str:
        found = re.search(rb"^\s*" + PROFILE + rb"(.*)$", own, re.MULTILINE)
        return found[1].decode().strip() if found else self.profile


_HINT = "a block is replaced as a whole: lines of yours belong outside its marks"


def gateway_options(profile: str, helper: Sequence[str], known_hosts: Path) -> bytes:
    """The lines below ``Host sandbox-*``.

    `helper` is the program; what ssh adds to it is %h and not %n, which other programs that read this file do not know. The
    gateway lets its own user in by the socket: ``none`` keeps ssh from asking for the passphrase of a key after a refusal.
    Nothing is said about ControlMaster, ForwardAgent and the like: they are the user's.
    """
    body = [f"    User {SSH_USER}", *_pinned(known_hosts), "    GlobalKnownHostsFile /dev/null", "    UpdateHostKeys no"]
    body += ["    VerifyHostKeyDNS no", "    CanonicalizeHostname no", "    PreferredAuthentications none"]
    return _lines([*body, f"    ProxyCommand {_helper(profile, helper)}", "    ProxyUseFdpass yes"])


def own_options(profile: str, helper: Sequence[str]) -> bytes:
    """The lines below the Host of a sandbox that is found under another profile than the rest."""
    return _lines([f"    {PROFILE.decode()}{profile}", f"    ProxyCommand {_helper(profile, helper)}"])


def gateway_known_line(host_key: str, direct: Iterable[str]) -> bytes:
    """The line of known_hosts that pins the gateway, and for no sandbox that is reached directly."""
    hosts = ",".join([ANY, *(f"!{SSH_PREFIX}{name}" for name in sorted(direct))])
    return _lines([f"{hosts} {' '.join(host_key.split()[:2])}"])


def _helper(profile: str, helper: Sequence[str]) -> str:
    words = [*helper, *(["--profile", profile] if profile else [])]
    return f"{sshtext.command(words)} '%h'"  # in quotes: ssh before 9.6 puts whatever was typed there


def _pinned(known_hosts: Path) -> list[str]:
    return [f"    UserKnownHostsFile {sshtext.quoted(known_hosts)}", "    StrictHostKeyChecking yes", "    CheckHostIP no"]


def _lines(words: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in words).encode()


def _some(old: dict[str, bytes], new: dict[str, bytes]) -> dict[str, bytes]:
    """Both, the new ones first when there are too many."""
    room = max(0, LISTED_MAX - len(new))
    kept = {name: own for name, own in old.items() if name not in new}
    return dict([*list(new.items())[:LISTED_MAX], *list(kept.items())[:room]])

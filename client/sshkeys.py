"""Public keys: which one `ssh-setup` installs, and whether a line really is one."""

from __future__ import annotations

import re
from binascii import Error as Base64Error
from binascii import a2b_base64
from dataclasses import dataclass
from pathlib import Path

from client.output import clean
from client.proxy import Failure
from gatewayd.api import ErrorKind

KEY_TYPES = frozenset(
    {
        "ssh-ed25519",
        "ssh-rsa",
        "ecdsa-sha2-nistp256",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp521",
        "sk-ssh-ed25519@openssh.com",
        "sk-ecdsa-sha2-nistp256@openssh.com",
    }
)
DEFAULT_NAMES = ("id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub")  # in ~/.ssh, in this order
FILE_MAX = 65536  # bytes of a public key file
LINE_MAX = 16384  # characters of one key; an RSA key of 16384 bits takes 2800
AGENT_TIMEOUT = 5.0  # seconds for ssh-add
AGENT_KEYS_MAX = 16


@dataclass(frozen=True)
class Identity:
    """What ssh shall log in with."""

    keys: tuple[str, ...]  # public key lines for authorized_keys, at least one
    file: Path | None  # IdentityFile: the private key, or the public one of a key that only the agent holds; None: any agent key
    source: str  # where the keys were found, for people


def parse_key(line: str) -> str:
    """One public key as ``TYPE BASE64 [COMMENT]``, without anything else.

    Raises:
        ValueError: it is none, with the reason.
    """
    if len(line) > LINE_MAX:
        raise ValueError("it is too long")
    kind, _, rest = line.strip().partition(" ")
    blob, _, comment = rest.strip().partition(" ")
    if kind not in KEY_TYPES:
        raise ValueError(f"{clean(kind[:40])!r} is not a type of public key")
    try:
        data = a2b_base64(blob, strict_mode=True)
    except (Base64Error, ValueError):
        raise ValueError("its second word is not base64") from None
    # The blob repeats the type as a length-prefixed string (RFC 4253, 6.6).
    if data[:4] != len(kind).to_bytes(4, "big") or data[4 : 4 + len(kind)] != kind.encode() or len(data) < 4 + len(kind) + 32:
        raise ValueError("its second word is not a key of that type")
    comment = clean(comment)
    return f"{kind} {blob} {comment}" if comment else f"{kind} {blob}"


def find_identity(named: Path | None, ssh_dir: Path) -> Identity:
    """The key to install: `named`, else the first default one in `ssh_dir`, else all that the agent offers.

    Raises:
        Failure: ``config``; there is none, or the named one cannot be used.
    """
    if named is not None:
        return _from_file(_public_of(named))
    for name in DEFAULT_NAMES:
        if (ssh_dir / name).is_file():
            return _from_file(ssh_dir / name)
    if keys := _agent_keys():
        return Identity(keys, None, "the ssh agent")
    raise Failure(
        ErrorKind.CONFIG,
        f"cannot find a public key: none of {', '.join(DEFAULT_NAMES)} in {ssh_dir}, and no agent offers one",
        "`ssh-keygen -t ed25519` makes one; --identity names another file",
    )


def _public_of(named: Path) -> Path:
    """`named` itself, or the public key beside the private key it names."""
    beside = named.with_name(named.name + ".pub")
    return beside if named.suffix != ".pub" and beside.is_file() else named


def _from_file(path: Path) -> Identity:
    try:
        with path.open("rb") as file:
            text = file.read(FILE_MAX).decode()
    except OSError as exc:
        raise Failure(ErrorKind.CONFIG, f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError:
        raise Failure(ErrorKind.CONFIG, f"cannot use {path}: it is not text") from None
    if "PRIVATE KEY-----" in text:
        raise Failure(ErrorKind.CONFIG, f"cannot use {path}: it is a private key", "name the public one, which ends with .pub")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) != 1:
        raise Failure(ErrorKind.CONFIG, f"cannot use {path}: it holds {len(lines)} keys, not one")
    try:
        key = parse_key(lines[0])
    except ValueError as exc:
        raise Failure(ErrorKind.CONFIG, f"cannot use {path}: {exc}") from None
    private = path.with_suffix("") if path.suffix == ".pub" else path
    return Identity((key,), (private if private.is_file() else path).absolute(), str(path))


def _agent_keys() -> tuple[str, ...]:
    import subprocess

    try:
        listing = subprocess.run(
            ["ssh-add", "-L"], stdin=subprocess.DEVNULL, capture_output=True, timeout=AGENT_TIMEOUT, check=False
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ()
    keys = []
    for line in listing.splitlines():
        try:
            keys.append(parse_key(line))
        except ValueError:
            continue  # a certificate, or "The agent has no identities."
    return tuple(keys[:AGENT_KEYS_MAX])


def parse_user(user: object) -> str:
    """A login name that can stand in an ssh configuration.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(user, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}", user):
        raise ValueError("the login name makes no sense")
    return user

"""Brings the guest into a sandbox and starts it: one ``/execute`` when it is there already (docs/guest-protocol.md).

A shell finds an interpreter; a few lines of Python find the stored file, check it, and become it, or say where to upload it.
What they need to know travels in environment variables, so that nothing is ever quoted; what they print is checked.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.resources
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, Notice, Place

log = logging.getLogger(__name__)

BOOT_TIMEOUT = 60.0  # seconds for everything
RUN_TIMEOUT = 30  # seconds one run of the script may take
PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(20, 5, -1)), "python", "/usr/libexec/platform-python")
OTHERS_MAX = 4  # guests of other versions that are heeded
SHELL_MISSING = (126, 127)  # exit codes of a command that could not be run

_STARTED = re.compile(r"GATEWAYD-GUEST 1 ([1-9][0-9]{0,4}) ([0-9a-f]{64}) ([1-9][0-9]{0,9})")
_OTHER = re.compile(r"GATEWAYD-OTHER 1 ([1-9][0-9]{0,4}) ([0-9a-f]{64}) ([1-9][0-9]{0,9})")
_UPLOAD = re.compile(r"GATEWAYD-UPLOAD (/[A-Za-z0-9_./ +@-]{1,500})")

FIND_PYTHON = r"""
set -u
PATH=${PATH:-/usr/local/bin:/usr/bin:/bin}
export PATH
for name in $GATEWAYD_PYTHONS; do
  python=$(command -v "$name" 2>/dev/null) || continue
  "$python" -S -E -c "$GATEWAYD_PREPARE" </dev/null
  code=$?
  [ "$code" = 93 ] || [ "$code" -ge 126 ] || exit "$code"
done
echo GATEWAYD-NO-PYTHON
exit 0
"""

# Read by any Python there is, also by 2.7. 93: another one may do. The folders must be this user's alone, since the file in
# them is run; the name of the file says what is in it, and the content is checked each time. An upload that broke off an hour
# ago is not coming back.
PREPARE = r"""
import sys
if sys.version_info < (3, 6):
    sys.exit(93)
import hashlib, os, stat, time
env = os.environ
name, digest, uploaded = (env["GATEWAYD_" + key] for key in ("NAME", "SHA256", "UPLOADED"))
for key in list(env):
    if key.startswith("GATEWAYD_"):
        del env[key]
def whole(path):
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(1 << 23)).hexdigest() == digest
    except OSError:
        return False
def private(path):
    try:
        info = os.lstat(path)
        ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
        return ours and os.access(path, os.W_OK)
    except OSError:
        return False
def made(path):
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        return private(path)
    except OSError:
        return False
def tidy(place):
    for entry in os.listdir(place):
        path = os.path.join(place, entry)
        unfinished = len(entry) == len(name) + 9 and entry.startswith("guest-") and entry[-12:-8] == ".py."
        if unfinished and time.time() - os.lstat(path).st_mtime > 3600:
            os.unlink(path)
places = ["%s/.gatewayd-%d" % (place, os.getuid()) for place in ("/tmp", "/dev/shm", "/var/tmp")]
if env.get("HOME", "").startswith("/"):
    places.insert(0, os.path.join(env["HOME"], ".cache/gatewayd"))
if uploaded:
    if whole(uploaded):
        os.replace(uploaded, os.path.join(os.path.dirname(uploaded), name))
    else:
        try:
            os.unlink(uploaded)
        except OSError:
            pass
        print("GATEWAYD-DAMAGED")
        sys.exit(0)
for place in filter(private, places):
    try:
        tidy(place)
    except OSError:
        pass
    file = os.path.join(place, name)
    if whole(file):
        os.execv(sys.executable, [sys.executable, "-I", "-S", file, "start", "others"])
for place in filter(made, places):
    print("GATEWAYD-UPLOAD %s/%s.%s" % (place, name, os.urandom(4).hex()))
    sys.exit(0)
print("GATEWAYD-NOWHERE")
"""


@dataclass(frozen=True)
class GuestAddress:
    """A guest that runs."""

    port: int  # on the sandbox's loopback
    token: bytes = field(repr=False)  # 32 bytes
    pid: int
    others: tuple[GuestAddress, ...] = ()  # guests of other versions, which may have sessions of an earlier gateway


@functools.cache
def guest_file() -> tuple[str, str, bytes]:
    """Name inside, SHA-256 in hexadecimal, and content of the guest."""
    content = (importlib.resources.files("gatewayd.guest") / "guest.py").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return f"guest-{digest[:16]}.py", digest, content


async def boot(account: Account, directory: Directory, sandbox: str, notice: Notice | None = None) -> GuestAddress:
    """Make sure that the guest runs; starts a stopped sandbox.

    Raises:
        GatewayError: kind unsupported when the image has no Python 3.6 or newer.
    """
    what = f"start the guest in sandbox {sandbox!r}"
    try:
        async with asyncio.timeout(BOOT_TIMEOUT):
            return await _boot(account, directory, sandbox, what, notice)
    except TimeoutError as exc:
        raise GatewayError(f"cannot {what}: it took longer than {BOOT_TIMEOUT:.0f} s", kind=ErrorKind.TIMEOUT) from exc


async def _boot(account: Account, directory: Directory, sandbox: str, what: str, notice: Notice | None) -> GuestAddress:
    name, digest, content = guest_file()
    uploaded = ""
    for attempt in range(3):
        place, answer = await _execute(account, directory, sandbox, what, uploaded)
        for line in answer:
            if match := _STARTED.fullmatch(line):
                others = [_address(found, what) for each in answer if (found := _OTHER.fullmatch(each))]
                return _address(match, what, tuple(others[:OTHERS_MAX]))
            if line == "GATEWAYD-NO-PYTHON":
                raise GatewayError(
                    f"sandbox {sandbox!r} has no Python 3.6 or newer, which the gateway's guest needs",
                    kind=ErrorKind.UNSUPPORTED,
                    hint="install python3 (python3-minimal is enough) in the image",
                )
            if line == "GATEWAYD-NOWHERE":
                hint = "its user needs a home, /tmp, /dev/shm or /var/tmp to write to"
                raise GatewayError(f"cannot {what}: no folder there can be written", kind=ErrorKind.FAILED, hint=hint)
        uploaded = ""
        path = next((match[1] for line in answer if (match := _UPLOAD.fullmatch(line))), "")
        if path and attempt < 2:
            log.info("uploading %s (%d bytes) into sandbox %s", name, len(content), sandbox)
            if notice is not None:
                notice(f"setting up sandbox {sandbox!r}")
            action = f"upload the guest into sandbox {sandbox!r}"
            await account.rest.upload(place.url, path, content, action=action, sandbox=sandbox, deadline=BOOT_TIMEOUT)
            uploaded = path
        elif "GATEWAYD-DAMAGED" not in answer:
            said = printable(" ".join(answer)[:200]) or "nothing"
            raise GatewayError(f"cannot {what}: it says {said!r}", kind=ErrorKind.FAILED)
    cause = f"the file arrives damaged (its SHA-256 does not begin with {digest[:16]})"
    raise GatewayError(f"cannot {what}: {cause}", kind=ErrorKind.FAILED, hint="its disk may be full")


def _address(match: re.Match[str], what: str, others: tuple[GuestAddress, ...] = ()) -> GuestAddress:
    port = int(match[1])
    if port > 65535:
        raise GatewayError(f"cannot {what}: it says port {port}", kind=ErrorKind.FAILED)
    return GuestAddress(port, bytes.fromhex(match[2]), int(match[3]), others)


async def _execute(account: Account, directory: Directory, sandbox: str, what: str, uploaded: str) -> tuple[Place, list[str]]:
    """Run the script; where, and the lines that it printed."""
    name, digest, _ = guest_file()
    env = {
        "GATEWAYD_PYTHONS": " ".join(PYTHONS),
        "GATEWAYD_PREPARE": PREPARE,
        "GATEWAYD_NAME": name,
        "GATEWAYD_SHA256": digest,
        "GATEWAYD_UPLOADED": uploaded,
    }
    body: dict[str, Any] = {"command": FIND_PYTHON, "shell": "/bin/sh", "timeout": RUN_TIMEOUT, "env": env}
    place, remembered = await directory.locate(account, sandbox)
    try:
        answer = await account.rest.execute(place.url, body, action=what, sandbox=sandbox, deadline=BOOT_TIMEOUT)
    except GatewayError:
        directory.forget(account, sandbox)
        if not remembered:
            raise
        place, _ = await directory.locate(account, sandbox)
        answer = await account.rest.execute(place.url, body, action=what, sandbox=sandbox, deadline=BOOT_TIMEOUT)
    stdout, stderr, code = answer.get("stdout"), answer.get("stderr"), answer.get("exit_code")
    if code in SHELL_MISSING:
        raise GatewayError(f"sandbox {sandbox!r} has no /bin/sh", kind=ErrorKind.UNSUPPORTED)
    if code != 0 or not isinstance(stdout, str):
        raise GatewayError(f"cannot {what}: {printable(stderr or 'the script failed', 300)}", kind=ErrorKind.FAILED)
    return place, stdout[:65536].splitlines()

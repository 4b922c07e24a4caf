"""The sandbox's own sshd: made ready by one idempotent script, and the keys that may use it.

Everything runs through ``/execute`` with ``/bin/sh``. What the scripts need to know travels in environment variables, so that
nothing is ever quoted; what they print is checked line by line.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory

PORT = 22
KEY_LINE_MAX = 16384  # characters of a public key line; RSA of 16384 bits has 2.8 thousand
KEYS_MAX = 64  # keys in one request
RUN_TIMEOUT = 60  # seconds a script may take
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
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")

# `listening` reads the kernel's table: images without ss, netstat or awk have it too. 0016 is port 22, 0A is LISTEN.
_COMMON = r"""
set -u
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
listening() {
  for table in /proc/net/tcp /proc/net/tcp6; do
    [ -r "$table" ] || continue
    while read -r _ local _ state _; do
      case "$local $state" in *:0016\ 0A) return 0 ;; esac
    done < "$table"
  done
  return 1
}
"""

ENSURE_RUNNING = (
    _COMMON
    + r"""
fail() { echo "FAIL $*"; exit 0; }
if ! listening; then
  [ -x /usr/sbin/sshd ] || fail no-sshd
  [ "$(id -u)" = 0 ] || fail not-root
  mkdir -p /etc/ssh || fail "cannot make /etc/ssh"
  have_key=
  for key in /etc/ssh/ssh_host_*_key; do [ -f "$key" ] && have_key=1; done
  if [ -z "$have_key" ]; then
    command -v ssh-keygen >/dev/null 2>&1 || fail no-sshd
    ssh-keygen -q -t ed25519 -N '' -C '' -f /etc/ssh/ssh_host_ed25519_key </dev/null >/dev/null 2>&1 \
      || [ -f /etc/ssh/ssh_host_ed25519_key ] || fail "ssh-keygen failed"
  fi
  mkdir -p /run/sshd && chmod 0755 /run/sshd || fail "cannot make /run/sshd"
  user=
  while IFS=: read -r name _; do [ "$name" = sshd ] && user=1; done < /etc/passwd
  if [ -z "$user" ]; then
    echo 'sshd:x:74:65534:sshd:/run/sshd:/usr/sbin/nologin' >> /etc/passwd || fail "cannot add the user sshd"
  fi
  set -- -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o PermitRootLogin=prohibit-password -o UsePAM=no \
    -o ListenAddress=127.0.0.1 -o PidFile=/run/sshd.pid
  if [ ! -e /etc/ssh/sshd_config ]; then
    {
      for key in /etc/ssh/ssh_host_*_key; do echo "HostKey $key"; done
      echo 'Subsystem sftp internal-sftp'
      echo 'AcceptEnv LANG LC_* COLORTERM'
      echo 'PrintMotd no'
    } > /etc/ssh/gatewayd_sshd_config || fail "cannot write /etc/ssh"
    set -- -f /etc/ssh/gatewayd_sshd_config "$@"
  fi
  tries=50
  message=$(/usr/sbin/sshd "$@" </dev/null 2>&1) || tries=5 # another run of this script may have been faster
  until listening; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || fail "sshd does not listen on port 22: $message"
    sleep 0.1 2>/dev/null || sleep 1
  done
fi
echo "USER $(id -un)"
for file in /etc/ssh/ssh_host_*_key.pub; do
  [ -r "$file" ] && while read -r type blob _; do echo "HOSTKEY $type $blob"; done < "$file"
done
exit 0
"""
)

# Keys are compared by type and blob when they are added: a line with options or another comment has them already.
ADD_KEYS = r"""
set -u
umask 077
dir=$HOME/.ssh; file=$dir/authorized_keys
fail() { echo "FAIL cannot write $file"; exit 0; }
mkdir -p "$dir" && chmod 0700 "$dir" && { [ -e "$file" ] || : > "$file"; } && chmod 0600 "$file" || fail
if [ -s "$file" ] && [ -n "$(tail -c 1 "$file")" ]; then echo >> "$file"; fi
printf '%s\n' "$GATEWAYD_KEYS" | while IFS= read -r line; do
  [ -n "$line" ] || continue
  rest=${line#* }; key="${line%% *} ${rest%% *}"
  found=
  while IFS= read -r have || [ -n "$have" ]; do
    case " $have " in *" $key "*) found=1; break ;; esac
  done < "$file"
  if [ -z "$found" ]; then
    printf '%s\n' "$line" >> "$file" && printf 'ADDED %s\n' "$line" || fail
  fi
done
exit 0
"""

# The file is replaced in one step, and only when something goes.
REMOVE_KEYS = r"""
set -u
umask 077
file=$HOME/.ssh/authorized_keys
[ -e "$file" ] || exit 0
temporary=$file.gatewayd.$$
fail() { rm -f "$temporary"; echo "FAIL cannot write $file"; exit 0; }
removed=$(
  : > "$temporary" || fail
  while IFS= read -r have || [ -n "$have" ]; do
    gone=
    while IFS= read -r line; do [ -n "$line" ] && [ "$have" = "$line" ] && gone=1; done <<END
$GATEWAYD_KEYS
END
    if [ -n "$gone" ]; then printf 'REMOVED %s\n' "$have"; else printf '%s\n' "$have" >> "$temporary"; fi
  done < "$file"
)
case $removed in
  REMOVED*) chmod 0600 "$temporary" && mv -f "$temporary" "$file" || fail ;;
  *) rm -f "$temporary" ;;
esac
[ -n "$removed" ] && printf '%s\n' "$removed"
exit 0
"""


async def ensure_running(account: Account, directory: Directory, sandbox: str) -> tuple[str, list[str]]:
    """Make sure that sshd listens on port 22; the login user and the host keys (``type base64``).

    Raises:
        GatewayError: kind unsupported when there is no sshd to start.
    """
    what = f"start sshd in sandbox {sandbox!r}"
    user, keys = "", []
    for word, text in await _run(account, directory, sandbox, ENSURE_RUNNING, {}, what):
        if word == "USER" and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}", text):
            user = text
        elif word == "HOSTKEY" and text.partition(" ")[0] in KEY_TYPES:
            keys.append(check_public_key(text, "a host key of the sandbox"))
    return user or "root", keys


async def add_keys(account: Account, directory: Directory, sandbox: str, keys: Sequence[str]) -> list[str]:
    """Append `keys` (checked lines) to ~/.ssh/authorized_keys where they are missing; the lines that were added."""
    what = f"add a key to sandbox {sandbox!r}"
    answers = await _run(account, directory, sandbox, ADD_KEYS, {"GATEWAYD_KEYS": "\n".join(keys)}, what)
    added = {text for word, text in answers if word == "ADDED"}
    return [key for key in keys if key in added]


async def remove_keys(account: Account, directory: Directory, sandbox: str, keys: Sequence[str]) -> list[str]:
    """Remove exactly these lines from ~/.ssh/authorized_keys; the lines that were there."""
    what = f"remove a key from sandbox {sandbox!r}"
    answers = await _run(account, directory, sandbox, REMOVE_KEYS, {"GATEWAYD_KEYS": "\n".join(keys)}, what)
    removed = {text for word, text in answers if word == "REMOVED"}
    return [key for key in keys if key in removed]


def check_public_keys(lines: object) -> list[str]:
    """The `public_keys` of a request, checked and without repetitions. Raises GatewayError (usage)."""
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise GatewayError("public_keys must be a list of lines", kind=ErrorKind.USAGE)
    if len(lines) > KEYS_MAX:
        raise GatewayError(f"{len(lines)} public keys, the limit is {KEYS_MAX}", kind=ErrorKind.USAGE)
    return list(dict.fromkeys(check_public_key(line, "the public key") for line in lines))


def check_public_key(line: str, what: str) -> str:
    """One ``type base64 [comment]`` line, with single blanks between its parts; no options. Raises GatewayError (usage)."""
    hint = "expected a line like 'ssh-ed25519 AAAA… comment', as in ~/.ssh/id_ed25519.pub"
    if len(line) > KEY_LINE_MAX:
        raise GatewayError(f"{what} is longer than {KEY_LINE_MAX} characters", kind=ErrorKind.USAGE, hint=hint)
    if "PRIVATE KEY" in line:
        raise GatewayError(f"{what} is a private key", kind=ErrorKind.USAGE, hint="name the file that ends in .pub")
    parts = line.strip().split(None, 2)
    if len(parts) < 2 or parts[0] not in KEY_TYPES or not _BASE64.fullmatch(parts[1]):
        raise GatewayError(f"{what} is no public key line: {printable(line, 60)!r}", kind=ErrorKind.USAGE, hint=hint)
    try:
        blob = base64.b64decode(parts[1], validate=True)
    except binascii.Error as exc:
        raise GatewayError(f"{what} is cut off or damaged", kind=ErrorKind.USAGE, hint=hint) from exc
    name = parts[0].encode()
    if not blob.startswith(len(name).to_bytes(4, "big") + name) or len(blob) < len(name) + 16:
        raise GatewayError(f"{what} does not hold a key of type {parts[0]}", kind=ErrorKind.USAGE, hint=hint)
    comment = parts[2].strip() if len(parts) > 2 else ""
    if not comment.isprintable():
        raise GatewayError(f"the comment of {what} has control characters", kind=ErrorKind.USAGE, hint=hint)
    return " ".join(filter(None, (parts[0], parts[1], comment)))


async def _run(
    account: Account, directory: Directory, sandbox: str, script: str, env: dict[str, str], what: str
) -> list[tuple[str, str]]:
    """Run a script and split what it printed into (word, rest) lines. Raises GatewayError."""
    place, remembered = await directory.locate(account, sandbox)
    body: dict[str, Any] = {"command": script, "shell": "/bin/sh", "timeout": RUN_TIMEOUT}
    if env:
        body["env"] = env
    try:
        answer = await account.rest.execute(place.url, body, action=what, sandbox=sandbox, deadline=RUN_TIMEOUT + 30)
    except GatewayError:
        directory.forget(account, sandbox)
        if not remembered:
            raise
        place, _ = await directory.locate(account, sandbox)
        answer = await account.rest.execute(place.url, body, action=what, sandbox=sandbox, deadline=RUN_TIMEOUT + 30)
    stdout, stderr = answer.get("stdout"), answer.get("stderr")
    if answer.get("exit_code") != 0 or not isinstance(stdout, str):
        raise GatewayError(f"cannot {what}: {printable(stderr or 'the script failed', 300)}", kind=ErrorKind.FAILED)
    lines = [line.partition(" ")[::2] for line in stdout.splitlines()]
    for word, text in lines:
        if word == "FAIL":
            raise _failure(text, sandbox, what)
    return lines


def _failure(text: str, sandbox: str, what: str) -> GatewayError:
    if text == "no-sshd":
        return GatewayError(
            f"sandbox {sandbox!r} has no sshd: its image lacks openssh-server",
            kind=ErrorKind.UNSUPPORTED,
            hint="install openssh-server inside, use an image that has it, or leave out --direct",
        )
    if text == "not-root":
        return GatewayError(f"cannot {what}: commands there do not run as root", kind=ErrorKind.UNSUPPORTED)
    return GatewayError(f"cannot {what}: {printable(text, 300)}", kind=ErrorKind.FAILED)

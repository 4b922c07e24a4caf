"""The default snapshot: a root folder made from an allow-list of this machine's own files, without a download.

/usr is bound read-only; everything else is a small folder of links, copies and synthetic files that lies under each sandbox's
writable layer. Nothing outside the list is ever visible: not /root, /home, /etc/shadow, /sys or /var of this machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gatewayd.local.runtime.base import RuntimeFailure

_VERSION = "2"  # raised when the synthetic files change: existing sandboxes keep the layer they were made on

# Copied from this machine's /etc: what programs under /usr need to find their libraries, certificates and defaults.
_ETC = (
    "alternatives",
    "bash.bashrc",
    "ca-certificates.conf",
    "debian_version",
    "host.conf",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "login.defs",
    "magic",
    "mime.types",
    "os-release",
    "protocols",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
    "terminfo",
    "timezone",
)
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")  # links into /usr on a merged-usr system
_FOLDERS = {
    "dev": 0o755,
    "etc": 0o755,
    "home": 0o755,
    "mnt": 0o755,
    "opt": 0o755,
    "proc": 0o755,
    "root": 0o700,
    "run": 0o755,
    "srv": 0o755,
    "tmp": 0o1777,
    "usr": 0o755,
    "var": 0o755,
    "var/cache": 0o755,
    "var/lib": 0o755,
    "var/log": 0o755,
    "var/tmp": 0o1777,
}
_ACCOUNTS = (  # name, uid, home, shell; the group has the same name and number
    ("root", 0, "/root", "/bin/bash"),
    ("daemon", 1, "/usr/sbin", "/usr/sbin/nologin"),
    ("bin", 2, "/bin", "/usr/sbin/nologin"),
    ("sys", 3, "/dev", "/usr/sbin/nologin"),
    ("mail", 8, "/var/mail", "/usr/sbin/nologin"),
    ("www-data", 33, "/var/www", "/usr/sbin/nologin"),
    ("sshd", 100, "/run/sshd", "/usr/sbin/nologin"),
    ("user", 1000, "/home/user", "/bin/bash"),
    ("nobody", 65534, "/nonexistent", "/usr/sbin/nologin"),
)
_EXTRA_GROUPS = (("tty", 5), ("shadow", 42), ("utmp", 43), ("nogroup", 65534))
_SYNTHETIC = {
    "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n",
    "etc/resolv.conf": "",
    "etc/shells": "/bin/sh\n/bin/bash\n",
    "etc/pam.d/other": (  # su, runuser, passwd and cron ask PAM, and refuse without a policy
        "auth\tsufficient\tpam_rootok.so\n"
        "auth\trequired\tpam_unix.so\n"
        "account\trequired\tpam_unix.so\n"
        "password\trequired\tpam_unix.so\n"
        "session\trequired\tpam_unix.so\n"
    ),
    "etc/profile": (
        "# Login shells.\n"
        'PATH="${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"\n'
        "export PATH\n"
        'if [ -n "${BASH-}" ] && [ -f /etc/bash.bashrc ]; then . /etc/bash.bashrc; fi\n'
    ),
    "root/.bashrc": "PS1='\\u@\\h:\\w\\$ '\nalias ls='ls --color=auto'\n",
    "root/.profile": '[ -z "${BASH-}" ] || . ~/.bashrc\n',
}


def _texts() -> Iterator[tuple[str, str, int]]:
    """(path, content, mode) of every synthetic file."""
    for path, content in _SYNTHETIC.items():
        yield path, content, 0o644
    yield "etc/passwd", "".join(f"{n}:x:{uid}:{uid}:{n}:{home}:{shell}\n" for n, uid, home, shell in _ACCOUNTS), 0o644
    groups = [(name, uid) for name, uid, _, _ in _ACCOUNTS if name != "nobody"] + list(_EXTRA_GROUPS)
    yield "etc/group", "".join(f"{name}:x:{gid}:\n" for name, gid in groups), 0o644
    yield "etc/shadow", "".join(f"{name}:*:19700:0:99999:7:::\n" for name, _, _, _ in _ACCOUNTS), 0o640


def _sources() -> list[Path]:
    return [path for name in _ETC if os.path.lexists(path := Path("/etc", name))]


def _fingerprint() -> str:
    """Changes when what would be copied changes."""
    digest = hashlib.sha256(_VERSION.encode())
    for source in _sources():
        info = source.lstat()
        digest.update(f"{source}\0{info.st_mtime_ns}\0{info.st_size}\n".encode())
    for path, content, mode in _texts():
        digest.update(f"{path}\0{mode}\0{content}\n".encode())
    return digest.hexdigest()[:16]


def _copy(source: Path, target: Path) -> None:
    """Copy files and links as they are; what cannot be read (a key, a socket) is left out."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir(exist_ok=True)
        for child in source.iterdir():
            _copy(child, target / child.name)
    elif source.is_file() and os.access(source, os.R_OK):
        shutil.copyfile(source, target)
        target.chmod(0o644)


def ensure_base(bases: Path, uid: int, gid: int) -> str:
    """Make the layer for this machine's present state if it is not there yet; returns its folder's name under `bases`.

    Args:
        bases: folder of all base layers.
        uid, gid: the host's ids of root inside a sandbox, who owns the layer.

    Raises:
        RuntimeFailure: this machine's layout is not supported.
    """
    if not Path("/bin").is_symlink():
        raise RuntimeFailure(
            "the default snapshot needs a merged /usr (/bin a link to usr/bin), which this machine does not have"
        )
    name = _fingerprint()
    final = bases / name
    if final.is_dir():
        return name
    draft = bases / f".{name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for folder, mode in _FOLDERS.items():
        (draft / folder).mkdir()
        (draft / folder).chmod(mode)
    for link in _MERGED:
        if (source := Path("/", link)).is_symlink():
            (draft / link).symlink_to(source.readlink())
    for source in _sources():
        _copy(source, draft / source.relative_to("/"))
    for path, content, mode in _texts():
        (draft / path).parent.mkdir(mode=0o755, exist_ok=True)
        (draft / path).write_text(content)
        (draft / path).chmod(mode)
    if (uid, gid) != (os.getuid(), os.getgid()):
        for folder, folders, files in os.walk(draft):
            for entry in (".", *folders, *files):
                os.chown(Path(folder, entry), uid, gid, follow_symlinks=False)
    draft.rename(final)
    return name

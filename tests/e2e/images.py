"""Root file systems to make sandboxes on: Debian's smallest, with and without Python. Built once into .images/ and kept."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".images"
TOOL = "mmdebstrap"
SUITE = "bookworm"
PYTHON = "python3-minimal"  # an image with no more of Python than that
PLAIN = "plain"  # the same without it
missing = [tool for tool in (TOOL,) if shutil.which(tool) is None]


@contextmanager
def _locked() -> Iterator[None]:
    """One builder at a time."""
    FOLDER.mkdir(mode=0o755, exist_ok=True)
    with (FOLDER / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def root_filesystem(name: str) -> Path:
    """The archive of PYTHON or PLAIN, built if need be (half a minute)."""
    path = FOLDER / f"{name}.tar"
    with _locked():
        if not path.exists():
            (_bootstrap if name == PYTHON else _strip)(path)
    return path


def _bootstrap(path: Path) -> None:
    draft = path.with_suffix(".new")
    # the essential packages have no Python; man pages and translations would be half of it
    left_out = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "man", "locale", "info", "i18n")]
    words = ["--variant=essential", f"--include={PYTHON}", "--format=tar", *left_out]
    mode = "root" if os.getuid() == 0 else "unshare"
    done = subprocess.run(
        [TOOL, f"--mode={mode}", *words, SUITE, str(draft)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{TOOL}: {done.stderr[-2000:]}"
    draft.rename(path)


def _strip(path: Path) -> None:
    source = FOLDER / f"{PYTHON}.tar"
    if not source.exists():
        _bootstrap(source)
    draft = path.with_suffix(".new")
    with tarfile.open(source) as whole, tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as kept:
        for member in whole:
            if "python3" not in member.name:
                kept.addfile(member, whole.extractfile(member) if member.isreg() else None)
    draft.rename(path)

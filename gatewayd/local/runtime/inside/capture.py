"""Copy what a sandbox has written into a layer of its own: a helper process (`mapped`).

Plan: ``{"id_map": …, "source": path, "target": path, "image": folder or null, "merge": [path, …], "live": bool}``. The source is
an upper layer; with ``image`` it is on the disk image in that folder, mounted here; with ``merge`` it is the view of these layers
(topmost first, relative to the target) as one. A live source changes meanwhile: after a first copy the helper says
``{"copied": …}`` and waits for a line on standard input, ``{"again": [path, …]}``, by which time everything stands still, to
bring it up to date.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[4]))  # -I -S leaves our own packages out

from gatewayd.local.runtime.inside import idspace, kernel, loopdisk, mapped
from gatewayd.local.runtime.inside.trees import TreeCopy

_LOCK_DEADLINE = 10.0  # seconds for a loop device to let go of a disk after a stop
_MOUNTPOINTS = ("/mnt", "/media", "/srv", "/opt")  # covered in a private mount namespace only
_LINE_MAX = 1 << 20  # bytes
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _private() -> None:
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "none", kernel.MS_REC | kernel.MS_PRIVATE)


def _merged(layers: list[str]) -> int:
    """Mount layers as one; an open descriptor of its root."""
    _private()
    place = next(path for path in _MOUNTPOINTS if os.path.isdir(path))  # noqa: PTH112
    kernel.mount("overlay", place, "overlay", kernel.MS_RDONLY, f"lowerdir={':'.join(layers)},userxattr")
    return os.open(place, _FOLDER)


def _capture(plan: dict[str, Any], door: mapped.Door) -> int:
    copy: TreeCopy | None = None
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        privileged = plan["id_map"]["method"] == "direct"
        target = os.open(plan["target"], _FOLDER)
        os.fchdir(target)
        source = -1
        if plan["image"] is not None:
            os.chdir(plan["image"])
            _private()
            id_map = plan["id_map"]
            loopdisk.mount((id_map["uid"][0][1], id_map["gid"][0][1]), time.monotonic() + _LOCK_DEADLINE)
            source = os.open(f"{loopdisk.MOUNTPOINT}/upper", _FOLDER)
        elif not plan["merge"]:
            source = os.open(plan["source"], _FOLDER)
        elif privileged:
            source = _merged(plan["merge"])
        door.enter()
        if source < 0:
            source = _merged(plan["merge"])
        door.settle()
        copy = TreeCopy(source, target)
        copy.update(last=not plan["live"])
        if plan["live"]:
            mapped.answer({"copied": copy.bytes})
            line = sys.stdin.buffer.readline(_LINE_MAX)
            if not line:
                return 1  # given up
            copy.update(json.loads(line)["again"], last=True)
    except (OSError, ValueError, RecursionError, MemoryError, idspace.MapError) as exc:
        number = exc.errno if isinstance(exc, OSError) else None
        mapped.answer({"failed": (exc.strerror if isinstance(exc, OSError) else str(exc)) or type(exc).__name__, "errno": number})
        return 1
    finally:
        if copy is not None:
            copy.close()
    mapped.answer({"bytes": copy.bytes, "entries": copy.entries})
    return 0


if __name__ == "__main__":
    sys.exit(mapped.main(sys.argv[1], _capture))

"""The native runtime: bubblewrap, an overlay and Linux namespaces, as root or as a plain user, with no daemon and no image.

On disk, below the state folder::

    bases/HASH/          the default snapshot's layer (`rootfs`), or an archive's (`layers`)
    layers/ID/           what snapshots are made of (`layerstore`)
    boxes/ID/upper/      what the sandbox wrote; work/ is overlayfs's own
    boxes/ID/disk.img    both of them instead, on a disk of limited size, mounted on disk/ where nobody else sees it
    boxes/ID/base        the names of the layers it was made on, topmost first
    trash/               disks being deleted

Per running sandbox there is one monitor process outside and one agent inside (`inside.monitor`, `inside.agent`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from gatewayd.local.runtime import cgroups, checks, disk, idmap, layers, packetfilter, rootfs
from gatewayd.local.runtime.base import BoxSpec, Finding, RuntimeFailure, box_dir
from gatewayd.local.runtime.checks import can_size_tmpfs, find_bubblewrap
from gatewayd.local.runtime.inside import loopdisk, seccomp
from gatewayd.local.runtime.layerstore import BASES, MARKER, LayerStore, on_host_usr
from gatewayd.local.runtime.nativebox import NativeBox
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

_END_DEADLINE = 12.0  # seconds for killed processes to be gone
_MASKED = ("/proc/keys", "/proc/cmdline")  # name this machine's keyrings; how it was started
_MIN_TMPFS = 16 << 20  # bytes of /tmp, /run and /dev/shm at least
_NOTE_NO_FILTER = "system calls are not filtered: there is no filter for this architecture"
_NOTE_SINGLE_ID = "only root exists inside: /etc/subuid gives this user no ids (install uidmap and add a range)"


class NativeRuntime:
    """Boxes by bubblewrap. See `base.Runtime`."""

    name = "native"
    reaches_network = True

    def __init__(self, state_dir: Path, base: Path | None = None) -> None:
        """`base`: archive of a root file system to make sandboxes on, instead of this machine's own programs."""
        self._state_dir = state_dir
        self._base = base
        self._ids = idmap.current()
        instance = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]
        self._cgroups = cgroups.Cgroups(instance)
        self._call_filter = seccomp.program() or b""  # for everything inside; empty on a machine without a table
        self._base_lock = threading.Lock()  # the first sandboxes may all be started at once
        self._unpacking = asyncio.Lock()  # the same, for `base`
        self.layers = LayerStore(state_dir, self._ids, self._delete)
        self._tasks = TaskOwner("native")  # one watcher for each running box
        self._ends: set[asyncio.Future[str]] = set()  # `ended` of each running box

    def _note(self, *limits: str) -> str:
        notes = [note for note in limits if note]
        if not self._call_filter:
            notes.append(_NOTE_NO_FILTER)
        if self._ids.method == "single":
            notes.append(_NOTE_SINGLE_ID)
        return "; ".join(notes)

    async def check(self) -> list[Finding]:
        """What this machine offers and what it lacks, for people to read. Changes nothing, never raises."""
        return [*await checks.examine(self._state_dir, self._ids, self._cgroups.controllers), packetfilter.finding()]

    async def recover(self) -> None:
        """Remove what a killed service left behind (processes, cgroups, half-deleted disks). Call once, before anything else."""
        for box_id in self._cgroups.leftovers():
            for pid in self._cgroups.pids(box_id):  # its monitor was killed too: nobody else will end these
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(_END_DEADLINE):
                while self._cgroups.pids(box_id):  # noqa: ASYNC110 - the kernel sends no event
                    await asyncio.sleep(0.01)
            self._cgroups.remove(box_id)
        trash = self._state_dir / "trash"
        if trash.is_dir():
            for entry in trash.iterdir():
                await self._delete(entry)

    async def start(self, spec: BoxSpec) -> NativeBox:
        """Start a sandbox, on its existing disk or a fresh one. Raises RuntimeFailure; nothing is left behind then."""
        bwrap = find_bubblewrap()
        if bwrap is None:
            raise RuntimeFailure("cannot start the sandbox: bubblewrap is not installed (apt-get install bubblewrap)")
        try:
            archived = None
            if self._base is not None and not spec.layers:
                async with self._unpacking:
                    archived = await layers.ensure_archive(self._state_dir / "bases", self._base, self._ids, self._delete)
            stack, disk_note = await asyncio.to_thread(self._prepare_disk, spec, archived)
            sized = spec.mem_bytes is not None and await asyncio.to_thread(can_size_tmpfs, bwrap)
            limits = self._cgroups.create(spec.id, spec.vcpus, spec.mem_bytes)
        except OSError as exc:
            raise RuntimeFailure(f"cannot start the sandbox: {exc.strerror}") from exc
        network, network_note = packetfilter.plan(spec.network)
        box = NativeBox(spec, self._note(limits.note, disk_note, network_note))
        folder = box_dir(self._state_dir, spec.id)
        plan = {
            "box_dir": str(folder),
            "disk": (folder / loopdisk.IMAGE).exists(),
            "lower": ":".join(f"../../{layer}" for layer in stack),
            "id_map": self._ids.plan(),
            "cgroups": [str(folder) for folder in limits.folders],
            "bwrap": bwrap,
            "isolation": self._isolation(spec),
            "mounts": self._mounts(spec, sized=sized, host_usr=on_host_usr(stack)),
            "max_pids": cgroups.MAX_PIDS,
            "seccomp": self._call_filter.hex(),
            "network": network,
        }
        try:
            await box.boot(plan)
        except BaseException:
            self._cgroups.remove(spec.id)
            raise
        self._ends.add(box.ended)
        box.ended.add_done_callback(self._ends.discard)
        self._tasks.start(box.watch(), spec.id)
        return box

    @staticmethod
    def _isolation(spec: BoxSpec) -> list[str]:
        namespaces = [f"--unshare-{name}" for name in ("pid", "net", "ipc", "uts")]
        return [*namespaces, "--hostname", spec.hostname, "--die-with-parent", "--cap-drop", "ALL", "--chdir", "/"]

    @staticmethod
    def _mounts(spec: BoxSpec, *, sized: bool, host_usr: bool) -> list[str]:
        # a /tmp as large as the memory limit would, once full, leave no memory to any process
        size = ["--size", str(max(_MIN_TMPFS, (spec.mem_bytes or 0) // 2))] if sized else []
        shared = [word for path in ("/dev/shm", "/tmp") for word in (*size, "--perms", "1777", "--tmpfs", path)]  # noqa: S108 - inside
        hidden = [word for path in _MASKED if Path(path).exists() for word in ("--ro-bind", "/dev/null", path)]
        own = ["--proc", "/proc", "--dev", "/dev", *shared, *size, "--perms", "755", "--tmpfs", "/run"]
        return [*(["--ro-bind", "/usr", "/usr"] if host_usr else []), *own, *hidden]

    def _prepare_disk(self, spec: BoxSpec, archived: str | None) -> tuple[Sequence[str], str]:
        """Make what is missing of a box's folder; returns its layers, topmost first, and what of its size is not enforced.

        `archived` is the layer for a new box without a snapshot; None: the default snapshot's.
        """
        bases = self._state_dir / BASES
        folder = box_dir(self._state_dir, spec.id)
        marker = folder / MARKER
        stack: Sequence[str] = self.layers.stack_of(spec.id)
        if stack and all(self.layers.has(name) for name in stack):
            return stack, disk.prepare(folder, spec.fs_capacity_bytes)
        if spec.layers:
            stack = spec.layers
            if not all(self.layers.has(name) for name in stack):
                raise RuntimeFailure("cannot start the sandbox: a layer of its snapshot is missing")
        elif archived is None:
            with self._base_lock:
                bases.mkdir(mode=0o700, parents=True, exist_ok=True)
                stack = [f"{BASES}/{rootfs.ensure_base(bases, self._ids.root_uid, self._ids.root_gid)}"]
        else:
            stack = [f"{BASES}/{archived}"]
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        note = disk.prepare(folder, spec.fs_capacity_bytes)
        if not (folder / loopdisk.IMAGE).exists():
            for path in (folder / "upper", folder / "work"):
                path.mkdir(mode=0o700, exist_ok=True)
                os.chown(path, self._ids.root_uid, self._ids.root_gid)
            (folder / "upper").chmod(0o755)  # the sandbox's root folder
        draft = marker.with_suffix(".new")
        draft.write_text("\n".join(stack))
        draft.rename(marker)
        return stack, note

    async def remove(self, box_id: str) -> None:
        """Delete a stopped sandbox's disk; no error when there is none."""
        trash = self._state_dir / "trash"
        trash.mkdir(mode=0o700, exist_ok=True)
        target = trash / f"{box_id}.{os.urandom(4).hex()}"
        try:
            box_dir(self._state_dir, box_id).rename(target)
        except FileNotFoundError:
            return
        await self._delete(target)

    async def _delete(self, path: Path) -> None:
        """rm -rf, from inside the id mapping where other users' files are not ours to delete."""
        remover = ["rm", "-rf", "--one-file-system", "--", str(path)]
        if self._ids.method == "newuidmap":
            remover = ["unshare", "--user", "--map-root-user", "--map-auto", "--", *remover]
        process = await asyncio.create_subprocess_exec(
            *remover, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        _, err = await process.communicate()
        if process.returncode != 0:
            log.error("cannot delete a sandbox's disk: %s", err.decode("utf-8", "replace").strip()[:500])

    async def disks(self) -> set[str]:
        """Ids of the boxes that have a disk."""
        boxes = self._state_dir / "boxes"
        return {entry.name for entry in boxes.iterdir()} if boxes.is_dir() else set()

    async def aclose(self) -> None:
        """Release what the runtime itself holds. Boxes must have been stopped."""
        if self._ends:
            await asyncio.wait(self._ends, timeout=_END_DEADLINE)
        await self._tasks.aclose()
        self._cgroups.close()

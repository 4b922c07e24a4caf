"""The Docker runtime: one container a sandbox, by the Engine API of a daemon on this machine.

A container is the sandbox's disk: it is made at the first start, keeps its writable layer while it is stopped, and is
deleted with the sandbox. Labels tell our containers, and those of other services of the same kind, from everybody else's.

What differs from the native runtime:

- a killed service's containers run on until the next start (`recover`);
- hostname stays that of the first start; so does the default snapshot's state;
- the size of the disk is not limited;
- a started process costs about 60 ms, a signal the same;
- files are copied through the service's folder; at most `docker_files.MAX_READ` bytes are read;
- stdout and stderr share a connection (`docker_pump`);
- the overlay's mount options name folders of the daemon inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

from gatewayd.local.runtime import docker_checks, docker_guest
from gatewayd.local.runtime.base import STATE_MODE, BoxSpec, Finding, RuntimeFailure
from gatewayd.local.runtime.cgroups import MAX_PIDS
from gatewayd.local.runtime.docker_api import DockerApi, DockerError, part
from gatewayd.local.runtime.docker_box import DockerBox
from gatewayd.local.runtime.docker_image import Images
from gatewayd.local.runtime.inside import kernel
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

DEFAULT_SOCKET = Path("/var/run/docker.sock")
LABEL_INSTANCE = "gatewayd.instance"  # whose container or image it is: a hash of the state folder
LABEL_BOX = "gatewayd.box"  # id of the sandbox

_END_DEADLINE = 12.0  # seconds for killed processes to be gone
_MIN_MEMORY = 6 << 20  # bytes; the daemon refuses less
_BOX_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")  # what a container's name may be made of
_CAPABILITIES = {
    0: "CHOWN",
    1: "DAC_OVERRIDE",
    3: "FOWNER",
    4: "FSETID",
    5: "KILL",
    6: "SETGID",
    7: "SETUID",
    8: "SETPCAP",
    10: "NET_BIND_SERVICE",
    13: "NET_RAW",
    18: "SYS_CHROOT",
    29: "AUDIT_WRITE",
    31: "SETFCAP",
}
_MASKED = (  # the daemon's own list, and the view of this machine's devices
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys",
)
_TMPFS = {"/tmp": "rw,exec,nosuid,nodev,mode=1777", "/run": "rw,exec,nosuid,nodev,mode=755"}  # noqa: S108 - inside


class DockerRuntime:
    """Boxes by Docker. See `base.Runtime`."""

    name = "docker"
    reaches_network = False  # containers are made without
    layers = None  # images of the daemon's own are not used: there is the default snapshot alone
    tmpfs: ClassVar[dict[str, str]] = _TMPFS  # what is in memory inside: folder → mount options

    def __init__(self, state_dir: Path, socket_path: Path = DEFAULT_SOCKET, oci_runtime: str | None = None) -> None:
        """`oci_runtime` is one that the daemon lists, such as "runsc"; None: its default, which must be runc or like it."""
        self._api = DockerApi(socket_path)
        self._oci_runtime = oci_runtime
        self._folder = state_dir / "docker"  # what this runtime keeps on disk beside its containers
        self._spool = self._folder / "spool"  # content of files under way
        self._instance = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]
        self._images = Images(self._api, self._folder, f"gatewayd-{self._instance}", (LABEL_INSTANCE, self._instance))
        self._tasks = TaskOwner("docker")  # one watcher for each running box
        self._ends: set[asyncio.Future[str]] = set()  # `ended` of each running box

    def _container(self, box_id: str) -> str:
        """A container's name."""
        if not _BOX_ID.match(box_id):
            raise RuntimeFailure("cannot use this sandbox's id as the name of a container")
        return f"gatewayd-{self._instance}-{box_id}"

    async def _ours(self) -> list[dict[str, Any]]:
        query = {"all": "1", "filters": json.dumps({"label": [f"{LABEL_INSTANCE}={self._instance}"]})}
        found = await self._api.request("list sandboxes", "GET", "/containers/json", query=query)
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    async def check(self) -> list[Finding]:
        """What this machine offers and what it lacks, for people to read. Changes nothing, never raises."""
        try:
            return docker_checks.findings(await self._info(), self._oci_runtime)
        except RuntimeFailure as exc:
            return docker_checks.unreachable(str(exc))

    async def _info(self) -> dict[str, Any]:
        """The daemon's description of itself."""
        info = await self._api.request("ask Docker", "GET", "/info")
        if not isinstance(info, dict):
            raise RuntimeFailure("Docker does not describe itself")
        return info

    async def recover(self) -> None:
        """Remove what a killed service left behind: running containers of ours, content under way."""
        await asyncio.to_thread(shutil.rmtree, self._spool, ignore_errors=True)
        for entry in await self._ours():
            if entry.get("State") not in ("created", "exited", "dead"):
                path = f"/containers/{part(str(entry.get('Id')))}"
                with contextlib.suppress(DockerError):  # ended by itself
                    await self._api.request("stop a sandbox", "POST", f"{path}/kill", query={"signal": "KILL"})
                with contextlib.suppress(DockerError):
                    await self._api.request("stop a sandbox", "POST", f"{path}/wait", deadline=_END_DEADLINE)

    async def start(self, spec: BoxSpec) -> DockerBox:
        """Start a sandbox, on its existing disk or a fresh one. Raises RuntimeFailure; nothing is left behind then."""
        name = self._container(spec.id)
        self._spool.mkdir(mode=STATE_MODE, parents=True, exist_ok=True)
        info = await self._info()
        self._check_runtime(info)
        limits = _limits(spec, info)
        container, fresh = await self._find(name), False
        if container is None:
            container, fresh = await self._create(name, spec, limits), True
        else:
            await self._api.request("set the sandbox's limits", "POST", f"/containers/{part(container)}/update", body=limits)
        box = DockerBox(self._api, spec, container, self._spool, docker_checks.unenforced(spec, info))
        try:
            await box.boot(enter=self._oci_runtime is None)
        except BaseException:
            if fresh:
                await asyncio.shield(self.remove(spec.id))
            raise
        self._ends.add(box.ended)
        box.ended.add_done_callback(self._ends.discard)
        self._tasks.start(box.watch(), spec.id)
        return box

    def _check_runtime(self, info: dict[str, Any]) -> None:
        known = info.get("Runtimes")
        if self._oci_runtime is not None and self._oci_runtime not in (known if isinstance(known, dict) else {}):
            raise RuntimeFailure(f"cannot start the sandbox: Docker has no runtime {self._oci_runtime!r} (see its daemon.json)")

    async def _find(self, name: str) -> str | None:
        """The id of the container of that name, if it is there and ours."""
        try:
            found = await self._api.request("find the sandbox", "GET", f"/containers/{part(name)}/json")
        except DockerError as exc:
            if exc.status == 404:
                return None
            raise
        labels = found.get("Config", {}).get("Labels") or {}
        if labels.get(LABEL_INSTANCE) != self._instance:
            raise RuntimeFailure("cannot start the sandbox: its container's name is taken by somebody else")
        return str(found["Id"])

    async def _create(self, name: str, spec: BoxSpec, limits: dict[str, int]) -> str:
        body = {
            "Image": await self._images.ensure(),
            "Hostname": spec.hostname,
            "Cmd": ["/bin/sh"],  # reads `docker_guest.INIT`
            "OpenStdin": True,
            "StdinOnce": True,
            "Env": [f"PATH={docker_guest.PATH}"],
            "User": "0:0",
            "WorkingDir": "/",
            "Labels": {LABEL_INSTANCE: self._instance, LABEL_BOX: spec.id},
            "HostConfig": {
                **limits,
                "NetworkMode": "none",
                "Sysctls": self._sysctls(),
                "Binds": ["/usr:/usr:ro"],
                "Tmpfs": self.tmpfs,
                "CapDrop": ["ALL"],
                "CapAdd": [_CAPABILITIES[number] for number in sorted(kernel.SANDBOX_CAPABILITIES)],
                "SecurityOpt": ["no-new-privileges"],
                "MaskedPaths": list(_MASKED),
                "IpcMode": "private",
                "LogConfig": {"Type": "none"},
                "RestartPolicy": {"Name": "no"},
                **({"Runtime": self._oci_runtime} if self._oci_runtime is not None else {}),
            },
        }
        made = await self._api.request("make the sandbox", "POST", "/containers/create", query={"name": name}, body=body)
        if not isinstance(made, dict) or not made.get("Id"):
            raise RuntimeFailure("cannot make the sandbox: Docker gave no container")
        return str(made["Id"])

    def _sysctls(self) -> dict[str, str]:
        """::1 on the loopback interface, which Docker would leave out; gVisor takes no such settings."""
        ipv6 = self._oci_runtime is None and Path("/proc/sys/net/ipv6").is_dir()
        return {"net.ipv6.conf.lo.disable_ipv6": "0"} if ipv6 else {}

    async def remove(self, box_id: str) -> None:
        """Delete a stopped sandbox's disk; no error when there is none."""
        if not _BOX_ID.match(box_id):
            return
        container = await self._find(self._container(box_id))
        if container is None:
            return
        try:
            path = f"/containers/{part(container)}"
            await self._api.request("delete the sandbox", "DELETE", path, query={"force": "1", "v": "1"}, deadline=60.0)
        except DockerError as exc:
            if exc.status != 404:
                log.warning("box %s: %s", box_id, exc)

    async def disks(self) -> set[str]:
        """Ids of the boxes that have a disk."""
        labels = [entry.get("Labels") or {} for entry in await self._ours()]
        return {str(found[LABEL_BOX]) for found in labels if LABEL_BOX in found}

    async def aclose(self) -> None:
        """Release what the runtime itself holds. Boxes must have been stopped."""
        if self._ends:
            await asyncio.wait(self._ends, timeout=_END_DEADLINE)
        await self._tasks.aclose()


def _limits(spec: BoxSpec, info: dict[str, Any]) -> dict[str, int]:
    """HostConfig's limits. "None" is the whole machine: zero would leave an existing container's limit as it was."""
    whole = max(int(info.get("MemTotal") or 0), _MIN_MEMORY)
    memory = whole if spec.mem_bytes is None else max(min(spec.mem_bytes, whole), _MIN_MEMORY)
    processors = max(int(info.get("NCPU") or 1), 1)
    vcpus = processors if spec.vcpus is None else max(0.01, min(spec.vcpus, processors))
    limits = {"PidsLimit": MAX_PIDS}
    if info.get("MemoryLimit"):
        limits["Memory"] = memory
        limits["MemorySwap"] = memory if info.get("SwapLimit") else 0  # the sum of both: none
    if info.get("CpuCfsQuota"):
        limits["NanoCpus"] = int(vcpus * 1e9)
    return limits

"""The snapshots: built from images, captured from sandboxes, found by id, name or name:tag, deleted when nothing is made of them.

A tag leads to one snapshot of a name at a time. It moves when the next one is ready, and leaves the one before to its id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gatewayd.local.clock import Clock
from gatewayd.local.envelope import ServiceError, printable, unsupported
from gatewayd.local.imagemodels import LATEST, CaptureBody, SnapshotBody
from gatewayd.local.images import Builder, Built, Progress
from gatewayd.local.models import DEFAULT_SNAPSHOT_ID, DEFAULT_SNAPSHOT_NAME, RunConfig, merged
from gatewayd.local.oci import ImageError
from gatewayd.local.records import LayerRecord, SnapshotRecord
from gatewayd.local.references import Reference, parse
from gatewayd.local.registries import Registries
from gatewayd.local.runtime.base import Layers, RuntimeFailure
from gatewayd.local.sandbox import Sandbox
from gatewayd.local.skopeo import Access
from gatewayd.local.storage import ADVICE, WriteFailure, is_full, refused
from gatewayd.local.store import Store
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

_INTERRUPTED = "the service ended while it was made"
PATIENCE = 1.0  # seconds that the answer to a request for a snapshot waits for it to be ready
MAX_BUILDS = 4  # images being fetched at a time; others wait
BUILDS = "builds"  # folder below the state directory for what is under way

DEFAULT = SnapshotRecord(  # this machine's own programs, without a download
    DEFAULT_SNAPSHOT_ID, DEFAULT_SNAPSHOT_NAME, LATEST, "ready", created_at="", updated_at="", tags=(LATEST,)
)


@dataclass
class _Job:
    """A snapshot being made."""

    progress: Progress = field(default_factory=Progress)
    built: Built = field(default_factory=Built)  # its layers are no garbage
    task: asyncio.Task[None] | None = None  # set as it is started
    dropped: bool = False  # the snapshot is being deleted


class Snapshots:
    """All snapshots of this service. Use from the event loop only."""

    def __init__(self, store: Store, layers: Layers | None, clock: Clock, environ: Mapping[str, str]) -> None:
        """`layers` is what the runtime makes them of; None: it has the default snapshot and no others."""
        self._store = store
        self._layers = layers
        self._clock = clock
        self.registries = Registries(store, store.folder, clock)
        self._builder = Builder(store.folder / BUILDS, layers, environ) if layers is not None else None
        self._by_id: dict[str, SnapshotRecord] = {}
        self._sizes: dict[str, int] = {}  # bytes of content of each layer, by its name
        self._jobs: dict[str, _Job] = {}  # by id of the snapshot being made
        self._tasks = TaskOwner("snapshots")
        self._building = asyncio.Semaphore(MAX_BUILDS)
        self._sweeping = asyncio.Lock()  # one collection of garbage at a time
        self.users: Callable[[str], list[str]] = lambda snapshot_id: []  # names of the sandboxes made from one; set by `Boxes`

    async def recover(self) -> None:
        """Take stock after a start: what was being made has failed, what was being deleted is gone, and no layer is left over."""
        if self._builder is not None:
            await asyncio.to_thread(self._builder.clean)
        self._sizes = {layer.name: layer.size for layer in self._store.layers.load()}
        for record in self._store.snapshots.load():
            self._by_id[record.id] = record
            if record.status == "building":
                self._note(record, status="failed", status_message=_INTERRUPTED)
            elif record.status == "deleting":
                self._forget(record)
        await self._collect()

    # -- looking up

    def all(self) -> list[SnapshotRecord]:
        """Every snapshot, oldest first."""
        return [DEFAULT, *self._by_id.values()]

    def get(self, reference: str) -> SnapshotRecord:
        """The snapshot of that id, name:tag, or name: its `latest`, else its newest without a tag. Raises ServiceError 404."""
        found = self.find(reference)
        if found is None:
            raise ServiceError(404, "NotFound", f"Snapshot '{reference[:200]}' not found")
        return found

    def find(self, reference: str) -> SnapshotRecord | None:
        """The same, or None."""
        if reference in (DEFAULT.id, DEFAULT.name):
            return DEFAULT
        if reference in self._by_id:
            return self._by_id[reference]
        name, colon, tag = reference.partition(":")
        named = [record for record in self.all() if record.name == name]
        found = next((record for record in named if (tag if colon else LATEST) in record.tags), None)
        if found is None and not colon:
            untagged = [record for record in named if record.status == "ready" and not record.tags]
            found = max(untagged, key=lambda record: record.created_at, default=None)
        return found

    def tags(self, name: str) -> list[SnapshotRecord]:
        """The snapshots that tags of a name lead to. Raises ServiceError 404."""
        named = [record for record in self.all() if record.name == name]
        if not named:
            raise ServiceError(404, "NotFound", f"Snapshot name '{name[:200]}' not found")
        return [record for record in named if record.tags]

    def progress(self, record: SnapshotRecord) -> Progress | None:
        """How far it is, while it is being made."""
        job = self._jobs.get(record.id)
        return job.progress if job is not None else None

    def size(self, record: SnapshotRecord) -> int:
        """Bytes of content of all its layers; those of this machine's own programs do not count."""
        return sum(self._sizes.get(name, 0) for name in record.layers)

    # -- making

    def build(self, body: SnapshotBody) -> SnapshotRecord:
        """Begin to make one from an image.

        Raises:
            ServiceError: 404 there is no such registry; 422 this runtime makes none, or the registry is not the image's; 507.
        """
        self._require_layers()
        reference = parse(body.docker_image)
        access = Access()
        if body.registry_id is not None:
            access = self.registries.access(body.registry_id, reference)
        record = self._new(
            body,
            docker_image=body.docker_image,
            registry_id=self.registries.get(body.registry_id).id if body.registry_id is not None else None,
            run_config=body.run_config.model_dump(exclude_none=True) if body.run_config else None,
        )
        return self._begin(record, lambda job: self._build(record, job, reference, access, body.run_config))

    def capture(self, sandbox: Sandbox, body: CaptureBody) -> SnapshotRecord:
        """Begin to make one of a sandbox's files.

        Raises:
            ServiceError: 409 the sandbox is being deleted; 422 this runtime makes none; 507.
        """
        self._require_layers()
        box = sandbox.record
        if box.status == "deleting":
            raise ServiceError(409, "Conflict", f"Sandbox '{box.name}' is being deleted")
        source = self._by_id.get(box.snapshot_id or "")
        run_config = merged(box.run_config or {}, body.run_config) if body.run_config else box.run_config
        record = self._new(
            body,
            fs_capacity_bytes=body.fs_capacity_bytes or box.fs_capacity_bytes or 0,
            source_sandbox_id=box.id,
            run_config=run_config,
            image_config=source.image_config if source is not None else None,
        )
        return self._begin(record, lambda job: self._capture(record, job, sandbox))

    async def settled(self, record: SnapshotRecord) -> SnapshotRecord:
        """The snapshot as it is when it is made, or after PATIENCE: clients look again after seconds only."""
        job = self._jobs.get(record.id)
        if job is not None and job.task is not None:
            await asyncio.wait({job.task}, timeout=PATIENCE)
        return self._by_id.get(record.id, record)

    def _require_layers(self) -> None:
        if self._layers is None:
            raise unsupported(f"this runtime has the one snapshot {DEFAULT_SNAPSHOT_NAME!r}; --runtime native makes others")

    def _new(self, body: SnapshotBody | CaptureBody, **more: Any) -> SnapshotRecord:
        time = self._clock.stamp()
        base = {"fs_capacity_bytes": body.fs_capacity_bytes or 0, **more}
        return SnapshotRecord(
            id=str(uuid.uuid4()),
            name=body.name,
            tag=body.tag,
            status="building",
            created_at=time,
            updated_at=time,
            description=body.description,
            labels=body.labels or {},
            **base,
        )

    def _begin(self, record: SnapshotRecord, work: Callable[[_Job], Coroutine[Any, Any, dict[str, Any]]]) -> SnapshotRecord:
        try:
            self._store.snapshots.insert(record)
        except WriteFailure as exc:
            raise refused(exc) from exc
        self._by_id[record.id] = record
        job = self._jobs[record.id] = _Job()
        log.info("snapshot %s:%s (%s): begun", record.name, record.tag, record.id)
        job.task = self._tasks.start(self._make(record.id, job, work), f"make {record.id}")
        return record

    async def _make(self, identity: str, job: _Job, work: Callable[[_Job], Coroutine[Any, Any, dict[str, Any]]]) -> None:
        """Do the work and record how it ended: whatever happens, the snapshot is not `building` afterwards."""
        record = self._by_id[identity]
        failure = _INTERRUPTED
        try:
            changes = await work(job)
            self._finish(record, job.built, changes)
            failure = ""
            log.info("snapshot %s:%s (%s): ready", record.name, record.tag, record.id)
        except (ImageError, RuntimeFailure, WriteFailure, OSError) as exc:
            message = ADVICE if is_full(exc) or ADVICE in str(exc) else printable(str(exc) or repr(exc), 500)
            failure = f"ImagePull: {record.docker_image}: {message}" if record.docker_image else message
            log.warning("snapshot %s:%s (%s): failed: %s", record.name, record.tag, record.id, printable(str(exc), 500))
        finally:
            job.built.layers = ()
            if not job.dropped:
                with contextlib.suppress(OSError):
                    await self._collect()
                if failure:  # said when nothing of it is left
                    self._note(record, status="failed", status_message=failure)
            self._jobs.pop(identity, None)

    async def _build(
        self, record: SnapshotRecord, job: _Job, reference: Reference, access: Access, wanted: RunConfig | None
    ) -> dict[str, Any]:
        if self._builder is None:
            raise RuntimeFailure("this runtime makes no snapshots")
        async with self._building:
            await self._builder.build(
                record.id,
                reference,
                access,
                capacity=record.fs_capacity_bytes,
                work_dir=(wanted.work_dir if wanted else None) or "",
                known=self._sizes.get,
                progress=job.progress,
                built=job.built,
            )
        config = job.built.config
        if config is None:
            raise ImageError("it has no configuration")
        return {
            "image_digest": job.built.digest or None,
            "run_config": (merged(config.run_config, wanted) if wanted else config.run_config) or None,
            "image_config": config.image_config or None,
            "labels": {**config.labels, **record.labels},
        }

    async def _capture(self, record: SnapshotRecord, job: _Job, sandbox: Sandbox) -> dict[str, Any]:
        if self._layers is None:
            raise RuntimeFailure("this runtime makes no snapshots")
        job.progress.phase = "capturing"
        async with sandbox.lock:
            with sandbox.in_use():
                if sandbox.record.status == "deleting":
                    raise RuntimeFailure("cannot capture the sandbox: it is being deleted")
                box = sandbox.run.box if sandbox.run is not None else None
                captured = await self._layers.capture(sandbox.record.id, box)
        job.built.layers, job.built.sizes = captured.layers, {captured.made: captured.size}
        return {}

    def _finish(self, record: SnapshotRecord, built: Built, changes: dict[str, Any]) -> None:
        """It is ready: its layers are recorded first, then itself, then what its tag led to before."""
        for name, size in built.sizes.items():
            if name not in self._sizes:
                self._store.layers.insert(LayerRecord(name, size, self._clock.stamp()))
                self._sizes[name] = size
        self._save(record, status="ready", status_message=None, tags=[record.tag], layers=list(built.layers), **changes)
        for other in list(self._by_id.values()):
            if other.id != record.id and other.name == record.name and record.tag in other.tags:
                self._note(other, tags=[tag for tag in other.tags if tag != record.tag])

    # -- deleting

    async def delete(self, reference: str) -> None:
        """Remove a snapshot, and the layers that it was the last to need; one that is being made is given up.

        Raises:
            ServiceError: 404; 409 a sandbox is made from it; 422 it is the default one; 507.
        """
        record = self.get(reference)
        if record is DEFAULT:
            raise unsupported(f"the snapshot {DEFAULT_SNAPSHOT_NAME!r} cannot be deleted: it is this machine's own programs")
        if users := self.users(record.id):
            more = f" and {len(users) - 3} more" if len(users) > 3 else ""
            message = f"Snapshot '{record.name}' is used by {', '.join(users[:3])}{more}: delete them first"
            raise ServiceError(409, "Conflict", message)
        self._note(record, status="deleting")
        await asyncio.shield(self._tasks.start(self._delete(record.id), f"delete {record.id}"))
        if record.id in self._by_id:
            raise ServiceError(507, "StorageFull", ADVICE)

    async def _delete(self, identity: str) -> None:
        job = self._jobs.get(identity)
        if job is not None and job.task is not None:
            job.dropped = True
            job.task.cancel()
            await asyncio.wait({job.task})
        if (record := self._by_id.get(identity)) is not None:
            self._forget(record)
            log.info("snapshot %s (%s): deleted", record.name, record.id)
        await self._collect()

    def _forget(self, record: SnapshotRecord) -> None:
        try:
            self._store.snapshots.delete(record.id)
        except WriteFailure:
            self._store.reserve.give_up()
            with contextlib.suppress(WriteFailure):
                self._store.snapshots.delete(record.id)
                self._by_id.pop(record.id, None)
        else:
            self._by_id.pop(record.id, None)

    async def _collect(self) -> None:
        """Remove every layer that nobody needs."""
        if self._layers is None:
            return
        async with self._sweeping:
            wanted = {name for record in self._by_id.values() for name in record.layers}
            wanted |= {name for job in self._jobs.values() for name in job.built.layers}
            await self._layers.keep_only(wanted)
            for name in [name for name in self._sizes if not self._layers.has(name)]:
                with contextlib.suppress(WriteFailure):
                    self._store.layers.delete(name)
                    del self._sizes[name]

    async def aclose(self) -> None:
        """Give up what is being made; idempotent."""
        await self._tasks.aclose()

    # -- helpers

    def _save(self, record: SnapshotRecord, **changes: Any) -> None:
        """Change a record, if it can be written. Raises WriteFailure."""
        changed = replace(self._by_id.get(record.id, record), updated_at=self._clock.stamp(), **changes)
        self._store.snapshots.save(changed)
        self._by_id[changed.id] = changed

    def _note(self, record: SnapshotRecord, **changes: Any) -> None:
        """Record what has happened: it is so whether or not it can be written now."""
        try:
            self._save(record, **changes)
        except WriteFailure as exc:
            log.warning("snapshot %s: its state cannot be recorded: %s", record.name, exc)
            old = self._by_id.get(record.id, record)
            self._by_id[record.id] = replace(old, updated_at=self._clock.stamp(), **changes)

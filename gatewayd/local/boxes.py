"""The sandboxes: created, started, stopped, deleted, woken on demand.

Every change of a sandbox's state happens under its lock and is written before it is answered. Starts are single-flight: whoever
needs a stopped sandbox waits for the same start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gatewayd.local.clock import Clock
from gatewayd.local.creation import millicores, new_record, proxy_config, refuse_proxy_config, wanted_snapshot
from gatewayd.local.egress.service import Egress
from gatewayd.local.envelope import ServiceError, not_found, printable
from gatewayd.local.models import CreateBody, PatchBody, merged
from gatewayd.local.names import generate_name
from gatewayd.local.runtime.base import BoxSpec, Runtime, RuntimeFailure
from gatewayd.local.sandbox import Run, Sandbox
from gatewayd.local.snapshots import Snapshots
from gatewayd.local.storage import ADVICE, WriteFailure, is_full, refused, storage_full
from gatewayd.local.store import Store
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

START_DEADLINE = 60.0  # seconds a start may take
STOP_DEADLINE = 20.0  # seconds a stop may take before it is called failed
TUNNEL_DEADLINE = 3.0  # seconds the tunnels of a stopping sandbox get to end
SHUTDOWN_DEADLINE = 7.0  # seconds all sandboxes get to stop when the service ends
SHUTDOWN_GRACE = 1.0  # seconds between SIGTERM and SIGKILL inside sandboxes when the service ends


class Boxes:
    """All sandboxes of this service. Use from the event loop only."""

    def __init__(
        self,
        store: Store,
        runtime: Runtime,
        clock: Clock | None = None,
        environ: Mapping[str, str] | None = None,
        egress: Egress | None = None,
    ) -> None:
        """`environ`: what of the service's environment concerns fetching images. `egress`: None: to public addresses only."""
        self._store = store
        self._runtime = runtime
        self.clock = clock or Clock()  # what TTLs go by
        self.snapshots = Snapshots(store, runtime.layers, self.clock, environ or {})
        self.snapshots.users = self._made_from
        self.egress = egress or Egress(store, self.clock)
        self._unsaved: set[str] = set()  # ids of sandboxes whose row is older than their record: the disk was full
        self._by_id: dict[str, Sandbox] = {}
        self._by_name: dict[str, Sandbox] = {}
        self._tasks = TaskOwner("boxes")
        self.ending = asyncio.Event()  # set by aclose(): nothing is started any more

    async def recover(self) -> None:
        """Take stock after a start: what ran when a service was killed is stopped, what was being deleted is deleted."""
        await self._runtime.recover()
        self._store.reserve.keep()
        await self.snapshots.recover()
        disks = await self._runtime.disks()
        for record in self._store.load():
            sandbox = Sandbox(record, self.clock.monotonic)
            self._by_id[record.id] = self._by_name[record.name] = sandbox
            disks.discard(record.id)
            if record.status in ("ready", "provisioning"):
                message = "stopped: the service that ran it ended without stopping it"
                self._note(sandbox, status="stopped", status_message=message, stopped_at=self.clock.stamp())
                log.info("sandbox %s: %s", record.name, message)
        for disk in sorted(disks):
            log.warning("disk %s belongs to no sandbox in the state file; it is left alone", printable(disk, 80))
        for sandbox in list(self._by_id.values()):
            if sandbox.record.status == "deleting":
                with contextlib.suppress(ServiceError):
                    await self.delete(sandbox)

    # -- looking up

    def get(self, reference: str) -> Sandbox:
        """The sandbox of that name, or of that id. Raises ServiceError 404."""
        sandbox = self._by_name.get(reference) or self._by_id.get(reference)
        if sandbox is None:
            raise not_found(reference)
        return sandbox

    def by_id(self, box_id: str) -> Sandbox:
        """The sandbox of that id. Raises ServiceError 404."""
        sandbox = self._by_id.get(box_id)
        if sandbox is None:
            raise not_found(box_id)
        return sandbox

    def all(self) -> list[Sandbox]:
        """Every sandbox, oldest first."""
        return list(self._by_id.values())

    def _made_from(self, snapshot_id: str) -> list[str]:
        return [sandbox.record.name for sandbox in self.all() if sandbox.record.snapshot_id == snapshot_id]

    # -- control plane

    async def create(self, body: CreateBody) -> Sandbox:
        """A new sandbox: ready if the body waits for that, else on its way there.

        Raises:
            ServiceError: 409 the name is taken; 422 it cannot be started, 507 the disk is full (nothing is left of it); 408 it is
                not ready in time.
        """
        self._refuse_when_closing()
        name = body.name or generate_name(self._by_name)
        if name in self._by_name:
            raise ServiceError(409, "Conflict", f"Sandbox name '{name}' already in use")
        if not self._runtime.reaches_network:
            refuse_proxy_config(body, self._runtime.name)
        record = new_record(body, name, self.clock.stamp(), wanted_snapshot(self.snapshots, body))
        record = replace(record, proxy_config=proxy_config(self.egress, body, record))
        try:
            self._store.insert(record)
        except WriteFailure as exc:
            raise refused(exc) from exc
        sandbox = Sandbox(record, self.clock.monotonic)
        self._by_id[record.id] = self._by_name[name] = sandbox
        log.info("sandbox %s (%s): created", name, record.id)
        starting = self._begin_start(sandbox)
        if not body.wait_for_ready:
            return sandbox
        try:
            async with asyncio.timeout(body.timeout):
                await asyncio.shield(starting)
        except TimeoutError as exc:
            message = f"Sandbox '{name}' not ready after {body.timeout:g}s (status: {sandbox.record.status})"
            raise ServiceError(408, "Timeout", message) from exc
        if sandbox.record.status == "failed":
            message = sandbox.record.status_message or "the sandbox could not be started"
            full = sandbox.storage_full
            await self.delete(sandbox)
            if full:
                raise storage_full()
            raise ServiceError(422, "SandboxConfig", message)
        return sandbox

    async def update(self, sandbox: Sandbox, body: PatchBody) -> None:
        """Change what the body has. Resources count from the next start, run_config from the next command, proxy_config at once.

        Raises:
            ServiceError: 400 a proxy_config for a sandbox that is not ready; 409 the name is taken, or the sandbox is being
                deleted; 507 the disk is full (nothing has changed).
        """
        record = sandbox.record
        self._refuse_when_deleting(sandbox)
        name = body.name or record.name
        if self._by_name.get(name, sandbox) is not sandbox:
            raise ServiceError(409, "Conflict", f"Sandbox name '{name}' already in use")
        changes: dict[str, Any] = {"name": name}
        for key in ("idle_ttl_seconds", "delete_after_stop_seconds", "mem_bytes", "fs_capacity_bytes", "labels"):
            if (value := getattr(body, key)) is not None:
                changes[key] = value
        if (value := millicores(body)) is not None:
            changes["millicores"] = value
        if body.run_config is not None:
            changes["run_config"] = merged(record.run_config or {}, body.run_config)
        if body.proxy_config is not None:
            if not self._runtime.reaches_network:
                refuse_proxy_config(body, self._runtime.name)
            if record.status != "ready" or sandbox.run is None:
                message = f"Sandbox '{record.name}' is {record.status}: its proxy_config can be changed while it is ready"
                raise ServiceError(400, "InvalidRequest", message)
            changes["proxy_config"] = proxy_config(self.egress, body, record)
        try:
            self._save(sandbox, **changes)
        except sqlite3.IntegrityError as exc:
            raise ServiceError(409, "Conflict", f"Sandbox name '{name}' already in use") from exc
        except WriteFailure as exc:
            raise refused(exc) from exc
        if name != record.name:
            del self._by_name[record.name]
            self._by_name[name] = sandbox
            log.info("sandbox %s: renamed to %s", record.name, name)
        if body.proxy_config is not None and (run := sandbox.run) is not None and run.gate is not None:
            await self.egress.change(record.id, run.box, run.gate, changes["proxy_config"])

    async def start(self, sandbox: Sandbox) -> None:
        """Start it if it does not run. Afterwards its status is ready, or failed with the reason in status_message.

        Raises:
            ServiceError: 409 it is being deleted; 503 the service is ending.
        """
        self._refuse_when_closing()
        self._refuse_when_deleting(sandbox)
        if sandbox.run is None:
            await asyncio.shield(self._begin_start(sandbox))

    async def running(self, sandbox: Sandbox) -> Run:
        """Its present run, started if need be: what a data-plane request does.

        Raises:
            ServiceError: 404 it is being deleted; 400 NotReady it cannot be started; 507 the disk is full; 503 the service is
                ending.
        """
        self._refuse_when_closing()
        sandbox.touch()
        if sandbox.record.status == "deleting":
            raise not_found(sandbox.record.name)
        if sandbox.run is None:
            await asyncio.shield(self._begin_start(sandbox))
        if sandbox.run is None and sandbox.storage_full:
            raise storage_full()
        if sandbox.run is None:
            record = sandbox.record
            message = f"Sandbox '{record.name}' is {record.status}: {record.status_message or 'it was stopped again'}"
            raise ServiceError(400, "NotReady", message)
        return sandbox.run

    async def stop(self, sandbox: Sandbox, why: str = "") -> None:
        """Stop it if it runs; its files stay. `why`, if not asked for by the user, goes into status_message.

        Raises:
            ServiceError: 409 it is being deleted; 500 it does not stop.
        """
        self._refuse_when_deleting(sandbox)
        await self._shielded(self._stop(sandbox, why), f"stop {sandbox.record.id}")

    async def delete(self, sandbox: Sandbox) -> None:
        """Stop it and remove all of it. Raises ServiceError 500 when its disk cannot be removed; it can be tried again."""
        if sandbox.deleting is None or sandbox.deleting.done():
            sandbox.deleting = self._tasks.start(self._delete(sandbox), f"delete {sandbox.record.id}")
        await asyncio.shield(sandbox.deleting)
        if sandbox.record.id in self._by_id:
            if sandbox.storage_full:
                raise storage_full()
            raise ServiceError(500, "InternalError", sandbox.record.status_message or "the sandbox could not be deleted")

    async def aclose(self) -> None:
        """Stop every sandbox, release the runtime and close the store; idempotent."""
        self.ending.set()
        self.egress.close()
        await self.snapshots.aclose()
        waiting = []
        for sandbox in self.all():
            if sandbox.run is not None or sandbox.lock.locked():
                stopping = self._stop(sandbox, "", SHUTDOWN_GRACE)
                waiting.append(self._tasks.start(stopping, f"stop {sandbox.record.id}"))
        if waiting:
            await asyncio.wait(waiting, timeout=SHUTDOWN_DEADLINE)
        await self._tasks.aclose()
        await self._runtime.aclose()
        self._store.close()

    # -- the life of one sandbox; each of these runs as a task of ours and under the sandbox's lock

    def _begin_start(self, sandbox: Sandbox) -> asyncio.Task[None]:
        if sandbox.starting is None or sandbox.starting.done():
            sandbox.starting = self._tasks.start(self._start(sandbox), f"start {sandbox.record.id}")
        return sandbox.starting

    async def _start(self, sandbox: Sandbox) -> None:
        async with sandbox.lock:
            if sandbox.run is not None or sandbox.record.status == "deleting" or self.ending.is_set():
                return
            sandbox.storage_full = False
            self._note(sandbox, status="provisioning", status_message=None)
            record = sandbox.record
            vcpus = None if record.millicores is None else record.millicores / 1000
            snapshot = self.snapshots.find(record.snapshot_id) if record.snapshot_id is not None else None
            layers = tuple(snapshot.layers) if snapshot is not None else ()
            network = self.egress.network if self._runtime.reaches_network else None
            spec = BoxSpec(record.id, record.name, vcpus, record.mem_bytes, record.fs_capacity_bytes, layers, network)
            try:
                async with asyncio.timeout(START_DEADLINE):
                    box = await self._runtime.start(spec)
            except (RuntimeFailure, OSError, TimeoutError) as exc:
                message = printable(str(exc)) if isinstance(exc, RuntimeFailure) else f"cannot start it: {type(exc).__name__}"
                log.warning("sandbox %s: start failed: %s", record.name, printable(str(exc) or repr(exc)))
                sandbox.storage_full = is_full(exc) or not self._store.has_room
                if sandbox.storage_full:
                    message = f"cannot start it: {ADVICE}"
                self._note(sandbox, status="failed", status_message=message)
                return
            run = Run(box, record.name)
            run.gate = await self.egress.enter(record.id, record.name, box, record.proxy_config)
            if run.gate is not None:
                run.tunnels.add(run.gate)
            sandbox.run = run
            sandbox.touch()
            self._note(sandbox, status="ready", status_message=box.limits_note or None, stopped_at=None)
            log.info("sandbox %s: ready", record.name)
            box.ended.add_done_callback(partial(self._on_ended, sandbox, run))

    async def _stop(self, sandbox: Sandbox, why: str, grace: float = 2.0) -> None:
        async with sandbox.lock:
            if sandbox.run is not None:
                await self._halt(sandbox, sandbox.run, why, grace)

    async def _delete(self, sandbox: Sandbox) -> None:
        async with sandbox.lock:
            if sandbox.record.id not in self._by_id:
                return
            sandbox.storage_full = False
            self._note(sandbox, status="deleting", status_message=None)
            record = sandbox.record
            try:
                if sandbox.run is not None:
                    await self._halt(sandbox, sandbox.run, "", 0.0)
                    self._note(sandbox, status="deleting", status_message=None)
                await self._erase(record.id)
            except (ServiceError, RuntimeFailure, WriteFailure, OSError) as exc:
                log.warning("sandbox %s: delete failed: %s", record.name, printable(str(exc)))
                sandbox.storage_full = is_full(exc)
                what = "its record" if isinstance(exc, WriteFailure) else "its disk"
                self._note(sandbox, status="deleting", status_message=f"{what} cannot be removed; delete it again to retry")
                return
            self._unsaved.discard(record.id)
            del self._by_id[record.id]
            del self._by_name[record.name]
            self.egress.forget(record.id)
            log.info("sandbox %s (%s): deleted", record.name, record.id)

    async def _erase(self, box_id: str) -> None:
        """Remove disk and row; on a full disk with the room kept for that."""
        try:
            await self._runtime.remove(box_id)
            self._store.delete(box_id)
        except (RuntimeFailure, WriteFailure, OSError) as exc:
            if not is_full(exc):
                raise
            self._store.reserve.give_up()
            await self._runtime.remove(box_id)
            self._store.delete(box_id)

    async def _halt(self, sandbox: Sandbox, run: Run, why: str, grace: float) -> None:
        """End a run: first the box, so that commands end and tell their clients, then what hangs on it."""
        sandbox.run = None  # a request that comes now waits for the lock and starts it again
        # Said before anything breaks: whoever asks because a connection ended must not learn that it is ready, and start it anew.
        self._note(sandbox, status="stopped", status_message=why or None, stopped_at=self.clock.stamp())
        closing = [self._tasks.start(tunnel.aclose(), "close tunnel") for tunnel in run.tunnels]
        try:
            async with asyncio.timeout(STOP_DEADLINE):
                await run.box.stop(grace)
        except (RuntimeFailure, OSError, TimeoutError) as exc:
            log.warning("sandbox %s: stop failed: %s", sandbox.record.name, printable(str(exc) or repr(exc)))
            why = "it did not stop in order; parts of it may still run"
        await run.commands.aclose()
        if closing:
            await asyncio.wait(closing, timeout=TUNNEL_DEADLINE)
        self._note(sandbox, status="stopped", status_message=why or None, stopped_at=self.clock.stamp())
        log.info("sandbox %s: stopped%s", sandbox.record.name, f" ({why})" if why else "")

    def _on_ended(self, sandbox: Sandbox, run: Run, ended: asyncio.Future[str]) -> None:
        if sandbox.run is run and not ended.cancelled() and not self.ending.is_set():
            reason = printable(ended.result(), 200)
            self._tasks.start(self._crashed(sandbox, run, reason), f"crash {sandbox.record.id}")

    async def _crashed(self, sandbox: Sandbox, run: Run, reason: str) -> None:
        async with sandbox.lock:
            if sandbox.run is run:
                log.warning("sandbox %s: ended by itself: %s", sandbox.record.name, reason)
                await self._halt(sandbox, run, f"it ended by itself: {reason}", 0.0)

    # -- helpers

    async def _shielded(self, coro: Coroutine[Any, Any, None], name: str) -> None:
        """Run to its end even if the one who asked goes away."""
        await asyncio.shield(self._tasks.start(coro, name))

    def flush(self) -> None:
        """Write the rows that could not be written when they changed, and keep room for deleting."""
        self._store.reserve.keep()
        for box_id in sorted(self._unsaved):
            if (sandbox := self._by_id.get(box_id)) is None:
                self._unsaved.discard(box_id)
                continue
            try:
                self._save(sandbox)
            except WriteFailure:
                return
            log.info("sandbox %s: its state is recorded again", sandbox.record.name)

    def _save(self, sandbox: Sandbox, **changes: Any) -> None:
        """Change a record, if it can be written. Raises WriteFailure."""
        record = replace(sandbox.record, updated_at=self.clock.stamp(), **changes)
        self._store.save(record)
        sandbox.record = record
        self._unsaved.discard(record.id)

    def _note(self, sandbox: Sandbox, **changes: Any) -> None:
        """Record what has happened: it is so whether or not it can be written now."""
        try:
            self._save(sandbox, **changes)
        except WriteFailure as exc:
            log.warning("sandbox %s: its state cannot be recorded yet: %s", sandbox.record.name, exc)
            self._unsaved.add(sandbox.record.id)
            sandbox.record = replace(sandbox.record, updated_at=self.clock.stamp(), **changes)

    def _refuse_when_closing(self) -> None:
        if self.ending.is_set():
            raise ServiceError(503, "ServiceUnavailable", "the service is ending")

    def _refuse_when_deleting(self, sandbox: Sandbox) -> None:
        if sandbox.record.status == "deleting":
            raise ServiceError(409, "Conflict", f"Sandbox '{sandbox.record.name}' is being deleted")

"""Where private images come from, and with what credentials (protocol section 1, */registries*)."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from gatewayd.local.clock import Clock
from gatewayd.local.envelope import ServiceError
from gatewayd.local.imagemodels import RegistryBody, RegistryPatch
from gatewayd.local.records import RegistryRecord
from gatewayd.local.references import Reference, parse_registry
from gatewayd.local.skopeo import Access
from gatewayd.local.storage import WriteFailure, refused
from gatewayd.local.store import Store
from gatewayd.local.vault import Vault, VaultError

_FORGOTTEN = ""  # in the place of a sealed password: there was one, and it must be given again; None: there never was


class Registries:
    """All registries of this service."""

    def __init__(self, store: Store, folder: Path, clock: Clock) -> None:
        self._store = store
        self._vault = Vault(folder)
        self._clock = clock
        self._by_name = {record.name: record for record in store.registries.load()}

    def all(self) -> list[RegistryRecord]:
        """Every registry, oldest first."""
        return list(self._by_name.values())

    def get(self, reference: str) -> RegistryRecord:
        """The registry of that name, or of that id. Raises ServiceError 404."""
        found = self._by_name.get(reference) or next((one for one in self._by_name.values() if one.id == reference), None)
        if found is None:
            raise ServiceError(404, "NotFound", f"Registry '{reference[:200]}' not found")
        return found

    def create(self, body: RegistryBody) -> RegistryRecord:
        """Raises ServiceError 409 the name is taken, 507."""
        if body.name in self._by_name:
            raise _taken(body.name)
        identity, time = str(uuid.uuid4()), self._clock.stamp()
        record = RegistryRecord(
            id=identity,
            name=body.name,
            url=body.url,
            created_at=time,
            updated_at=time,
            username=body.username,
            secret=self._sealed(body.password, identity),
            ca=body.ca_cert,
        )
        try:
            self._store.registries.insert(record)
        except WriteFailure as exc:
            raise refused(exc) from exc
        self._by_name[record.name] = record
        return record

    def update(self, reference: str, body: RegistryPatch) -> RegistryRecord:
        """What is absent or null stays, but for a password that would now be told to somebody else, or in clear.

        Raises ServiceError 404, 409, 507.
        """
        old = self.get(reference)
        name = body.name or old.name
        if self._by_name.get(name, old) is not old:
            raise _taken(name)
        given = {"url": body.url, "username": body.username, "ca": body.ca_cert}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        changes |= {"name": name, "updated_at": self._clock.stamp()}
        if body.password is not None:
            changes["secret"] = self._sealed(body.password, old.id)
        record = replace(old, **changes)
        if body.password is None and old.secret and _exposes(old, record):
            record = replace(record, secret=_FORGOTTEN)
        try:
            self._store.registries.save(record)
        except WriteFailure as exc:
            raise refused(exc) from exc
        self._by_name = {one.name: one for one in (record if one is old else one for one in self.all())}
        return record

    def delete(self, reference: str) -> None:
        """Builds under way keep what they were given. Raises ServiceError 404, 507."""
        record = self.get(reference)
        try:
            self._store.registries.delete(record.id)
        except WriteFailure as exc:
            raise refused(exc) from exc
        del self._by_name[record.name]

    def access(self, reference: str, image: Reference) -> Access:
        """How to get at an image by way of a registry.

        Raises:
            ServiceError: 404 there is no such registry; 422 the image is not in it, its password was forgotten or cannot be read.
        """
        record = self.get(reference)
        where = parse_registry(record.url)
        if image.host != where.host:
            message = f"the image is at {image.host or 'this machine'}, and registry '{record.name}' is {where.host}"
            raise ServiceError(422, "ImagePull", f"{message}: its credentials go nowhere else")
        if record.secret == _FORGOTTEN:
            message = f"the password of registry '{record.name}' was forgotten when its url or ca_cert changed"
            raise ServiceError(422, "ImagePull", f"{message}: give it again with PATCH")
        try:
            password = self._vault.open(record.secret, record.id) if record.secret else ""
        except VaultError as exc:
            raise ServiceError(422, "ImagePull", str(exc)) from exc
        return Access(where.host, where.plain, record.username or "", password, record.ca or "")

    def _sealed(self, password: str | None, owner: str) -> str | None:
        if not password:
            return None
        try:
            return self._vault.seal(password, owner)
        except VaultError as exc:
            raise ServiceError(503, "ServiceUnavailable", str(exc)) from exc


def _exposes(old: RegistryRecord, new: RegistryRecord) -> bool:
    """Whether a password that was given for the old one may be told elsewhere, in clear, or to whom others vouch for."""
    before, after = parse_registry(old.url), parse_registry(new.url)
    return before.host != after.host or (after.plain and not before.plain) or (old.ca or "") != (new.ca or "")


def _taken(name: str) -> ServiceError:
    return ServiceError(409, "Conflict", f"Registry name '{name}' already in use")

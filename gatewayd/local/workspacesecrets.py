"""The workspace's secrets: given by key, used by proxy rules, never told again; at rest encrypted (`vault`)."""

from __future__ import annotations

from gatewayd.local.clock import Clock
from gatewayd.local.envelope import ServiceError
from gatewayd.local.records import SecretRecord
from gatewayd.local.storage import WriteFailure, refused
from gatewayd.local.store import Store
from gatewayd.local.vault import Vault, VaultError

MAX_SECRETS = 1000
_OWNER = "workspace secret "  # and its key: what a value is sealed for


class WorkspaceSecrets:
    """All secrets of this service."""

    def __init__(self, store: Store, vault: Vault, clock: Clock) -> None:
        self._store = store
        self._vault = vault
        self._clock = clock
        self._by_key = {record.key: record for record in store.secrets.load()}

    def keys(self) -> list[str]:
        """In alphabetical order."""
        return sorted(self._by_key)

    def value(self, key: str) -> str:
        """A secret. Raises KeyError, with a message, when there is none or it cannot be read."""
        record = self._by_key.get(key)
        if record is None:
            raise KeyError(f"there is no workspace secret {key[:80]}")
        try:
            return self._vault.open(record.sealed, _OWNER + key)
        except VaultError as exc:
            raise KeyError(str(exc)) from None

    def put(self, key: str, value: str) -> None:
        """Keep a secret, in place of what was there. Raises ServiceError 422, 503, 507."""
        if key not in self._by_key and len(self._by_key) >= MAX_SECRETS:
            raise ServiceError(422, "InvalidRequest", f"there are {MAX_SECRETS} workspace secrets, the most there can be")
        try:
            record = SecretRecord(key, self._clock.stamp(), self._vault.seal(value, _OWNER + key))
            self._store.secrets.delete(key)
            self._store.secrets.insert(record)
        except VaultError as exc:
            raise ServiceError(503, "ServiceUnavailable", str(exc)) from exc
        except WriteFailure as exc:
            raise refused(exc) from exc
        self._by_key[key] = record

    def delete(self, key: str) -> None:
        """Raises ServiceError 404, 507."""
        if key not in self._by_key:
            raise ServiceError(404, "NotFound", f"Workspace secret '{key[:200]}' not found")
        try:
            self._store.secrets.delete(key)
        except WriteFailure as exc:
            raise refused(exc) from exc
        del self._by_key[key]

"""The network of all sandboxes of one service."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gatewayd.local.clock import Clock
from gatewayd.local.egress.addresses import Reach
from gatewayd.local.egress.gate import Gate, World
from gatewayd.local.egress.journal import Journal
from gatewayd.local.egress.policy import Policy
from gatewayd.local.egress.resolver import Lookup, system_lookup
from gatewayd.local.egress.trust import install
from gatewayd.local.runtime.base import Box, Network
from gatewayd.local.store import Store
from gatewayd.local.vault import Vault, VaultError
from gatewayd.local.workspacesecrets import WorkspaceSecrets

log = logging.getLogger(__name__)


def system_trust() -> ssl.SSLContext:
    """Whom this machine trusts (SSL_CERT_FILE and SSL_CERT_DIR are heeded)."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


class Egress:
    """Makes gates, and keeps what outlives them: secrets, the authority, journals."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        reach: Reach | None = None,
        lookup: Lookup = system_lookup,
        trust: Callable[[], ssl.SSLContext] = system_trust,
    ) -> None:
        """`trust` makes the context that servers' certificates are checked with; called once, when it is needed."""
        self._folder: Path = store.folder
        self._vault = Vault(store.folder)
        self._clock = clock
        self.secrets = WorkspaceSecrets(store, self._vault, clock)
        self._reach = reach or Reach()
        self._journals: dict[str, Journal] = {}  # by the sandbox's id
        self._trust = trust
        self._upstream: ssl.SSLContext | None = None  # set when the first connection is intercepted
        self._authority: Any = None  # authority.Authority, then
        self._world = World(self._reach, lookup, self._leaf, self._server_trust)

    @property
    def network(self) -> Network:
        """What a runtime is told to let out."""
        return self._reach.network()

    def seal(self, box_id: str, value: str) -> str:
        """A value, encrypted for one sandbox. Raises ValueError."""
        try:
            return self._vault.seal(value, box_id)
        except VaultError as exc:
            raise ValueError(str(exc)) from exc

    def policy(self, box_id: str, config: Mapping[str, Any] | None) -> Policy:
        """A stored proxy_config, ready to be asked."""
        return Policy(config, partial(self._open, box_id), self.secrets.value)

    def _open(self, box_id: str, sealed: str) -> str:
        try:
            return self._vault.open(sealed, box_id)
        except VaultError as exc:
            raise KeyError(str(exc)) from None

    async def enter(self, box_id: str, name: str, box: Box, config: Mapping[str, Any] | None) -> Gate | None:
        """Open the way out of a sandbox that has just started; None where its runtime has none."""
        if not box.gates:
            return None
        policy = self.policy(box_id, config)
        socks, box.gates[:] = list(box.gates), []
        gate = Gate(name, socks, self._world, policy, self.journal(box_id))
        await self._trusted(box, policy)
        return gate

    async def change(self, box_id: str, box: Box, gate: Gate, config: Mapping[str, Any] | None) -> None:
        """Let another proxy_config count from now on."""
        policy = self.policy(box_id, config)
        gate.change(policy)
        await self._trusted(box, policy)

    async def _trusted(self, box: Box, policy: Policy) -> None:
        if policy.needs_authority:
            try:
                await install(box, self._certificates().pem)
            except Exception as exc:  # noqa: BLE001 - its network goes on without: programs inside say what they do not trust
                log.warning("box %s: the certificate authority is not trusted inside: %s", box.spec.id, type(exc).__name__)

    def journal(self, box_id: str) -> Journal:
        """What was decided about one sandbox, since this service started."""
        return self._journals.setdefault(box_id, Journal(self._clock))

    def forget(self, box_id: str) -> None:
        """A sandbox is gone."""
        if (journal := self._journals.pop(box_id, None)) is not None:
            journal.close()

    def close(self) -> None:
        """Nothing more will be decided; idempotent."""
        for journal in self._journals.values():
            journal.close()

    def _certificates(self) -> Any:
        if self._authority is None:
            from gatewayd.local.egress.authority import Authority  # only now: most services intercept nothing

            self._authority = Authority(self._folder)
        return self._authority

    def _leaf(self, host: str) -> ssl.SSLContext:
        context: ssl.SSLContext = self._certificates().context(host)
        return context

    def _server_trust(self) -> ssl.SSLContext:
        if self._upstream is None:
            self._upstream = self._trust()
        return self._upstream

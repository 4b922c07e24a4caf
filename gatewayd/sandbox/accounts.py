"""Which service a request means, and the warm connections to it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable

from gatewayd.api import PROFILE_LOCAL
from gatewayd.config import Caller, Profile, Proxies, Settings
from gatewayd.sandbox.embedded import Embedded
from gatewayd.sandbox.rest_client import Access, FixedAccess, RestClient
from gatewayd.tasks import TaskOwner

log = logging.getLogger(__name__)

ACCOUNTS_MAX = 32  # profiles with warm connections; the longest unused one goes first


class LocalAccess:
    """The embedded service: started when it is needed, found again when it has moved."""

    def __init__(self, embedded: Embedded) -> None:
        self.name = PROFILE_LOCAL
        self._embedded = embedded

    async def current(self) -> Profile:
        """Its profile. Raises GatewayError when the service cannot be started."""
        return await self._embedded.ensure()


class Account:
    """One profile in use."""

    def __init__(self, key: Hashable, access: Access, proxies: Proxies) -> None:
        self.key = key  # equal keys share links
        self.name = access.name  # of the profile
        self.access = access
        self.proxies = proxies
        self.rest = RestClient(access, proxies)


class Accounts:
    """The accounts of this daemon, made on first use."""

    def __init__(self, settings: Settings, embedded: Embedded) -> None:
        self._settings = settings
        self._local = Account(PROFILE_LOCAL, LocalAccess(embedded), settings.current().proxies)
        self._others: OrderedDict[Profile, Account] = OrderedDict()  # least recently used first
        self._tasks = TaskOwner("accounts")  # closes what was pushed out

    def select(self, caller: Caller) -> Account:
        """The account a request means (`Config.resolve`). Raises GatewayError, kind config."""
        config = self._settings.current()
        profile = config.resolve(caller)
        if profile is None:
            return self._local
        account = self._others.get(profile)
        if account is None:
            account = self._others[profile] = Account(profile, FixedAccess(profile), config.proxies)
            if len(self._others) > ACCOUNTS_MAX:
                _, oldest = self._others.popitem(last=False)
                self._tasks.start(oldest.rest.aclose(), f"close {oldest.name}")
        self._others.move_to_end(profile)
        return account

    async def aclose(self) -> None:
        """Close every warm connection; idempotent."""
        await self._tasks.aclose()
        others, self._others = list(self._others.values()), OrderedDict()
        for account in [*others, self._local]:
            await account.rest.aclose()

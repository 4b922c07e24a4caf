"""The gateway without its daemon."""

from __future__ import annotations

from dataclasses import dataclass

from gatewayd.config import Settings
from gatewayd.frontends.tcp import Forwards
from gatewayd.sandbox.accounts import Accounts
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.embedded import Embedded
from gatewayd.sandbox.guest_client import Guests
from gatewayd.sandbox.pool import Pool


@dataclass
class Parts:
    """Put together as the daemon does it."""

    settings: Settings
    accounts: Accounts
    directory: Directory
    pool: Pool
    forwards: Forwards
    embedded: Embedded
    guests: Guests

"""What a line of the route table is: a request's parts, an answer, and the parts of the daemon that handlers act on."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gatewayd.api import ErrorKind
from gatewayd.config import Caller, Settings
from gatewayd.errors import GatewayError
from gatewayd.frontends.fields import Fields
from gatewayd.frontends.tcp import Forwards
from gatewayd.sandbox.accounts import Account, Accounts
from gatewayd.sandbox.boxes import Directory
from gatewayd.sandbox.embedded import Embedded
from gatewayd.sandbox.pool import Pool


@dataclass
class Services:
    """The parts of the daemon that routes act on."""

    settings: Settings
    accounts: Accounts
    directory: Directory
    pool: Pool
    forwards: Forwards
    embedded: Embedded
    stop: Callable[[bool], None]  # begins the daemon's stop; True: leave the embedded service running
    started_at: float = field(default_factory=time.time)  # Unix time
    carrier: Callable[[Account, str], str] = lambda account, sandbox: ""  # what carries ssh and exec there; "": not known yet


@dataclass(frozen=True)
class Call:
    """One request."""

    caller: Caller
    path: Mapping[str, str]  # what the route's {placeholders} stand for
    query: Fields  # numbers are still text
    body: Fields


@dataclass(frozen=True)
class Reply:
    """One answer."""

    body: Any = None  # JSON; None: no content
    status: int = 200


Handler = Callable[[Services, Call], Awaitable[Reply]]


@dataclass(frozen=True)
class Route:
    """One line of the table."""

    verb: str
    path: str  # below /v1
    handler: Handler
    summary: str
    fields: tuple[str, ...] = ()  # of the request's JSON body
    query: tuple[str, ...] = ()  # query parameters


def digits(query: Fields, name: str, default: int) -> int:
    """A whole number among query parameters. Raises GatewayError (usage)."""
    text = query.text(name, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise GatewayError(f"{name} must be a whole number", kind=ErrorKind.USAGE)
    return int(text)

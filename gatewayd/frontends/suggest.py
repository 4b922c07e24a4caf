"""A hint for a name that is not known: the nearest one that is."""

from __future__ import annotations

import asyncio
from difflib import get_close_matches

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import list_boxes

LOOK_MAX = 1000  # sandboxes that are looked through
LOOK_DEADLINE = 5.0  # seconds: an error must not take long


async def hint_nearest(exc: GatewayError, account: Account, sandbox: str) -> None:
    """Give an error about an unknown sandbox a hint, unless it has one; never raises."""
    if exc.kind != ErrorKind.NOT_FOUND or exc.hint:
        return
    try:
        async with asyncio.timeout(LOOK_DEADLINE):
            boxes = await list_boxes(account.rest, {}, LOOK_MAX, 0)
    except (GatewayError, TimeoutError):
        return  # the first error is the one to tell
    known = [name for box in boxes if isinstance(name := box.get("name"), str)]
    if near := get_close_matches(sandbox[:64], known, n=1):
        exc.hint = f"did you mean {printable(near[0], 64)!r}?"
    else:
        exc.hint = "`sandbox list` shows those there are" if known else "there are no sandboxes; `sandbox create` makes one"

"""The route of control.sock about what a sandbox reached of the network. Only the embedded service has it."""

from __future__ import annotations

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError, printable
from gatewayd.frontends.table import Call, Reply, Route, Services, digits
from gatewayd.sandbox.rest_client import box_path

WAIT_MAX = 25  # seconds a caller may wait for news
_DEADLINE = 30.0  # seconds beyond that


async def get_egress(services: Services, call: Call) -> Reply:
    call.query.only("after", "wait")
    account, name = services.accounts.select(call.caller), call.path["name"]
    wait = min(digits(call.query, "wait", 0), WAIT_MAX)
    params = {"after": digits(call.query, "after", 0), "wait": wait}
    action = f"get the network decisions of sandbox {printable(name, 80)!r}"
    path = box_path(name, "egress")
    found = await account.rest.call("GET", path, action=action, sandbox=name, params=params, deadline=_DEADLINE + wait)
    decisions = found.get("decisions") if isinstance(found, dict) else None
    if not isinstance(decisions, list):
        raise GatewayError(f"cannot {action}: the service does not tell them", kind=ErrorKind.UNAVAILABLE)
    return Reply({"decisions": [one for one in decisions if isinstance(one, dict)]})


EGRESS_ROUTES = (
    Route("GET", "/sandboxes/{name}/egress", get_egress, "What a sandbox reached of the network", query=("after", "wait")),
)

"""Errors as the wire shows them: ``{"detail": {"error", "message", "error_id"}}`` (protocol section 1, *errors*)."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

log = logging.getLogger(__name__)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

STATUS_TYPES = {  # the "error" of answers that no handler of ours made
    400: "InvalidRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    408: "Timeout",
    409: "Conflict",
    413: "PayloadTooLarge",
    426: "UpgradeRequired",
    503: "ServiceUnavailable",
    507: "StorageFull",
}


class ServiceError(Exception):
    """A request that cannot be done, told to the client.

    Attributes:
        status: HTTP status.
        error: the type, as clients branch on it.
        message: one sentence; no host path, no secret.
        error_id: names this one failure; the log has it too.
    """

    def __init__(self, status: int, error: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = error
        self.message = printable(message)
        self.error_id = new_error_id()


def new_error_id() -> str:
    """A fresh id that joins an answer and its log line."""
    return uuid.uuid4().hex[:16]


def printable(text: str, limit: int = 2000) -> str:
    """`text` without control characters, at most `limit` characters: what comes from a client or a sandbox is hostile."""
    return _CONTROL.sub("?", text[:limit])


def not_found(name: str) -> ServiceError:
    """There is no such sandbox."""
    return ServiceError(404, "NotFound", f"Sandbox '{name[:200]}' not found")


def unsupported(message: str) -> ServiceError:
    """The request asks for something this service does not do."""
    return ServiceError(422, "Unsupported", message)


def envelope(error: str, message: str, error_id: str) -> dict[str, Any]:
    """The body of an error answer."""
    return {"detail": {"error": error, "message": message, "error_id": error_id}}


def error_response(exc: ServiceError, where: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer for `exc`, and its log line; `where` is the method and path."""
    log.info("%s: %d %s: %s (error_id=%s)", printable(where, 300), exc.status, exc.error, exc.message, exc.error_id)
    return JSONResponse(envelope(exc.error, exc.message, exc.error_id), exc.status, headers=dict(headers or {}))


def internal_response(exc: BaseException, where: str) -> JSONResponse:
    """The answer to a defect of ours: nothing of it but the id that finds it in the log."""
    error_id = new_error_id()
    log.error("%s: 500 InternalError (error_id=%s)", printable(where, 300), error_id, exc_info=exc)
    return JSONResponse(envelope("InternalError", "the service failed; its log has the details under this id", error_id), 500)


def validation_response(errors: Sequence[Mapping[str, Any]], where: str) -> JSONResponse:
    """422 with one entry per refused value. The value itself is not repeated: it may be a secret.

    The SDK takes only entries of type "value_error" for bad input, whatever was wrong with it.
    """
    details = [
        {
            "loc": list(entry.get("loc", ())),
            "msg": printable(str(entry.get("msg", "")).removeprefix("Value error, ")),
            "type": "value_error",
        }
        for entry in errors
    ]
    summary = "; ".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in details[:5])
    log.info("%s: 422 %s", printable(where, 300), printable(summary, 500))
    return JSONResponse({"detail": details}, 422)

"""DNS messages (RFC 1035), as far as a sandbox's resolver needs them: one question in, its answer out. Pure.

A query that makes no sense is answered FORMERR if it has an id, or not at all; nothing is raised.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

A, PTR, AAAA, ANY = 1, 12, 28, 255  # types
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5  # response codes
MAX_MESSAGE = 4096  # bytes of a query that are looked at
_HEADER = 12
_RESPONSE, _RECURSION_DESIRED, _RECURSION_AVAILABLE = 0x8000, 0x0100, 0x0080
_IN = 1  # class


@dataclass(frozen=True)
class Query:
    """One question."""

    identity: int
    flags: int
    name: str  # as asked, without the final dot; characters that no host name has are in it
    kind: int
    question: bytes  # as it came: repeated in the answer


def parse(data: bytes) -> Query | bytes | None:
    """The question of a query; or the answer to one that makes no sense; or None for what is not answered."""
    if len(data) < _HEADER or len(data) > MAX_MESSAGE:
        return None
    identity, flags, questions, _, _, _ = struct.unpack_from(">6H", data)
    if flags & _RESPONSE:
        return None
    if flags & 0x7800:  # not a standard query
        return _header(identity, flags, NOTIMP, 0, 0)
    if questions != 1:
        return _header(identity, flags, FORMERR, 0, 0)
    labels, at, size = [], _HEADER, 0
    while at < len(data) and data[at]:
        length = data[at]
        size += length + 1
        if length > 63 or size > 255 or at + 1 + length > len(data):  # compression makes no sense in a question
            return _header(identity, flags, FORMERR, 0, 0)
        labels.append(data[at + 1 : at + 1 + length].decode("latin-1"))
        at += 1 + length
    if at + 5 > len(data):
        return _header(identity, flags, FORMERR, 0, 0)
    kind, klass = struct.unpack_from(">2H", data, at + 1)
    query = Query(identity, flags, ".".join(labels), kind, data[_HEADER : at + 5])
    return query if klass == _IN else answer(query, NOTIMP)


def answer(query: Query, code: int, address: bytes = b"", ttl: int = 0) -> bytes:
    """The answer to a query: a code, and at most one address of the type that was asked for, for `ttl` seconds."""
    head = _header(query.identity, query.flags, code, 1, 1 if address else 0)
    record = struct.pack(">3HIH", 0xC000 | _HEADER, query.kind, _IN, ttl, len(address)) + address if address else b""
    return head + query.question + record


def _header(identity: int, flags: int, code: int, questions: int, answers: int) -> bytes:
    answered = _RESPONSE | _RECURSION_AVAILABLE | (flags & _RECURSION_DESIRED) | (flags & 0x7800) | code
    return struct.pack(">6H", identity, answered, questions, answers, 0, 0)

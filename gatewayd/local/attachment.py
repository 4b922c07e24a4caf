"""Clients reading a command's output, each from its own offsets: as text (/execute/ws) or as bytes (/execute/stream)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gatewayd.local.agentforward import AgentClient
from gatewayd.local.pipes import OutputPipe
from gatewayd.local.ring import decode_held

if TYPE_CHECKING:
    from gatewayd.local.commands import CommandSession

CHUNK = 64 * 1024  # bytes of output in one message at most

StreamName = Literal["stdout", "stderr"]


@dataclass(frozen=True)
class Chunk:
    """A piece of output as text."""

    stream: StreamName
    offset: int  # of its first byte in the stream
    text: str
    size: int  # bytes it stands for


@dataclass(frozen=True)
class Piece:
    """A piece of output as it is."""

    stream: StreamName
    offset: int  # of its first byte in the stream
    data: bytes


class Cursor:
    """How far one client has read one stream."""

    def __init__(self, name: StreamName, pipe: OutputPipe, offset: int) -> None:
        self.name: StreamName = name
        self.pipe = pipe
        self.offset = pipe.ring.clamp(offset)  # of the next byte to deliver

    def take(self, final: bool) -> Chunk | None:
        """The next piece of text, or None when there is none yet. With `final` a cut-off character is delivered too."""
        ring = self.pipe.ring
        start = ring.clamp(self.offset)
        data = ring.read(start, CHUNK)
        text, size = decode_held(data, final and start + len(data) == ring.end)
        if not size:
            return None
        self.offset = start + size
        return Chunk(self.name, start, text, size)

    def take_bytes(self) -> Piece | None:
        """The next bytes, or None when there are none yet."""
        start = self.pipe.ring.clamp(self.offset)
        data = self.pipe.ring.read(start, CHUNK)
        self.offset = start + len(data)
        return Piece(self.name, start, data) if data else None


class Attachment:
    """A client reading a command's output. Close it when done."""

    def __init__(
        self, session: CommandSession, cursors: list[Cursor], *, acknowledges: bool = False, agent: AgentClient | None = None
    ) -> None:
        self.cursors = cursors  # one per stream
        self.wake = asyncio.Event()  # set by the session when there may be something new
        self.acknowledges = acknowledges  # what was delivered counts as received only when the client says so
        self.agent = agent  # channels to this client's SSH agent; None: it is not asked
        self._session = session

    async def read(self) -> list[Chunk]:
        """The next pieces of output, as they come; an empty list when the command has ended and all is delivered."""
        while True:
            self.wake.clear()
            final = self._session.outcome is not None
            chunks = [chunk for cursor in self.cursors if (chunk := cursor.take(final)) is not None]
            if chunks:
                self._session.update_flow()
                return chunks
            if final:
                return []
            await self.wake.wait()

    def take_bytes(self) -> list[Piece]:
        """The next bytes of each stream that has some; does not wait. Clear `wake` before, to wait on it after."""
        pieces = [piece for cursor in self.cursors if (piece := cursor.take_bytes()) is not None]
        if pieces:
            self._session.update_flow()
        return pieces

    async def read_bytes(self) -> list[Piece]:
        """The next bytes, as they come; an empty list when the command has ended and all is delivered."""
        while True:
            self.wake.clear()
            final = self._session.outcome is not None
            if (pieces := self.take_bytes()) or final:
                return pieces
            await self.wake.wait()

    def close(self) -> None:
        """Stop reading; idempotent."""
        if self.agent is not None:
            self.agent.close()
        self._session.detach(self)

"""The frames a yamux session has not sent yet: control before data, both counted. Pure."""

from __future__ import annotations

from collections import deque
from typing import Final

from gatewayd.yamux.frames import HEADER_SIZE, Flag, FrameType, encode_header

_EMPTY: Final = memoryview(b"")


class Outbox:
    """Two queues of encoded frames; control frames overtake data, so a ping never waits behind a bulk transfer."""

    def __init__(self) -> None:
        self._control: deque[bytes] = deque()  # SYN, ACK, ping, go away, refusals: frames with no data before them
        # Header and payload of DATA frames, and of the FIN and RST that must stay behind them. In pairs, since a control
        # frame that slipped in between would be taken for payload.
        self._data: deque[tuple[bytes, memoryview]] = deque()
        self._data_size = 0  # bytes in _data

    def __bool__(self) -> bool:
        return bool(self._control or self._data)

    @property
    def control_size(self) -> int:
        """Bytes of control frames."""
        return HEADER_SIZE * len(self._control)

    @property
    def data_size(self) -> int:
        """Bytes of DATA frames, FINs and RSTs, headers included."""
        return self._data_size

    def push_control(self, frame_type: FrameType, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame that may overtake data."""
        self._control.append(encode_header(frame_type, flags, stream_id, length))

    def push_behind_data(self, flags: int, stream_id: int) -> None:
        """Queue an empty frame with FIN or RST behind what was written before it."""
        self._data.append((encode_header(FrameType.WINDOW_UPDATE, flags, stream_id, 0), _EMPTY))
        self._data_size += HEADER_SIZE

    def push_data(self, stream_id: int, payload: memoryview) -> None:
        """Queue one DATA frame; `payload` is not copied and must not change."""
        self._data.append((encode_header(FrameType.DATA, Flag.NONE, stream_id, len(payload)), payload))
        self._data_size += HEADER_SIZE + len(payload)

    def take(self, limit: int) -> list[bytes | memoryview]:
        """Remove and return whole frames up to `limit` bytes: control first, then data, of each at least one."""
        count = min(len(self._control), max(1, limit // HEADER_SIZE))
        parts: list[bytes | memoryview] = [self._control.popleft() for _ in range(count)]
        left = limit - HEADER_SIZE * count
        first = True  # one always goes, or a flood of control frames could hold data up for ever
        while self._data and (first or HEADER_SIZE + len(self._data[0][1]) <= left):
            frame = self._data.popleft()
            size = HEADER_SIZE + len(frame[1])
            left -= size
            self._data_size -= size
            parts += frame
            first = False
        return parts

    def clear(self) -> None:
        """Drop everything."""
        self._control.clear()
        self._data.clear()
        self._data_size = 0

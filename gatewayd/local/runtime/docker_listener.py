"""A Unix socket inside a container, relayed over one exec: `docker_relay.LISTEN` accepts there, and needs python3 in the image.

Each connection is one end of a socket pair here. What the relay says is checked: it belongs to the sandbox, so it can open
connections and close them, and makes nothing grow.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import errno
import os
import socket
from collections.abc import Callable

from gatewayd.local.runtime import docker_relay
from gatewayd.local.runtime.base import SOCKET_PATH, RuntimeFailure
from gatewayd.local.runtime.docker_exec import Execs
from gatewayd.local.runtime.docker_pump import LIMIT, Outlet, Pump
from gatewayd.local.runtime.docker_wire import STDOUT, Record, new_token
from gatewayd.tasks import TaskOwner

_START_DEADLINE = 20.0  # seconds for the relay to start and make its socket
_REMOVE_DEADLINE = 5.0  # seconds for it to remove the socket and end
_MAX_CONNECTIONS = 128  # relayed at once; more are closed
_PIECE = 8192  # bytes in one record or line: base64 makes them fit a record
_MAX_NUMBER = 10  # digits of a connection's number


class _Connection:
    """One connection: the relay's end of a socket pair, one piece of data under way in each direction."""

    def __init__(self, number: str, say: Callable[[str], None], gone: Callable[[_Connection], None]) -> None:
        self.number = number
        self._say = say  # sends a line to the relay
        self._gone = gone  # called once, when nothing of this connection is left
        self._loop = asyncio.get_running_loop()
        self._sock, self.theirs = socket.socketpair()
        self._sock.setblocking(False)
        self.theirs.setblocking(False)
        self._outlet = Outlet(self._sock.fileno(), self._outlet_ended)
        self._unacknowledged = False  # the relay's last piece is not yet with the reader
        self._over = False  # the relay's connection is gone
        self._reading = False  # the loop watches for what the reader writes
        self.read()

    def read(self) -> None:
        """The relay has passed the last piece on: the next one may go."""
        if not self._reading and not self._over and self._sock.fileno() >= 0:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._readable)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        self._pause()
        if data:
            self._say(f"data {self.number} {binascii.b2a_base64(data, newline=False).decode()}")
        else:
            self._say(f"close {self.number}")
            self.close()

    def write(self, data: bytes) -> bool:
        """Pass a piece on to the reader; False when the last one was not acknowledged yet."""
        if self._unacknowledged:
            return False
        self._unacknowledged = True
        self._outlet.queue(data)
        self._outlet.mark(self._delivered)
        return True

    def _delivered(self) -> None:
        self._unacknowledged = False
        if not self._over:
            self._say(f"ack {self.number}")

    def end(self) -> None:
        """The relay's connection sends no more."""
        self._outlet.end()

    def finish(self) -> None:
        """The relay's connection is gone: what was said before still reaches the reader."""
        self._over = True
        self._pause()
        self._outlet.end()
        if self._outlet.closed:
            self.close()

    def _outlet_ended(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        if self._over:
            self.close()

    def close(self) -> None:
        """Let go at once; idempotent."""
        if self._sock.fileno() < 0:
            return
        self._over = True
        self._pause()
        self._outlet.close()
        if self._sock.fileno() >= 0:  # the outlet's end may have come here already
            self._sock.close()
            self._gone(self)


class DockerListener:
    """See `base.UnixListener`."""

    def __init__(self, pump: Pump, tasks: TaskOwner, path: str, on_connection: Callable[[socket.socket], None]) -> None:
        self.path = path
        self._on_connection = on_connection
        self._connections: dict[str, _Connection] = {}  # by the relay's numbers, from "new" to "close" of either side
        self._finishing: set[_Connection] = set()  # closed by the relay, with bytes that wait for their reader
        source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._lines = Outlet(sink)  # to the relay's stdin
        self._closed = False  # set by close, or by the end of the relay
        try:
            inward = tasks.start(pump.inward(source), "listener in")
        except RuntimeError:
            os.close(source)
            self._lines.close()
            raise
        inward.add_done_callback(lambda _: os.close(source))
        self._relay = tasks.start(pump.outward({}, self._record), "listener out")

        def ended(_: object) -> None:
            self.close()
            inward.cancel()
            inward.add_done_callback(lambda _: pump.close())  # not while it may still wait for that descriptor

        self._relay.add_done_callback(ended)

    def _say(self, line: str) -> None:
        if self._lines.waiting > LIMIT:  # an honest relay reads
            self.close()
        else:
            self._lines.queue(line.encode() + b"\n")

    def _record(self, stream: int, record: Record) -> None:
        if self._closed or stream != STDOUT:
            return
        word, _, rest = record.text.partition(" ")
        number, _, data = rest.partition(" ")
        if not (number.isascii() and number.isdecimal()) or len(number) > _MAX_NUMBER:
            return
        connection = self._connections.get(number)
        if word == "new" and connection is None:
            self._new(number)
        elif connection is None:
            return  # closed from here, while this was under way
        elif word == "data":
            try:
                ordered = connection.write(binascii.a2b_base64(data))
            except ValueError:
                ordered = False
            if not ordered:
                self.close()
        elif word == "ack":
            connection.read()
        elif word == "eof":
            connection.end()
        elif word == "close":
            self._finishing.add(connection)
            del self._connections[number]
            connection.finish()

    def _new(self, number: str) -> None:
        if len(self._connections) + len(self._finishing) >= _MAX_CONNECTIONS:
            self._say(f"close {number}")
            return
        connection = _Connection(number, self._say, self._gone)
        self._connections[number] = connection
        self._on_connection(connection.theirs)

    def _gone(self, connection: _Connection) -> None:
        self._finishing.discard(connection)
        if self._connections.get(connection.number) is connection:
            del self._connections[connection.number]

    def close(self) -> None:
        """Accept no more, and have the socket and its folder removed; idempotent."""
        if self._closed:
            return
        self._closed = True
        for connection in [*self._connections.values(), *self._finishing]:
            connection.close()
        self._lines.end()  # the relay removes what it made

    async def removed(self) -> None:
        """Wait until socket and folder are removed, for a few seconds at most."""
        await asyncio.wait([self._relay], timeout=_REMOVE_DEADLINE)


async def listen(
    execs: Execs, tasks: TaskOwner, user: str | None, on_connection: Callable[[socket.socket], None]
) -> DockerListener:
    """Start the relay and have it make its socket. Raises OSError, RuntimeFailure."""
    token = new_token()
    argv = ["/usr/bin/env", "python3", "-I", "-S", "-c", docker_relay.LISTEN, token]
    exec_id, sock, early = await execs.open(argv, user=user)
    pump = Pump(sock, early, token, framed=True)
    try:
        async with asyncio.timeout(_START_DEADLINE):
            first = await pump.first()
            if not isinstance(first, Record):
                await execs.started(exec_id, user, first)
                raise RuntimeFailure("the image has no python3 to relay a socket")
        word, _, said = first.text.partition(" ")
        if word == "refused":
            code = int(said) if said.isdecimal() and len(said) < 5 else 0
            code = code if code in errno.errorcode else errno.EIO
            raise OSError(code, os.strerror(code))
        if word != "open" or not SOCKET_PATH.fullmatch(said):
            raise RuntimeFailure("the sandbox's relay gave no socket")
        return DockerListener(pump, tasks, said, on_connection)
    except TimeoutError:
        pump.close()
        raise RuntimeFailure(f"the sandbox's relay did not start within {_START_DEADLINE:.0f} s") from None
    except RuntimeError as exc:  # the box is closing
        pump.close()
        raise RuntimeFailure("the sandbox has ended") from exc
    except BaseException:
        pump.close()
        raise

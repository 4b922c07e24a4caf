"""The guest: processes, connections and listeners of a sandbox, for clients that come back (docs/guest-protocol.md).

This one file is put into the sandbox and started there. It needs Linux, Python 3.6, and of the standard library no more than
Debian's ``python3-minimal`` has; hence the numbers of ioctls, the quoted annotations and the few imports.

    guest.py start           start the guest, or find the one that runs; print where it listens
    guest.py start others    likewise; print as well where guests of other versions of this file listen
    guest.py sftp            serve SFTP version 3 on standard input and output

One process and one thread: everything but SFTP is non-blocking in one epoll loop. A client that knows the token is trusted, and
held to every limit all the same. From top to bottom: fields and accounts, the loop, connections (`Link`), the numbered frames of
a session (`Session`), what a session does (`Work` and below), SFTP, starting.
"""

import errno
import fcntl
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections import deque
from heapq import heapify, heappop, heappush
from itertools import islice

try:
    import grp
    import pwd
except ImportError:  # a Python without them: ids have no names
    grp = pwd = None  # type: ignore[assignment]
try:
    import resource

    LIMITS = True
except ImportError:  # python3-minimal: the limit on open files stays as it is
    LIMITS = False

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    Pair = tuple[str, bytes | str | int]  # a field
    Buffers = deque[bytes | memoryview]

MAGIC = b"GWG1"
PREFACE = struct.Struct(">4s32s16sBQ")  # magic, token, session id, mode, received
ANSWER = struct.Struct(">BQQI")  # status, received, base, credit
HEADER = struct.Struct(">BI")  # type, length of the payload
COUNT = struct.Struct(">Q")
CREDIT_SIZE = struct.Struct(">I")
GRANT_SIZES = struct.Struct(">BI")
WINDOW_SIZES = struct.Struct(">4H")

OPEN, INPUT, INPUT_EOF, GRANT, SIGNAL, RESIZE, STOP_OUTPUT, CLOSE = range(0x01, 0x09)
OPENED, OUTPUT, ERROUT, OUTPUT_EOF, CREDIT, EXIT, ERROR, ACCEPTED, INPUT_STOP, ITEM = range(0x41, 0x4B)
ACK, DETACHED = 0x80, 0x81
STREAMS = {OUTPUT: 1, ERROUT: 2}  # type of frame → stream

MAX_PAYLOAD = 262144  # bytes
INPUT_WINDOW = 262144  # bytes of input before the first CREDIT
DEFAULT_WINDOW, MAX_WINDOW = 1048576, 16777216  # bytes of output of each stream before the first GRANT; of input once opened
DEFAULT_LINGER, MAX_LINGER = 300, 604800  # seconds
ACK_BYTES, ACK_SECONDS = 65536, 0.5  # when received bytes are acknowledged at the latest
CONTROL_LIMIT = 8388608  # cost of kept frames beyond all output, at which a client that acknowledges nothing has failed
FRAME_COST = 64  # bytes that a kept frame costs beside its payload, about
MERGE_SIZE = 4096  # bytes up to which output that nobody fetches becomes one frame
MAX_SESSIONS, MAX_ACCEPTED, MAX_STRANGERS = 1024, 128, 128
PREFACE_SECONDS = 10.0
FETCH_SECONDS = 30.0  # for an accepted connection to be fetched
CONNECT_SECONDS = 30.0  # for a name to be resolved and all its addresses to be tried
KILL_SECONDS = 5.0  # from SIGHUP to SIGKILL
DRAIN_SECONDS = 0.1  # a terminal's last output is on its way that long after its process has ended, at most
CLOSE_SECONDS = 5.0  # for a client to take the last frames
IDLE_SECONDS = 3600.0
START_SECONDS = 15.0  # for another `start` to be done
ANSWER_SECONDS, OTHER_SECONDS = 5.0, 1.0  # for a guest of this file, and for one of another version, to answer `start`
MAX_OTHERS, OTHERS_TRIED = 4, 8  # guests of other versions that are told of, and that are asked

BASE_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NOT_INHERITED = {b"_", b"PWD", b"OLDPWD", b"SHLVL", b"TERM", b"LINES", b"COLUMNS"}  # of whoever started the guest
NOT_FOR_OTHERS = {b"XDG_RUNTIME_DIR", b"DBUS_SESSION_BUS_ADDRESS", b"MAIL", b"SSH_AUTH_SOCK"}  # another user's
SIGNALS = {  # names that a client may send
    name: int(getattr(signal, "SIG" + name))
    for name in (
        *("ABRT", "ALRM", "CHLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "KILL", "PIPE", "PROF", "QUIT", "SEGV", "STOP"),
        *("SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ"),
    )
}
KINDS = {errno.ENOENT: "not-found", errno.ENOTDIR: "not-found", errno.ECONNREFUSED: "refused"}  # errno → kind of an ERROR
KINDS.update({errno.EACCES: "permission", errno.EPERM: "permission"})
AGAIN = (errno.EAGAIN, errno.EINTR)

# ioctls and fcntls of Linux (asm-generic), which the module termios would have
TCGETS, TCSETS, TIOCSCTTY, TIOCGPGRP, TIOCSWINSZ, FIONREAD = 0x5401, 0x5402, 0x540E, 0x540F, 0x5414, 0x541B
TIOCGPTN, TIOCSPTLCK, TIOCGPTPEER, F_SETPIPE_SZ = 0x80045430, 0x40045431, 0x5441, 1031


class Refused(Exception):
    """What an ERROR frame says."""

    def __init__(self, kind: str, message: str, number: int = 0) -> None:
        Exception.__init__(self, message)
        self.kind = kind  # usage, not-found, refused, permission, failed
        self.number = number  # errno, 0 without one

    @classmethod
    def because(cls, what: str, error: "OSError") -> "Refused":
        number = error.errno or 0
        reason = os.strerror(number) if number else str(error)
        return cls(KINDS.get(number, "failed"), "cannot %s: %s" % (what, reason), number)


def text(value: bytes) -> str:
    """For messages."""
    return value.decode("utf-8", "replace")


def pack(fields: "Iterable[Pair]") -> bytes:
    parts = []
    for key, value in fields:
        raw = value if isinstance(value, bytes) else os.fsencode(str(value))
        parts += [bytes([len(key)]), key.encode("ascii"), struct.pack(">I", len(raw)), raw]
    return b"".join(parts)


class Fields:
    """The payload of an OPEN. Raises Refused for what is not well formed."""

    def __init__(self, data: bytes) -> None:
        self.values = {}  # type: dict[bytes, list[bytes]]
        at = 0
        while at < len(data):
            start = at + 1
            at = start + data[at]
            key, size = data[start:at], data[at : at + 4]
            at += 4 + int.from_bytes(size, "big")
            if len(size) < 4 or at > len(data) or not key:
                raise Refused("usage", "fields are cut off")
            self.values.setdefault(key, []).append(data[start + len(key) + 4 : at])

    def all(self, key: bytes) -> "list[bytes]":
        values = self.values.get(key, [])
        if any(b"\0" in value for value in values):
            raise Refused("usage", "a NUL in %s" % text(key))
        return values

    def one(self, key: bytes) -> bytes:
        return (self.all(key) or [b""])[-1]

    def number(self, key: bytes, default: int, least: int, most: int) -> int:
        value = self.one(key) or b"%d" % default
        if not value.isdigit() or len(value) > 9 or not least <= int(value) <= most:
            raise Refused("usage", "%s must be %d to %d" % (text(key), least, most))
        return int(value)


def started_with() -> "dict[bytes, bytes]":
    """The environment of the guest's start; Python adds LC_CTYPE to its own."""
    try:
        with open("/proc/self/environ", "rb") as file:
            pairs = [setting.partition(b"=") for setting in file.read().split(b"\0")]
        return {name: value for name, equals, value in pairs if name and equals}
    except OSError:
        return dict(os.environb)


ENVIRONMENT = started_with()


class Account:
    """A user of the sandbox."""

    def __init__(self, name: str, uid: int, gid: int, home: str, shell: str) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.home = os.fsencode(home or "/")  # where its processes begin
        self.shell = os.fsencode(shell or "/bin/sh")
        self.own = uid == os.geteuid()  # the guest's own: nothing to switch

    @classmethod
    def named(cls, name: bytes) -> "Account":
        """`name`, empty for the guest's own. Raises Refused."""
        uid = os.geteuid()
        entry = None
        try:
            entry = pwd.getpwnam(os.fsdecode(name)) if name else pwd.getpwuid(uid)
        except (KeyError, AttributeError, ValueError):
            if name:
                raise Refused("not-found", "there is no user %s in the sandbox" % text(name)) from None
        if entry is None:
            return cls(str(uid), uid, os.getegid(), os.environ.get("HOME", "/"), "/bin/sh")
        if uid and entry.pw_uid != uid:
            raise Refused("permission", "cannot run as %s: the guest is not root but uid %d" % (text(name), uid), errno.EPERM)
        home = entry.pw_dir
        if not name and os.path.isdir(os.environ.get("HOME", "")) and os.environ["HOME"] != "/":
            home = os.environ["HOME"]  # the image may have its own idea
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, home, entry.pw_shell)

    def become(self) -> None:
        """Give up root for good. In a child only."""
        if not self.own:
            os.initgroups(self.name, self.gid)
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)

    def environment(self) -> "dict[bytes, bytes]":
        env = {key: value for key, value in ENVIRONMENT.items() if key not in NOT_INHERITED}
        if not self.own:
            env = {key: value for key, value in env.items() if key not in NOT_FOR_OTHERS}
        name = os.fsencode(self.name)
        env.update({b"HOME": self.home, b"USER": name, b"LOGNAME": name, b"SHELL": self.shell})
        env.setdefault(b"PATH", BASE_PATH)
        return env


def close_descriptors(*keep: int) -> None:
    """Close every descriptor but those: for children that do not call exec."""
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        numbers = list(range(4096))
    for fd in numbers:
        if fd not in keep:
            close_quietly(fd)


def close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass


def default_signals() -> None:
    """As a shell would have them, whatever the guest was started with. In a child only."""
    signal.set_wakeup_fd(-1)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):  # those of the C library
                pass


class Timer:
    """One call, later. Ordered by time."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: "Callable[[], None] | None") -> None:
        self.when = when
        self.callback = callback  # None once cancelled

    def __lt__(self, other: "Timer") -> bool:
        return self.when < other.when

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Descriptors and timers."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.watched = {}  # type: dict[int, tuple[int, Callable[[int], None]]]  # descriptor → events, callback
        self.timers = []  # type: list[Timer]  # a heap
        self.rebuild_at = 128  # length of the heap at which cancelled timers are taken out

    def watch(self, fd: int, events: int, callback: "Callable[[int], None]") -> None:
        """Call back at `events`, errors and hang-ups included; `unwatch` before closing."""
        known = self.watched.get(fd)
        if known is None:
            self.epoll.register(fd, events)
        elif known[0] != events:
            self.epoll.modify(fd, events)
        self.watched[fd] = (events, callback)

    def unwatch(self, fd: int) -> None:
        if self.watched.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def after(self, seconds: float, callback: "Callable[[], None]") -> Timer:
        timer = Timer(time.monotonic() + seconds, callback)
        heappush(self.timers, timer)
        if len(self.timers) > self.rebuild_at:
            self.timers = [each for each in self.timers if each.callback]
            heapify(self.timers)
            self.rebuild_at = max(128, 2 * len(self.timers))
        return timer

    def step(self) -> None:
        """Wait, then make every call that is due. A callback may find nothing to do: all descriptors are non-blocking."""
        while self.timers and self.timers[0].callback is None:
            heappop(self.timers)
        wait = max(0.0, self.timers[0].when - time.monotonic()) if self.timers else -1
        for fd, events in self.epoll.poll(min(wait, 3600.0), 64):
            found = self.watched.get(fd)
            if found:
                found[1](events)
        now = time.monotonic()
        while self.timers and self.timers[0].when <= now:
            callback = heappop(self.timers).callback
            if callback:
                callback()


class Link:
    """One TCP connection of a client."""

    def __init__(self, guest: "Guest", sock: socket.socket) -> None:
        self.guest = guest
        self.sock = sock
        self.fd = sock.fileno()
        self.session = None  # type: Session | None  # once the preface is accepted, until the session has another link
        self.received = bytearray()  # a preface or a frame that is not whole
        self.queue = deque()  # type: Buffers  # to be sent
        self.queued = 0  # bytes in it
        self.ack_due = False
        self.closing = False  # nothing is read any more; what is queued is sent, then the connection is closed
        self.closed = False
        self.timer = guest.loop.after(PREFACE_SECONDS, self.close)  # for the preface; for the end
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        guest.loop.watch(self.fd, select.EPOLLIN, self.ready)

    def ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.guest.flush_soon(self)
        if events & ~select.EPOLLOUT:
            self.read()

    def read(self) -> None:
        try:
            data = self.sock.recv(MAX_PAYLOAD)
        except OSError as error:
            if error.errno in AGAIN:
                return
            data = b""
        if not data:
            self.close()
        elif not self.closing:
            self.received += data
            if self.session is None:
                self.preface()
            else:
                self.frames(self.session)

    def preface(self) -> None:
        if len(self.received) < PREFACE.size:
            if not self.received.startswith(MAGIC[: len(self.received)]):
                self.close()
            return
        magic, token, session_id, mode, count = PREFACE.unpack_from(self.received)
        if magic != MAGIC or not same(token, self.guest.token):
            self.close()
            return
        self.timer.cancel()
        self.guest.strangers.pop(self, None)
        del self.received[: PREFACE.size]
        status, session = self.guest.find(session_id, mode, count)
        if session is None:
            self.send(ANSWER.pack(status, 0, 0, 0))
            self.finish()
            return
        base, credit = session.connect(self, mode == 2, count)
        self.session = session
        self.send(ANSWER.pack(0, session.received, base, credit))
        session.pump()
        self.frames(session)

    def frames(self, session: "Session") -> None:
        """Hand over the frames that have arrived whole."""
        at = 0
        data = self.received
        while len(data) - at >= HEADER.size and self.session is session:
            kind, size = HEADER.unpack_from(data, at)
            if size > MAX_PAYLOAD:
                session.violated("a frame of %d bytes" % size)
                break
            end = at + HEADER.size + size
            if len(data) < end:
                break
            with memoryview(data) as view:
                payload = bytes(view[at + HEADER.size : end])
            at = end
            session.take(kind, payload)
        del data[:at]

    def send(self, data: bytes) -> None:
        self.put(data)
        self.guest.flush_soon(self)

    def put(self, data: bytes) -> None:
        self.queue.append(data)
        self.queued += len(data)

    def flush(self) -> None:
        """Send what there is to send, as far as the connection takes it now."""
        if self.closed:
            return
        for _ in range(4):  # then others have their turn
            self.fill()
            if not self.queue:
                break
            try:
                count = self.sock.sendmsg(list(islice(self.queue, 64)))
            except OSError as error:
                if error.errno in AGAIN:
                    break
                self.close()
                return
            self.queued -= count
            advance(self.queue, count)
        if self.closing and not self.queue:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.close()
                return
        self.guest.loop.watch(self.fd, select.EPOLLIN | (select.EPOLLOUT if self.queue else 0), self.ready)

    def fill(self) -> None:
        session = self.session
        if session is None or self.queued >= 2 * MAX_PAYLOAD:
            return
        if self.ack_due:
            self.ack_due = False
            self.put(HEADER.pack(ACK, COUNT.size) + COUNT.pack(session.received))
        while self.queued < 2 * MAX_PAYLOAD:
            frame = session.next_frame()
            if frame is None:
                return
            self.put(HEADER.pack(frame.kind, len(frame.payload)))
            if frame.payload:
                self.put(frame.payload)

    def detach(self, reason: bytes) -> None:
        """Another connection has the session now."""
        self.session = None
        self.send(HEADER.pack(DETACHED, len(reason)) + reason)
        self.finish()

    def finish(self) -> None:
        """Send what is queued, then close. Idempotent."""
        if self.closing or self.closed:
            return
        if self.session is not None:
            self.fill()
            self.session.disconnected()
            self.session = None
        self.closing = True
        self.timer = self.guest.loop.after(CLOSE_SECONDS, self.close)
        self.guest.flush_soon(self)

    def close(self) -> None:
        """Idempotent."""
        if self.closed:
            return
        self.closed = True
        self.timer.cancel()
        self.guest.loop.unwatch(self.fd)
        self.sock.close()
        self.queue.clear()
        self.guest.strangers.pop(self, None)
        self.guest.links.discard(self)
        if self.session is not None:
            self.session.disconnected()
            self.session = None
        self.guest.check_idle()


def same(left: bytes, right: bytes) -> bool:
    """Whether two tokens are equal, in a time that says nothing about where they differ."""
    different = len(left) ^ len(right)
    for one, other in zip(left, right):
        different |= one ^ other
    return different == 0


def advance(queue: "Buffers", count: int) -> None:
    """Take `count` bytes off the front."""
    while count:
        size = len(queue[0])
        if count < size:
            queue[0] = memoryview(queue[0])[count:]
            return
        queue.popleft()
        count -= size


class Frame:
    """A numbered frame that is kept until it is acknowledged."""

    __slots__ = ("end", "kind", "payload", "start")

    def __init__(self, kind: int, payload: bytes, start: int) -> None:
        self.kind = kind
        self.payload = payload
        self.start = start  # number of its first byte
        self.end = start + HEADER.size + len(payload)


class Session:
    """The numbered frames between a client and some work, whatever becomes of the connections in between."""

    def __init__(self, guest: "Guest", session_id: bytes) -> None:
        self.guest = guest
        self.id = session_id
        self.work = None  # type: Work | None  # from OPEN on
        self.link = None  # type: Link | None  # the present connection
        self.name = b""  # a label, for lists
        self.started = int(time.time())
        self.window = DEFAULT_WINDOW
        self.linger = DEFAULT_LINGER  # seconds
        self.drop = False  # whether the oldest output goes while nobody is connected
        self.received = 0  # numbered bytes of the client's
        self.acknowledged = 0  # how many of them the client knows about
        self.ack_timer = None  # type: Timer | None
        self.sent = deque()  # type: deque[Frame]  # handed to the present or the last link
        self.unsent = deque()  # type: deque[Frame]  # not handed to the present link
        self.produced = 0  # numbered bytes of the guest's
        self.sent_high = 0  # how many of them have ever been handed to a link
        self.cost = 0  # memory of all kept frames, about
        self.stored = {1: 0, 2: 0}  # payload of kept frames, by stream
        self.credit = {1: DEFAULT_WINDOW, 2: DEFAULT_WINDOW}  # output that may still be read; below 0 after `drop`
        self.sendable = {1: DEFAULT_WINDOW, 2: DEFAULT_WINDOW}  # output that may still be handed to the link
        self.input_credit = INPUT_WINDOW  # input that the client may still send
        self.taken = 0  # input that was taken and not granted again
        self.input_ended = False  # INPUT_EOF has come
        self.states = {}  # type: dict[bytes, tuple[int, bytes]]  # frames that a client which attaches must know
        self.failed = False  # ERROR is the last frame
        self.over = False  # nothing will follow: the session ends once everything is acknowledged
        self.closed = False
        self.linger_timer = None  # type: Timer | None  # while there is no link

    # -- connections

    def kept(self) -> "deque[Frame]":
        return self.sent + self.unsent

    def base(self) -> int:
        frames = self.sent or self.unsent
        return frames[0].start if frames else self.produced

    def refusal(self, attach: bool, count: int) -> int:
        """The status for a client that has `count` bytes: 0, 3 or 4."""
        if attach:
            return 0 if self.work is not None else 1
        if count < self.base():
            return 3
        return 0 if count == self.produced or any(frame.start == count for frame in self.kept()) else 4

    def connect(self, link: Link, attach: bool, count: int) -> "tuple[int, int]":
        """Go on over `link` (the answer's base and credit). The caller has checked `refusal`."""
        if self.link is not None:
            old, self.link = self.link, None
            old.detach(b"another connection has taken the session over")
        frames = self.kept()
        while not attach and frames and frames[0].end <= count:
            self.forget(frames.popleft())
        self.sent, self.unsent = deque(), frames
        if attach:
            self.attach()
        else:
            self.sendable = {stream: self.credit[stream] + self.stored[stream] for stream in self.credit}
        self.link = link
        if self.linger_timer:
            self.linger_timer.cancel()
        if self.work is not None:
            self.work.joined()
        self.acknowledged = self.received
        pending = sum(CREDIT_SIZE.unpack(frame.payload)[0] for frame in self.unsent if frame.kind == CREDIT)
        return self.base(), max(0, self.input_credit - pending)

    def attach(self) -> None:
        """The client knows nothing: count credit anew, and say once more how things stand."""
        for frame in self.unsent:
            if frame.kind == CREDIT:
                frame.payload = CREDIT_SIZE.pack(0)  # the answer has it all
        self.credit = {stream: self.window - self.stored[stream] for stream in self.credit}
        self.sendable = dict.fromkeys(self.credit, self.window)
        kept = {(frame.kind, frame.payload) for frame in self.unsent}
        for kind, payload in self.states.values():
            if (kind, payload) not in kept:
                self.append(kind, payload)

    def disconnected(self) -> None:
        self.link = None
        if self.closed:
            return
        seconds = self.linger if self.work is not None else min(self.linger, DEFAULT_LINGER)
        self.linger_timer = self.guest.loop.after(seconds, self.close)
        self.pump()  # output that is dropped needs no credit

    def close(self) -> None:
        """The session is over: CLOSE, or nobody came back. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for timer in (self.linger_timer, self.ack_timer):
            if timer:
                timer.cancel()
        if self.work is not None:
            self.work.close()
        if self.link is not None:
            self.link.ack_due = True
            self.link.finish()
        self.guest.sessions.pop(self.id, None)
        self.sent.clear()
        self.unsent.clear()
        self.guest.check_idle()

    # -- what the guest sends

    def emit(self, kind: int, payload: bytes = b"", state: bytes = b"") -> None:
        """Queue a numbered frame. `state` names what every client must know."""
        if self.failed or self.closed:
            return
        if state:
            self.states[state] = (kind, payload)
        self.append(kind, payload)
        if kind == OPENED:
            self.widen()
        if kind != ERROR and self.cost > self.limit() + CONTROL_LIMIT:
            self.violated("nothing is acknowledged")

    def append(self, kind: int, payload: bytes) -> None:
        last = self.unsent[-1] if self.unsent else None
        stream = STREAMS.get(kind, 0)
        small = last is not None and len(last.payload) + len(payload) <= MERGE_SIZE
        if stream and small and last and last.kind == kind and last.start >= self.sent_high:
            last.payload += payload
            last.end += len(payload)
            self.cost += len(payload)
        else:
            last = Frame(kind, payload, self.produced)
            self.unsent.append(last)
            self.cost += len(payload) + FRAME_COST
        self.produced = last.end
        if stream:
            self.stored[stream] += len(payload)
        if self.link is not None:
            self.guest.flush_soon(self.link)
        elif self.drop:
            while sum(self.stored.values()) > self.window or self.cost > self.limit():
                self.forget((self.sent or self.unsent).popleft())

    def next_frame(self) -> "Frame | None":
        """The next frame for the link, which has it from now on."""
        if not self.unsent:
            return None
        frame = self.unsent[0]
        stream = STREAMS.get(frame.kind)
        if stream:
            if self.sendable[stream] < len(frame.payload):
                return None
            self.sendable[stream] -= len(frame.payload)
        self.sent.append(self.unsent.popleft())
        self.sent_high = max(self.sent_high, frame.end)
        return frame

    def forget(self, frame: Frame) -> None:
        self.cost -= len(frame.payload) + FRAME_COST
        if frame.kind in STREAMS:
            self.stored[STREAMS[frame.kind]] -= len(frame.payload)

    def limit(self) -> int:
        """Cost of kept frames at which nothing more is read."""
        return 2 * self.window + MAX_PAYLOAD

    def crowded(self) -> bool:
        return self.cost > self.limit()

    def room(self, stream: int) -> int:
        """How many bytes of output may be read now."""
        size = min(MAX_PAYLOAD, max(1, self.window // 4))
        if self.drop and self.link is None:
            return size
        return 0 if self.crowded() else min(size, self.credit[stream])

    def output(self, stream: int, data: bytes) -> None:
        self.credit[stream] -= len(data)
        self.emit(OUTPUT if stream == 1 else ERROUT, data)

    def output_ended(self, stream: int) -> None:
        self.emit(OUTPUT_EOF, bytes([stream]), state=b"end%d" % stream)

    def widen(self) -> None:
        """From now on the client may send as much at a time as it takes itself."""
        more = self.window - INPUT_WINDOW
        if more > 0:
            self.input_credit += more
            self.emit(CREDIT, CREDIT_SIZE.pack(more))

    def input_taken(self, size: int) -> None:
        """Input was consumed: grant more, in amounts that are worth a frame."""
        self.taken += size
        if self.taken >= INPUT_WINDOW // 4:
            self.input_credit += self.taken
            size, self.taken = self.taken, 0
            self.emit(CREDIT, CREDIT_SIZE.pack(size))

    def input_stopped(self) -> None:
        self.emit(INPUT_STOP, state=b"stop")

    def finished(self) -> None:
        """Nothing will follow."""
        self.over = True
        if not self.sent and not self.unsent:
            self.close()

    def fail(self, refused: Refused) -> None:
        """The last frame."""
        if self.failed or self.closed:
            return
        fields = [("kind", refused.kind), ("message", str(refused))]  # type: list[Pair]
        if refused.number:
            fields.append(("errno", refused.number))
        self.states.clear()
        self.emit(ERROR, pack(fields), state=b"error")
        self.failed = True
        if self.work is not None:
            self.work.close()
        self.finished()

    def violated(self, what: str) -> None:
        """The client broke the protocol: it hears so, and is not listened to any more."""
        self.fail(Refused("usage", "protocol error: " + what))
        if self.link is not None:
            self.link.finish()

    def pump(self) -> None:
        """There may be room for output again."""
        if self.work is not None and not self.closed:
            self.work.pump()

    # -- what the client sends

    def take(self, kind: int, payload: bytes) -> None:
        if kind >= 0x80:
            if kind == ACK:
                self.on_ack(payload)
            return
        self.received += HEADER.size + len(payload)
        self.owe_ack()
        if self.closed or (self.failed and kind != CLOSE):
            return
        opening = kind == OPEN and self.work is None
        try:
            self.act(kind, payload)
        except Refused as refused:
            if refused.kind == "usage" and not opening:
                self.violated(str(refused))
            else:
                self.fail(refused)
        except Exception as error:  # noqa: BLE001  # one session's trouble is not the others'
            self.fail(Refused("failed", "cannot go on: %r" % error, getattr(error, "errno", 0) or 0))

    def act(self, kind: int, payload: bytes) -> None:
        work = self.work
        if kind == CLOSE:
            self.close()
        elif kind == OPEN:
            if work is not None:
                raise Refused("usage", "a session is opened once")
            self.open(Fields(payload))
        elif work is None:
            raise Refused("usage", "the first frame must be OPEN")
        elif kind == INPUT:
            if len(payload) > self.input_credit or self.input_ended:
                raise Refused("usage", "more input than was granted")
            self.input_credit -= len(payload)
            if payload:
                work.input(payload)
        elif kind == INPUT_EOF:
            if not self.input_ended:
                self.input_ended = True
                work.input_eof()
        elif kind == GRANT and len(payload) == GRANT_SIZES.size and payload[0] in self.credit:
            stream, size = GRANT_SIZES.unpack(payload)
            self.credit[stream] += size
            self.sendable[stream] += size
            if self.link is not None:
                self.guest.flush_soon(self.link)
            work.pump()
        elif kind == SIGNAL and len(payload) < 16:
            work.signal(SIGNALS.get(payload.decode("ascii", "replace"), 0))
        elif kind == RESIZE and len(payload) == WINDOW_SIZES.size:
            columns, rows, xpixel, ypixel = WINDOW_SIZES.unpack(payload)
            work.resize(struct.pack("4H", rows, columns, xpixel, ypixel))
        elif kind == STOP_OUTPUT and payload in (b"\1", b"\2"):
            work.stop_output(payload[0])
        else:
            raise Refused("usage", "a frame of type %d with %d bytes" % (kind, len(payload)))

    def on_ack(self, payload: bytes) -> None:
        count = COUNT.unpack(payload)[0] if len(payload) == COUNT.size else -1
        if not 0 <= count <= self.sent_high:
            self.violated("an acknowledgement of what was not sent")
            return
        while self.sent and self.sent[0].end <= count:
            self.forget(self.sent.popleft())
        if self.over:
            self.finished()
        else:
            self.pump()

    def owe_ack(self) -> None:
        if self.received - self.acknowledged >= ACK_BYTES:
            self.send_ack()
        elif self.ack_timer is None:
            self.ack_timer = self.guest.loop.after(ACK_SECONDS, self.send_ack)

    def send_ack(self) -> None:
        if self.ack_timer is not None:
            self.ack_timer.cancel()
            self.ack_timer = None
        if self.link is not None and self.received > self.acknowledged:
            self.acknowledged = self.received
            self.link.ack_due = True
            self.guest.flush_soon(self.link)

    def open(self, fields: Fields) -> None:
        makers = {
            b"process": Process,
            b"sftp": SftpProcess,
            b"tcp": TcpConnection,
            b"unix": UnixConnection,
            b"listen-tcp": TcpListener,
            b"listen-unix": UnixListener,
            b"list": Listing,
        }
        kind = fields.one(b"kind")
        window = fields.number(b"window", DEFAULT_WINDOW, 1, MAX_WINDOW)
        linger = fields.number(b"linger", DEFAULT_LINGER, 0, MAX_LINGER)
        if kind not in makers or fields.one(b"overflow") not in (b"", b"block", b"drop"):
            raise Refused("usage", "kind is %r, overflow %r" % (text(kind), text(fields.one(b"overflow"))))
        self.configure(window, linger, fields.one(b"overflow") == b"drop", fields.one(b"name")[:256])
        self.work = Work(self)  # in case the next line fails
        self.work = makers[kind](self, fields)

    def configure(self, window: int, linger: int, drop: bool, name: bytes) -> None:
        self.window, self.linger, self.drop, self.name = window, linger, drop, name
        self.credit = {1: window, 2: window}
        self.sendable = dict(self.credit)


class Channel:
    """A descriptor of some work: where its input goes, where a stream of its output comes from, or both."""

    def __init__(self, work: "Work", fd: int, stream: int, writable: bool, terminal: bool = False) -> None:
        self.work = work
        self.session = work.session
        self.loop = work.session.guest.loop
        self.fd = fd  # -1 once closed
        self.stream = stream  # of output that is read here; 0: none
        self.terminal = terminal  # it may hang up for a while
        self.chunk = 65536 if terminal else MAX_PAYLOAD  # bytes of one read
        self.hung = False  # nobody will write any more: what can be read is all there is
        self.writable = writable  # whether input goes here; False once nobody takes it
        self.queue = deque()  # type: Buffers  # input
        self.ending = False  # input ends when the queue is empty
        self.reading = stream > 0  # until the end of output
        self.discarding = False  # output is read and thrown away
        self.last = 0  # the last byte written
        self.drain_until = 0.0  # when silence means the end; 0: it does not
        self.drain_left = MAX_PAYLOAD  # bytes that may be read meanwhile
        os.set_blocking(fd, False)

    def update(self) -> None:
        """Watch for what can be dealt with, and for nothing else: a hang-up would be reported over and over."""
        if self.fd < 0:
            return
        events = select.EPOLLOUT if self.queue else 0
        if self.reading and (self.discarding or self.session.room(self.stream) > 0):
            events |= select.EPOLLIN
        elif self.reading and not self.hung and not self.terminal:
            events |= select.EPOLLRDHUP  # the end needs no room
        if events or (self.writable and not self.stream):
            self.loop.watch(self.fd, events, self.ready)
        else:
            self.loop.unwatch(self.fd)

    def ready(self, events: int) -> None:
        try:
            if events & (select.EPOLLHUP | select.EPOLLRDHUP) and not self.terminal:
                self.hung = True
            if self.queue and events & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
                self.write()
            elif events & select.EPOLLERR and self.writable and not self.stream:
                self.broken(errno.EPIPE)  # a pipe that nobody reads
            if self.fd >= 0 and self.reading and events & ~select.EPOLLOUT:
                self.read()
        except Exception as error:  # noqa: BLE001  # one session's trouble is not the others'
            self.session.fail(Refused("failed", "cannot go on: %r" % error, getattr(error, "errno", 0) or 0))

    def push(self, data: bytes) -> None:
        if not self.writable:
            self.session.input_taken(len(data))
            return
        self.queue.append(data)
        if len(self.queue) == 1:
            self.write()

    def write(self) -> None:
        while self.queue:
            try:
                count = os.writev(self.fd, list(islice(self.queue, 16)))
            except OSError as error:
                if error.errno not in AGAIN:
                    self.broken(error.errno or 0)
                    return
                break
            if count == len(self.queue[0]):
                self.last = self.queue[0][-1]
            advance(self.queue, count)
            self.session.input_taken(count)
        if self.ending and not self.queue:
            self.ending = False
            self.work.input_drained()
        self.update()

    def end_input(self) -> None:
        self.ending = True
        self.write()

    def broken(self, number: int) -> None:
        """Nobody takes the input any more."""
        if not self.writable:
            return
        self.writable = False
        size = sum(len(data) for data in self.queue)
        self.queue.clear()
        self.session.input_taken(size)
        self.session.input_stopped()
        self.work.input_broken(number)
        self.update()

    def read(self) -> None:
        """One read, so that others have their turn; all there is when the end is near."""
        while self.reading:
            size = self.chunk if self.discarding else min(self.chunk, self.session.room(self.stream))
            if size <= 0 and not (self.hung and unread(self.fd) == 0):
                break
            try:
                data = os.read(self.fd, max(1, size))
            except OSError as error:
                if error.errno not in AGAIN:
                    self.ended(error.errno or 0)
                elif self.drain_until and time.monotonic() >= self.drain_until:
                    self.ended(0)
                break
            if not data:
                self.ended(0)
                break
            if not self.discarding:
                self.session.output(self.stream, data)
            if self.drain_until:
                self.drain_left -= len(data)
                if self.drain_left < 0:
                    self.ended(0)
            elif not self.hung:
                break
        self.update()

    def drain(self) -> None:
        """What is on its way still comes, whoever else holds the other end."""
        if self.fd >= 0 and self.reading:
            self.drain_until = time.monotonic() + DRAIN_SECONDS
            self.loop.after(DRAIN_SECONDS + 0.01, self.pump)
            self.read()

    def pump(self) -> None:
        if self.drain_until and self.fd >= 0:
            self.read()
        else:
            self.update()

    def ended(self, number: int) -> None:
        """No more output."""
        if self.reading:
            self.reading = False
            self.work.output_ended(self, number)
            self.update()

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self.reading = self.writable = False
            self.queue.clear()
            self.loop.unwatch(fd)
            self.work.close_channel(fd)


class Work:
    """What a session does. Here: nothing, whatever the client asks."""

    kind = ""  # as in OPEN

    def __init__(self, session: Session) -> None:
        self.session = session
        self.guest = session.guest

    def joined(self) -> None:
        """A client has come (back)."""

    def input(self, data: bytes) -> None:
        self.session.input_taken(len(data))

    def input_eof(self) -> None:
        """The client sends no more."""

    def input_drained(self) -> None:
        """The client sends no more, and everything has been written."""

    def input_broken(self, number: int) -> None:
        """Nobody reads the input any more."""

    def output_ended(self, channel: Channel, number: int) -> None:
        """A channel has no more output."""

    def stop_output(self, stream: int) -> None:
        """Nobody reads the output any more."""

    def signal(self, number: int) -> None:
        """A signal, 0 for one that may not be sent."""

    def resize(self, size: bytes) -> None:
        """A struct winsize."""

    def pump(self) -> None:
        """There may be room for output again."""

    def close(self) -> None:
        """The session is over. Idempotent."""

    def close_channel(self, fd: int) -> None:
        os.close(fd)

    def describe(self) -> "list[Pair]":
        """Fields for an ITEM."""
        return []


class Process(Work):
    """A process with pipes or a terminal."""

    kind = "process"

    def __init__(self, session: Session, fields: Fields) -> None:
        Work.__init__(self, session)
        self.account = Account.named(fields.one(b"user"))
        self.cwd = fields.one(b"cwd")
        self.command = b""  # for people
        self.what = b""  # the program, for messages
        self.terminal = fields.one(b"pty") == b"1"
        self.tty = b""  # the terminal's name
        self.pid = 0
        self.status = None  # type: int | None  # as of waitpid, once it has ended
        self.report = -1  # until exec: where the child writes why it cannot
        self.kill_timer = None  # type: Timer | None
        self.channels = []  # type: list[Channel]  # input, output, errors; or the terminal
        self.start(fields)

    def start(self, fields: Fields) -> None:
        env = self.account.environment()
        for setting in fields.all(b"env"):
            name, equals, value = setting.partition(b"=")
            if not name or not equals:
                raise Refused("usage", "env must be NAME=value")
            env[name] = value
        args = fields.all(b"arg")
        shell = self.account.shell if os.access(self.account.shell, os.X_OK) else b"/bin/sh"
        name = os.path.basename(shell)
        if args:
            program, self.command = args[0], b" ".join(args)
        elif b"command" in fields.values:
            self.command = fields.one(b"command")
            program, args = shell, [name, b"-c", self.command]
        else:
            program, args, self.command = shell, [b"-" + name], shell
        self.what = program
        if self.terminal:
            self.open_terminal(fields, env, lambda end: execute(program, args, env))
        else:
            self.open_pipes(True, lambda end: execute(program, args, env))

    def open_pipes(self, errors: bool, run: "Callable[[int], None]") -> None:
        ends = []  # type: list[int]  # the child's
        mine = []  # type: list[int]
        try:
            for number in range(3 if errors else 2):
                reader, writer = os.pipe()
                ends.append(writer if number else reader)
                mine.append(reader if number else writer)
                enlarge(writer)
            if not errors:
                ends.append(os.open(os.devnull, os.O_WRONLY))
            self.spawn(ends, False, run)
        except OSError as error:
            for fd in mine:
                os.close(fd)
            raise Refused.because("start a process", error) from None
        finally:
            for fd in ends:
                os.close(fd)
        self.channels = [Channel(self, fd, stream, stream == 0) for stream, fd in enumerate(mine)]

    def open_terminal(self, fields: Fields, env: "dict[bytes, bytes]", run: "Callable[[int], None]") -> None:
        master = slave = -1
        defaults = ((b"rows", 24), (b"cols", 80), (b"xpixel", 0), (b"ypixel", 0))
        size = [fields.number(key, default, 0, 65535) for key, default in defaults]
        modes = fields.values.get(b"modes", [b""])[-1]
        try:
            master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
            fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
            self.tty = b"/dev/pts/%d" % struct.unpack("I", fcntl.ioctl(master, TIOCGPTN, b"\0" * 4))[0]
            try:
                slave = os.open(self.tty, os.O_RDWR | os.O_NOCTTY)
            except OSError:  # another /dev/pts than the one of /dev/ptmx
                slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
            set_modes(slave, modes)
            fcntl.ioctl(slave, TIOCSWINSZ, struct.pack("4H", *size))
            if not self.account.own:
                give_terminal(slave, self.account)
            env[b"TERM"] = fields.one(b"term") or env.get(b"TERM", b"xterm-256color")
            if b"SSH_CONNECTION" in env:
                env[b"SSH_TTY"] = self.tty
            self.spawn([slave, slave, slave], True, run)
        except OSError as error:
            close_quietly(master)
            raise Refused.because("open a terminal", error) from None
        finally:
            close_quietly(slave)
        self.channels = [Channel(self, master, 1, True, terminal=True)]

    def spawn(self, ends: "list[int]", terminal: bool, run: "Callable[[int], None]") -> None:
        """Fork; the child gets `ends` as descriptors 0 to 2 and calls `run` with the end of the report. Raises OSError."""
        reader, writer = os.pipe()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))  # none is lost between fork and exec
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self.child(ends, terminal, writer, run)
        except OSError:
            os.close(reader)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(writer)
        self.report = reader
        os.set_blocking(reader, False)
        self.guest.children[self.pid] = self.reaped
        self.guest.loop.watch(reader, select.EPOLLIN, self.reported)

    def child(self, ends: "list[int]", terminal: bool, writer: int, run: "Callable[[int], None]") -> None:
        """Never returns."""
        stage = b"s"
        try:
            default_signals()
            os.setsid()
            if terminal:
                fcntl.ioctl(ends[0], TIOCSCTTY, 0)
            for number, fd in enumerate(ends):
                os.dup2(fd, number)
            os.umask(0o022)
            if LIMITS and self.guest.files:
                resource.setrlimit(resource.RLIMIT_NOFILE, self.guest.files)
            stage = b"u"
            self.account.become()
            stage = b"d"
            try:
                os.chdir(self.account.home)
            except OSError:
                os.chdir("/")
            if self.cwd:
                os.chdir(self.cwd)
            stage = b"x"
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            run(writer)
        except BaseException as error:  # noqa: BLE001  # whatever it is, the parent hears of it
            os.write(writer, stage + struct.pack(">I", getattr(error, "errno", 0) or 0))
        os._exit(127)

    def reported(self, events: int) -> None:
        """The child has called exec, or could not."""
        if self.report < 0:
            return
        try:
            data = os.read(self.report, 16)
        except OSError:
            return
        self.guest.loop.unwatch(self.report)
        os.close(self.report)
        self.report = -1
        if len(data) == 5:
            error = OSError()
            error.errno = int.from_bytes(data[1:], "big")
            stages = {b"d": "change to the folder %s" % text(self.cwd), b"u": "become %s" % self.account.name}
            self.session.fail(Refused.because(stages.get(data[:1], "run %s" % text(self.what)), error))
            return
        fields = [("pid", self.pid), ("user", self.account.name)]  # type: list[Pair]
        if self.tty:
            fields.append(("tty", self.tty))
        self.session.emit(OPENED, pack(fields))
        if len(self.channels) < 3:
            self.session.output_ended(2)  # there is none
        self.pump()

    def reaped(self, status: int) -> None:
        self.reported(0)
        self.status = status
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            try:
                name = signal.Signals(number).name[3:]
            except ValueError:
                name = "RTMIN+%d" % (number - int(signal.SIGRTMIN))
            fields = [("signal", name)]  # type: list[Pair]
            if os.WCOREDUMP(status):
                fields.append(("core", "1"))
        else:
            fields = [("code", os.WEXITSTATUS(status))]
        self.session.emit(EXIT, pack(fields), state=b"exit")
        if self.terminal:
            for channel in self.channels:
                channel.drain()

    def joined(self) -> None:
        self.pump()

    def pump(self) -> None:
        if self.report < 0:  # nothing before OPENED
            for channel in self.channels:
                channel.pump()

    def input(self, data: bytes) -> None:
        self.channels[0].push(data)

    def input_eof(self) -> None:
        self.channels[0].end_input()

    def input_drained(self) -> None:
        channel = self.channels[0]
        if not self.terminal:
            channel.close()
        elif channel.fd >= 0:
            try:
                modes = TERMIOS.unpack(fcntl.ioctl(channel.fd, TCGETS, bytes(TERMIOS.size)))
                if modes[3] & ICANON:  # a line that is not whole goes first
                    end = modes[5][VEOF : VEOF + 1]
                    os.write(channel.fd, end if channel.last in (0, 10, 13) else end + end)
            except OSError:  # hung up, or full of what nobody reads
                pass

    def input_broken(self, number: int) -> None:
        if not self.terminal:
            self.channels[0].close()

    def output_ended(self, channel: Channel, number: int) -> None:
        if not channel.discarding:
            self.session.output_ended(channel.stream)
        channel.close()

    def stop_output(self, stream: int) -> None:
        for channel in self.channels:
            if channel.stream == stream and channel.reading and not channel.discarding:
                self.session.output_ended(stream)
                channel.discarding = True
                if self.terminal:
                    channel.update()  # closing it would hang up
                else:
                    channel.close()

    def foreground(self) -> int:
        """The terminal's foreground process group, else the process's own."""
        channel = self.channels[0]
        if self.terminal and channel.fd >= 0:
            try:
                group = struct.unpack("i", fcntl.ioctl(channel.fd, TIOCGPGRP, b"\0" * 4))[0]
            except OSError:
                group = 0
            if group > 1:
                return int(group)
        return self.pid if self.status is None else 0

    def signal(self, number: int) -> None:
        group = self.foreground()
        if number and group:
            self.send_signal(group, number)

    def send_signal(self, group: int, number: int) -> None:
        try:
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                if self.status is None:  # it has no group of its own yet
                    os.kill(self.pid, number)
        except OSError:  # it runs as somebody else now
            pass

    def resize(self, size: bytes) -> None:
        if self.terminal and self.channels[0].fd >= 0:
            fcntl.ioctl(self.channels[0].fd, TIOCSWINSZ, size)

    def close(self) -> None:
        if self.kill_timer is not None or not self.pid:
            return
        group = self.foreground()
        if self.status is None:
            self.send_signal(self.pid, signal.SIGHUP)
            self.send_signal(self.pid, signal.SIGCONT)  # a stopped one would not notice
        if group:
            self.kill_timer = self.guest.loop.after(KILL_SECONDS, lambda: self.kill(group))
        for channel in self.channels:
            channel.close()
        if self.report >= 0:
            self.guest.loop.unwatch(self.report)
            os.close(self.report)
            self.report = -1

    def kill(self, group: int) -> None:
        """What did not go when it was told to. Not what outlives its starter on purpose, as `nohup` has it."""
        if self.status is None:
            self.send_signal(self.pid, signal.SIGKILL)
        if group != self.pid:
            try:
                if os.getsid(group) == self.pid:
                    os.killpg(group, signal.SIGKILL)
            except OSError:
                pass

    def describe(self) -> "list[Pair]":
        fields = [("pid", self.pid), ("command", self.command[:1024]), ("pty", int(self.terminal))]  # type: list[Pair]
        kind, payload = self.session.states.get(b"exit", (0, b""))
        if kind:
            fields += [(text(key), values[0]) for key, values in Fields(payload).values.items() if key != b"core"]
        return fields


def execute(program: bytes, args: "list[bytes]", env: "dict[bytes, bytes]") -> None:
    """As execvp(3). Raises OSError. Not os.execvpe, which imports, and another user may not be able to read Python's library."""
    paths = [program]
    if b"/" not in program:
        paths = [os.path.join(folder, program) for folder in env.get(b"PATH", BASE_PATH).split(b":")]
    failure = OSError(errno.ENOENT, "")
    for path in paths:
        try:
            os.execve(path, args, env)
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                os.execve(b"/bin/sh", [b"sh", path, *args[1:]], env)
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                failure = error  # goes on: it may be found in another folder
            elif failure.errno == errno.ENOENT:
                failure = error
    raise failure


def unread(fd: int) -> int:
    """How many bytes there are to be read."""
    return int(struct.unpack("i", fcntl.ioctl(fd, FIONREAD, b"\0" * 4))[0])


def enlarge(pipe: int) -> None:
    try:
        fcntl.fcntl(pipe, F_SETPIPE_SZ, MAX_PAYLOAD)
    except OSError:  # more than this user may have
        pass


TERMIOS = struct.Struct("4IB19s")  # input, output, control and local modes, line discipline, special characters
ICANON, VEOF, IUTF8, CSIZE, CBAUD = 0x2, 4, 0x4000, 0x30, 0x100F
# RFC 4254, section 8: opcode → index of a special character
SPECIAL = {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 6: 11, 7: 16, 8: 8, 9: 9, 10: 10, 12: 12, 13: 14, 14: 15, 16: 7, 18: 13}
# opcode → field of TERMIOS and bit
FLAGS = {30 + shift - 2: (0, 1 << shift) for shift in range(2, 15)}  # IGNPAR to IUTF8
FLAGS.update({50: (3, 0x1), 51: (3, 0x2), 52: (3, 0x4), 53: (3, 0x8), 54: (3, 0x10), 55: (3, 0x20), 56: (3, 0x40), 57: (3, 0x80)})
FLAGS.update({58: (3, 0x100), 59: (3, 0x8000), 60: (3, 0x200), 61: (3, 0x800), 62: (3, 0x4000)})
FLAGS.update({70: (1, 0x1), 71: (1, 0x2), 72: (1, 0x4), 73: (1, 0x8), 74: (1, 0x10), 75: (1, 0x20)})
FLAGS.update({90: (2, 0x20), 91: (2, 0x30), 92: (2, 0x100), 93: (2, 0x200)})
SPEEDS = {1200: 9, 2400: 11, 4800: 12, 9600: 13, 19200: 14, 38400: 15, 57600: 0x1001, 115200: 0x1002, 230400: 0x1003}


def set_modes(tty: int, modes: bytes) -> None:
    """Encoded terminal modes of RFC 4254, section 8, as far as Linux has them. Raises OSError."""
    fields = list(TERMIOS.unpack(fcntl.ioctl(tty, TCGETS, bytes(TERMIOS.size))))
    special = bytearray(fields[5])
    if not modes:
        fields[0] |= IUTF8
    for at in range(0, len(modes) - 4, 5):
        opcode, value = modes[at], int.from_bytes(modes[at + 1 : at + 5], "big")
        if opcode == 0 or opcode >= 160:
            break
        if opcode in SPECIAL:
            special[SPECIAL[opcode]] = 0 if value == 255 else value & 0xFF
        elif opcode in FLAGS:
            field, bits = FLAGS[opcode]
            if opcode in (90, 91):
                fields[field] = fields[field] & ~CSIZE | bits if value else fields[field]
            else:
                fields[field] = fields[field] | bits if value else fields[field] & ~bits
        elif opcode == 129 and value in SPEEDS:
            fields[2] = fields[2] & ~CBAUD | SPEEDS[value]
    fields[5] = bytes(special)
    fcntl.ioctl(tty, TCSETS, TERMIOS.pack(*fields))


def give_terminal(tty: int, account: Account) -> None:
    try:
        group, mode = grp.getgrnam("tty").gr_gid, 0o620
    except (KeyError, AttributeError):
        group, mode = account.gid, 0o600
    try:
        os.fchown(tty, account.uid, group)
        os.fchmod(tty, mode)
    except OSError:  # no such right in this sandbox: its descriptors still work
        pass


class SftpProcess(Process):
    """A forked worker that serves SFTP on its pipes."""

    kind = "sftp"

    def start(self, fields: Fields) -> None:
        self.terminal = False
        self.command = self.what = b"sftp"
        self.open_pipes(False, serve_sftp)


def serve_sftp(report: int) -> None:
    """In a worker that was just forked: the rest of its life."""
    close_descriptors(0, 1, 2, report)
    os.close(report)
    os._exit(SftpServer(0, 1).serve())


class Lookup:
    """The addresses of a name, found by a child: the C library's resolver blocks."""

    def __init__(self, guest: "Guest", host: bytes, done: "Callable[[list[tuple[int, str]]], None]") -> None:
        """`done` gets pairs of family and numeric address, none when there are none."""
        self.guest = guest
        self.done = done
        self.pid = 0
        self.data = b""
        self.fd = -1
        self.timer = None  # type: Timer | None
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.child(host, writer)
        os.close(writer)
        os.set_blocking(reader, False)
        self.fd = reader
        guest.children[self.pid] = self.reaped
        guest.loop.watch(reader, select.EPOLLIN, self.ready)
        self.timer = guest.loop.after(CONNECT_SECONDS, self.close)

    @staticmethod
    def child(host: bytes, writer: int) -> None:
        try:
            default_signals()
            close_descriptors(writer)
            found = socket.getaddrinfo(host, None, 0, socket.SOCK_STREAM)
            os.write(writer, b"".join(b"%d %s\n" % (entry[0], os.fsencode(str(entry[4][0]))) for entry in found[:16]))
        finally:
            os._exit(0)

    def ready(self, events: int) -> None:
        try:
            data = os.read(self.fd, 4096)
        except OSError:
            return
        self.data += data
        if not data or len(self.data) > 8192:
            self.close()

    def abort(self) -> None:
        """Nobody wants to know any more. Idempotent."""
        self.done = lambda addresses: None
        self.close()

    def close(self) -> None:
        if self.fd < 0:
            return
        self.guest.loop.unwatch(self.fd)
        os.close(self.fd)
        self.fd = -1
        if self.timer:
            self.timer.cancel()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        lines = [line.split(b" ", 1) for line in self.data.split(b"\n") if b" " in line]
        self.done([(int(family), os.fsdecode(address)) for family, address in lines])

    def reaped(self, status: int) -> None:
        self.pid = 0


def literal(host: bytes) -> "list[tuple[int, str]]":
    """Family and address of what needs no resolver."""
    name = text(host)
    if name.lower() in ("localhost", "localhost.", ""):
        return [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, name)
        except OSError:
            continue
        return [(family, name)]
    return []


def show(address: "tuple[str, int] | tuple[str, int, int, int]") -> str:
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % (address[0], address[1])


class Connection(Work):
    """A connected socket: TCP, Unix, or one that a listener has accepted."""

    def __init__(self, session: Session) -> None:
        Work.__init__(self, session)
        self.sock = None  # type: socket.socket | None
        self.channel = None  # type: Channel | None  # once connected
        self.waiting = []  # type: list[bytes]  # input that came before that
        self.eof = False  # INPUT_EOF came before that
        self.sending = True  # until our sending half is shut down
        self.peer = ""

    def connected(self) -> None:
        """The socket carries data from now on."""
        assert self.sock is not None  # noqa: S101
        self.channel = Channel(self, self.sock.fileno(), 1, True)
        for data in self.waiting:
            self.channel.push(data)
        self.waiting = []
        if self.eof:
            self.channel.end_input()
        self.channel.update()

    def joined(self) -> None:
        self.pump()

    def pump(self) -> None:
        if self.channel is not None:
            self.channel.pump()

    def input(self, data: bytes) -> None:
        if self.channel is not None:
            self.channel.push(data)
        else:
            self.waiting.append(data)  # as much as the credit allows

    def input_eof(self) -> None:
        if self.channel is not None:
            self.channel.end_input()
        else:
            self.eof = True

    def input_drained(self) -> None:
        if self.sock is not None:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:  # the peer has gone: reading says how
                pass
        self.sending = False
        self.check_end()

    def input_broken(self, number: int) -> None:
        self.sending = False
        if number == errno.EPIPE:
            self.check_end()
        else:
            self.session.fail(Refused.because("send to %s" % (self.peer or "the peer"), OSError(number, "")))

    def output_ended(self, channel: Channel, number: int) -> None:
        if number:
            self.session.fail(Refused.because("receive from %s" % (self.peer or "the peer"), OSError(number, "")))
        else:
            self.session.output_ended(1)
            self.check_end()

    def stop_output(self, stream: int) -> None:
        if stream == 1 and self.channel is not None and self.channel.reading and self.sock is not None:
            try:
                self.sock.shutdown(socket.SHUT_RD)
            except OSError:
                pass
            self.channel.ended(0)

    def check_end(self) -> None:
        if self.channel is not None and not self.sending and not self.channel.reading:
            self.close()
            self.session.finished()

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        elif self.sock is not None:
            self.guest.loop.unwatch(self.sock.fileno())
            self.close_channel(-1)

    def close_channel(self, fd: int) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class TcpConnection(Connection):
    """A connection to a port, of the sandbox or beyond."""

    kind = "tcp"

    def __init__(self, session: Session, fields: Fields) -> None:
        Connection.__init__(self, session)
        self.host = fields.one(b"host")
        self.port = fields.number(b"port", 0, 1, 65535)
        self.peer = "%s port %d" % (text(self.host), self.port)
        self.addresses = literal(self.host)  # not tried yet
        self.error = OSError(errno.EADDRNOTAVAIL, "")  # of the last attempt
        self.lookup = None  # type: Lookup | None
        self.timer = self.guest.loop.after(CONNECT_SECONDS, self.late)
        if self.addresses:
            self.attempt()
        else:
            self.lookup = Lookup(self.guest, self.host, self.found)

    def found(self, addresses: "list[tuple[int, str]]") -> None:
        self.addresses = addresses
        if addresses:
            self.attempt()
        else:
            self.session.fail(Refused("not-found", "cannot connect: there is no host %s" % text(self.host), errno.ENOENT))

    def late(self) -> None:
        if self.channel is None:
            self.session.fail(Refused.because("connect to " + self.peer, OSError(errno.ETIMEDOUT, "")))

    def attempt(self) -> None:
        """Try the next address."""
        while self.addresses:
            family, address = self.addresses.pop(0)
            try:
                sock = self.sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                number = sock.connect_ex((address, self.port))
            except OSError as error:
                number = error.errno or errno.EIO
            if number in (0, errno.EINPROGRESS) and self.sock is not None:
                self.guest.loop.watch(self.sock.fileno(), select.EPOLLOUT, self.ready)
                return
            self.error = OSError(number, "")
            self.close_channel(-1)
        self.timer.cancel()
        self.session.fail(Refused.because("connect to " + self.peer, self.error))

    def ready(self, events: int) -> None:
        if self.sock is None:
            return
        number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.guest.loop.unwatch(self.sock.fileno())
        if number:
            self.error = OSError(number, "")
            self.close_channel(-1)
            self.attempt()
            return
        self.timer.cancel()
        try:
            self.session.emit(OPENED, pack([("local", show(self.sock.getsockname())), ("peer", show(self.sock.getpeername()))]))
        except OSError as error:  # reset already
            self.session.fail(Refused.because("connect to " + self.peer, error))
            return
        self.connected()

    def close(self) -> None:
        self.timer.cancel()
        if self.lookup is not None:
            self.lookup.abort()
        Connection.close(self)

    def describe(self) -> "list[Pair]":
        return [("command", self.peer)]


class Near:
    """A Unix path of any length, short enough for the kernel within a `with` block."""

    def __init__(self, path: bytes) -> None:
        self.path = path
        self.folder = -1

    def __enter__(self) -> bytes:
        if len(self.path) < 108 or self.path[:1] == b"\0":
            return self.path
        folder, name = os.path.split(self.path)
        self.folder = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        return b"/proc/self/fd/%d/%s" % (self.folder, name)

    def __exit__(self, *_: object) -> None:
        close_quietly(self.folder)


class UnixConnection(Connection):
    """A connection to a Unix socket."""

    kind = "unix"

    def __init__(self, session: Session, fields: Fields) -> None:
        Connection.__init__(self, session)
        self.account = Account.named(fields.one(b"user"))  # whose rights it is made with
        self.path = fields.values.get(b"path", [b""])[-1]
        if self.path[:1] != b"\0":  # else abstract
            self.path = os.path.join(self.account.home, self.path)
        self.peer = text(self.path)
        self.until = time.monotonic() + CONNECT_SECONDS
        self.timer = None  # type: Timer | None
        self.attempt()

    def attempt(self) -> None:
        if self.sock is None:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.setblocking(False)
        try:
            as_user(self.account, self.dial)
        except OSError as error:
            if error.errno == errno.EAGAIN and time.monotonic() < self.until:  # more wait there than its backlog allows
                self.timer = self.guest.loop.after(0.05, self.attempt)
            else:
                self.session.fail(Refused.because("connect to " + self.peer, error))
            return
        self.session.emit(OPENED)
        self.connected()

    def dial(self) -> None:
        if self.sock is not None:
            with Near(self.path) as path:
                self.sock.connect(path)

    def close(self) -> None:
        if self.timer:
            self.timer.cancel()
        Connection.close(self)

    def describe(self) -> "list[Pair]":
        return [("command", self.path)]


class AcceptedConnection(Connection):
    """What a listener has accepted; nothing is read until a client fetches it."""

    def __init__(self, session: Session, sock: socket.socket, peer: str, listener: "Listener") -> None:
        Connection.__init__(self, session)
        self.kind = listener.connection_kind
        self.sock = sock
        self.peer = peer
        self.listener = listener
        listener.unfetched.add(session)
        self.timer = self.guest.loop.after(FETCH_SECONDS, session.close)

    def joined(self) -> None:
        if self.channel is None:
            self.timer.cancel()
            self.listener.unfetched.discard(self.session)
            self.listener.pump()
            self.connected()
        self.pump()

    def close(self) -> None:
        self.timer.cancel()
        self.listener.unfetched.discard(self.session)
        self.listener.pump()
        Connection.close(self)

    def describe(self) -> "list[Pair]":
        return [("command", self.peer)]


class Listener(Work):
    """A listening socket; every connection becomes a session that the client fetches."""

    connection_kind = ""  # of those sessions

    def __init__(self, session: Session) -> None:
        Work.__init__(self, session)
        self.sock = None  # type: socket.socket | None
        self.address = ""  # for people
        self.unfetched = set()  # type: set[Session]

    def listen(self, sock: socket.socket, opened: "list[Pair]") -> None:
        sock.setblocking(False)
        sock.listen(128)
        self.sock = sock
        self.session.emit(OPENED, pack(opened))
        self.pump()

    def pump(self) -> None:
        if self.sock is None:
            return
        if len(self.unfetched) < MAX_ACCEPTED and not self.session.crowded():
            self.guest.loop.watch(self.sock.fileno(), select.EPOLLIN, self.ready)
        else:
            self.guest.loop.unwatch(self.sock.fileno())

    def ready(self, events: int) -> None:
        if self.sock is None:
            return
        try:
            sock, address = self.sock.accept()
        except OSError as error:
            if error.errno not in (*AGAIN, errno.ECONNABORTED):  # too many open files, for example
                self.guest.loop.unwatch(self.sock.fileno())
                self.guest.loop.after(0.2, self.pump)
            return
        if not self.guest.make_room():
            sock.close()
            return
        sock.setblocking(False)
        accepted = Session(self.guest, os.urandom(16))
        accepted.configure(self.session.window, self.session.linger, self.session.drop, self.session.name)
        peer = self.peer(sock, address)
        accepted.work = AcceptedConnection(accepted, sock, peer, self)
        accepted.widen()
        self.guest.sessions[accepted.id] = accepted
        self.session.emit(ACCEPTED, pack([("id", accepted.id.hex()), ("peer", peer)]))
        self.pump()

    def peer(self, sock: socket.socket, address: "tuple[str, int]") -> str:
        return show(address)

    def close(self) -> None:
        if self.sock is not None:
            self.guest.loop.unwatch(self.sock.fileno())
            self.sock.close()
            self.sock = None
        for session in list(self.unfetched):
            session.close()

    def describe(self) -> "list[Pair]":
        return [("command", self.address)]


class TcpListener(Listener):
    """A listening port."""

    kind, connection_kind = "listen-tcp", "tcp"

    def __init__(self, session: Session, fields: Fields) -> None:
        Listener.__init__(self, session)
        self.host = fields.one(b"host")
        self.port = fields.number(b"port", 0, 0, 65535)
        account = Account.named(fields.one(b"user"))
        if 0 < self.port < 1024 and not account.own:  # the guest is root, which `account` is not
            what = "listen on port %d as %s: ports below 1024 are root's" % (self.port, account.name)
            raise Refused.because(what, OSError(errno.EACCES, ""))
        self.lookup = None  # type: Lookup | None
        if self.host == b"*":
            self.bind([(socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")])  # noqa: S104  # asked for
        elif literal(self.host):
            self.bind(literal(self.host))
        else:
            self.lookup = Lookup(self.guest, self.host, self.bind)

    def bind(self, addresses: "list[tuple[int, str]]") -> None:
        """Listen on the first that can be."""
        what = "listen on %s port %d" % (text(self.host) or "loopback", self.port)
        refused = Refused("not-found", "cannot %s: there is no such host" % what, errno.ENOENT)
        for family, address in addresses:
            sock = None
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6 and address == "::":
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.bind((address, self.port))
                self.address = show(sock.getsockname())
                self.listen(sock, [("port", sock.getsockname()[1])])
                return
            except OSError as error:
                if sock is not None:
                    sock.close()
                refused = Refused.because(what, error)
                if error.errno == errno.EADDRINUSE:
                    break  # another address would not be what was asked for
        self.session.fail(refused)

    def close(self) -> None:
        if self.lookup is not None:
            self.lookup.abort()
        Listener.close(self)


class UnixListener(Listener):
    """A listening Unix socket that only its user may connect to."""

    kind, connection_kind = "listen-unix", "unix"

    def __init__(self, session: Session, fields: Fields) -> None:
        Listener.__init__(self, session)
        account = Account.named(fields.one(b"user"))
        self.path = fields.one(b"path")
        self.folder = b""  # made for this socket alone
        self.made = (0, 0)  # device and inode of the socket
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            as_user(account, lambda: self.bind(sock, account))
        except OSError as error:
            sock.close()
            self.remove()
            raise Refused.because("listen on %s" % text(self.path), error) from None
        self.address = text(self.path)
        self.listen(sock, [("path", self.path)])

    def bind(self, sock: socket.socket, account: Account) -> None:
        if self.path:
            self.path = os.path.join(account.home, self.path)
        else:
            self.folder = private_folder(b"gatewayd-")
            self.path = os.path.join(self.folder, b"socket")
        mask = os.umask(0o177)
        try:
            with Near(self.path) as path:
                sock.bind(path)
            made = os.lstat(self.path)
            self.made = (made.st_dev, made.st_ino)
        finally:
            os.umask(mask)

    def peer(self, sock: socket.socket, address: "tuple[str, int]") -> str:
        try:
            pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return ""
        return "pid %d uid %d" % (pid, uid)

    def remove(self) -> None:
        """The socket, unless something else has taken its name."""
        try:
            if self.made != (0, 0):
                found = os.lstat(self.path)
                if (found.st_dev, found.st_ino) == self.made:
                    os.unlink(self.path)
            if self.folder:
                os.rmdir(self.folder)
        except OSError:
            pass
        self.made, self.folder = (0, 0), b""

    def close(self) -> None:
        Listener.close(self)
        self.remove()


def as_user(account: Account, call: "Callable[[], None]") -> None:
    """`call` with the rights of `account`."""
    if account.own:
        call()
        return
    groups, gid = os.getgroups(), os.getegid()
    try:
        os.initgroups(account.name, account.gid)
        os.setegid(account.gid)
        os.seteuid(account.uid)
        call()
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def private_folder(prefix: bytes) -> bytes:
    """A new folder that only this user may enter. Raises OSError."""
    for parent in (b"/tmp", b"/dev/shm", b"/var/tmp"):
        path = os.path.join(parent, prefix + os.urandom(6).hex().encode())
        try:
            os.mkdir(path, 0o700)
            return path
        except OSError as error:
            last = error
    raise last


class Listing(Work):
    """All sessions, once; lists are none worth mentioning."""

    kind = "list"

    def __init__(self, session: Session, fields: Fields) -> None:
        Work.__init__(self, session)
        session.emit(OPENED)
        for other in list(self.guest.sessions.values()):
            if other.work is None or other.work.kind in ("", "list"):
                continue
            item = [("id", other.id.hex()), ("kind", other.work.kind), ("name", other.name)]  # type: list[Pair]
            item += [("attached", int(other.link is not None)), ("started", other.started)]
            session.emit(ITEM, pack(item + other.work.describe()))
        session.emit(EXIT, pack([("code", 0)]))
        session.finished()


class Guest:
    """The process: its listening socket, its sessions, its children."""

    def __init__(self, sock: socket.socket, token: bytes, files: "tuple[int, int] | None") -> None:
        self.loop = Loop()
        self.sock = sock
        self.token = token
        self.files = files  # the limit on open files that processes get
        self.sessions = {}  # type: dict[bytes, Session]
        self.links = set()  # type: set[Link]
        self.strangers = {}  # type: dict[Link, None]  # links whose preface is not whole, oldest first
        self.children = {}  # type: dict[int, Callable[[int], None]]  # process id → to call with its status
        self.unflushed = {}  # type: dict[Link, None]
        self.idle_timer = None  # type: Timer | None  # while there is nothing to do
        self.ending = False
        sock.setblocking(False)
        self.loop.watch(sock.fileno(), select.EPOLLIN, self.accept)
        self.wakeup, writer = os.pipe()  # written by signals
        for fd in (self.wakeup, writer):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(writer)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, self.signalled)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        self.loop.watch(self.wakeup, select.EPOLLIN, self.woken)
        self.check_idle()

    def run(self) -> None:
        """Until SIGTERM, or an hour without anything to do."""
        trouble = 0
        while not self.ending:
            try:
                self.loop.step()
                self.flush()
            except Exception:  # one session's trouble is not the others'
                trouble += 1
                if trouble > 1000:
                    raise
        for session in list(self.sessions.values()):
            session.close()
        self.flush()

    def flush(self) -> None:
        """Send what the calls of this round have queued."""
        while self.unflushed:
            links, self.unflushed = list(self.unflushed), {}
            for link in links:
                link.flush()

    def signalled(self, number: int, frame: "FrameType | None") -> None:
        if number == signal.SIGTERM:
            self.ending = True

    def woken(self, events: int) -> None:
        try:
            while len(os.read(self.wakeup, 4096)) == 4096:
                pass
        except OSError:
            pass
        for pid in list(self.children):
            try:
                found, status = os.waitpid(pid, os.WNOHANG)
            except OSError:
                found, status = pid, 0
            if found:
                self.children.pop(pid)(status)

    def accept(self, events: int) -> None:
        try:
            sock, _ = self.sock.accept()
        except OSError as error:
            if error.errno not in (*AGAIN, errno.ECONNABORTED):  # too many open files
                self.loop.unwatch(self.sock.fileno())
                self.loop.after(0.2, lambda: self.loop.watch(self.sock.fileno(), select.EPOLLIN, self.accept))
            return
        if len(self.strangers) >= MAX_STRANGERS:
            next(iter(self.strangers)).close()
        link = Link(self, sock)
        self.links.add(link)
        self.strangers[link] = None
        self.check_idle()

    def find(self, session_id: bytes, mode: int, count: int) -> "tuple[int, Session | None]":
        """Status and session for a preface."""
        session = self.sessions.get(session_id)
        if mode > 2:
            return 4, None
        if session is None:
            if mode:
                return 1, None
            if count:
                return 4, None
            if not self.make_room():
                return 2, None
            session = self.sessions[session_id] = Session(self, session_id)
            self.check_idle()
        status = session.refusal(mode == 2, count)
        return status, None if status else session

    def make_room(self) -> bool:
        """Whether one more session may be; the oldest that is over and that nobody asks for makes place."""
        if len(self.sessions) >= MAX_SESSIONS:
            for session in list(self.sessions.values()):
                if session.over and session.link is None:
                    session.close()
                    break
        return len(self.sessions) < MAX_SESSIONS

    def flush_soon(self, link: Link) -> None:
        self.unflushed[link] = None

    def check_idle(self) -> None:
        if self.links or self.sessions:
            if self.idle_timer is not None:
                self.idle_timer.cancel()
                self.idle_timer = None
        elif self.idle_timer is None:
            self.idle_timer = self.loop.after(IDLE_SECONDS, self.end)

    def end(self) -> None:
        self.ending = True


# SFTP: requests, answers and status codes of draft-ietf-secsh-filexfer-02, extensions as of OpenSSH's PROTOCOL
FXP_INIT, FXP_VERSION = 1, 2
FXP_STATUS, FXP_HANDLE, FXP_DATA, FXP_NAME, FXP_ATTRS, FXP_EXTENDED_REPLY = 101, 102, 103, 104, 105, 201
FX_OK, FX_EOF, FX_NO_FILE, FX_DENIED, FX_FAILURE, FX_BAD_MESSAGE, FX_UNSUPPORTED = 0, 1, 2, 3, 4, 5, 8
FX_TEXTS = {FX_OK: "Success", FX_EOF: "End of file", FX_FAILURE: "Failure", FX_UNSUPPORTED: "Operation unsupported"}
FX_CODES = dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP), FX_NO_FILE)
FX_CODES.update(dict.fromkeys((errno.EPERM, errno.EACCES, errno.EFAULT), FX_DENIED))
FX_CODES.update({errno.ENAMETOOLONG: FX_BAD_MESSAGE, errno.EINVAL: FX_BAD_MESSAGE, errno.ENOSYS: FX_UNSUPPORTED})
SFTP_PACKET = 262144  # bytes of a request or an answer
SFTP_DATA = 261120  # bytes of one read or write, as OpenSSH has it
SFTP_HANDLES = 512
A_SIZE, A_IDS, A_MODE, A_TIMES, A_EXTENDED = 1, 2, 4, 8, 0x80000000
EXTENSIONS = (
    ("posix-rename@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("fstatvfs@openssh.com", "2"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
    ("expand-path@openssh.com", "1"),
    ("copy-data", "1"),
    ("home-directory", "1"),
    ("users-groups-by-id@openssh.com", "1"),
)


class BadPacket(Exception):
    """The peer does not speak SFTP."""


class Packet:
    """Fields of a request, in their order. Raises BadPacket at the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def raw(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.data):
            raise BadPacket
        return self.data[self.at - size : self.at]

    def u32(self) -> int:
        return int.from_bytes(self.raw(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.raw(8), "big")

    def string(self) -> bytes:
        return self.raw(self.u32())

    def path(self) -> bytes:
        value = self.string()
        if b"\0" in value:
            raise OSError(errno.EINVAL, "a NUL in a name")
        return value

    def attrs(self) -> "Attrs":
        flags = self.u32()
        size = self.u64() if flags & A_SIZE else None
        ids = (self.u32(), self.u32()) if flags & A_IDS else None
        mode = self.u32() & 0o7777 if flags & A_MODE else None
        times = (self.u32(), self.u32()) if flags & A_TIMES else None
        for _ in range(self.u32() if flags & A_EXTENDED else 0):
            self.string()
            self.string()
        return Attrs(size, ids, mode, times)


class Attrs:
    """What a client wants a file to be; None for what it does not say."""

    def __init__(
        self, size: "int | None", ids: "tuple[int, int] | None", mode: "int | None", times: "tuple[int, int] | None"
    ) -> None:
        self.size = size
        self.ids = ids
        self.mode = mode
        self.times = times

    def apply(self, target: "bytes | int", follow: bool = True) -> None:
        """All of it; raises the last OSError there was."""
        last = None  # type: OSError | None
        steps = []  # type: list[Callable[[], None]]
        size, ids, mode, times = self.size, self.ids, self.mode, self.times
        if size is not None and not follow:
            raise OSError(errno.EINVAL, "a link has no size")
        if size is not None:
            steps.append(lambda: os.truncate(target, size))
        if mode is not None:
            steps.append(lambda: os.chmod(target, mode) if follow else chmod_link(target, mode))
        if times is not None:
            steps.append(lambda: os.utime(target, times) if follow else os.utime(target, times, follow_symlinks=False))
        if ids is not None:
            steps.append(lambda: os.chown(target, *ids) if follow else os.lchown(target, *ids))  # type: ignore[arg-type]
        for step in steps:
            try:
                step()
            except OSError as error:
                last = error
        if last is not None:
            raise last


def chmod_link(path: "bytes | int", mode: int) -> None:
    """Linux has no modes of links: only what is none can be changed."""
    if stat.S_ISLNK(os.lstat(path).st_mode):  # type: ignore[arg-type]
        raise OSError(errno.EOPNOTSUPP, "the mode of a link")
    os.chmod(path, mode)


def u32(value: int) -> bytes:
    return struct.pack(">I", value & 0xFFFFFFFF)


def string(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def attributes(found: os.stat_result) -> bytes:
    """ATTRS of a file; times beyond 32 bits are cut."""
    times = [min(max(int(each), 0), 0xFFFFFFFF) for each in (found.st_atime, found.st_mtime)]
    flags = A_SIZE | A_IDS | A_MODE | A_TIMES
    return struct.pack(">IQ5I", flags, found.st_size, found.st_uid, found.st_gid, found.st_mode, *times)


class Handle:
    """An open file or folder."""

    def __init__(self, path: bytes, fd: int = -1, append: bool = False, names: "list[bytes] | None" = None) -> None:
        self.path = path
        self.fd = fd  # of a file
        self.append = append
        self.names = names  # of a folder: entries that were not sent yet


class SftpServer:
    """SFTP version 3 on two descriptors. It blocks: it has a process of its own."""

    def __init__(self, reader: int, writer: int) -> None:
        self.reader = reader
        self.writer = writer
        self.handles = {}  # type: dict[int, Handle]
        self.next_handle = 0
        self.names = {}  # type: dict[tuple[bool, int], bytes]  # (whether a group, id) → name
        self.home = os.path.expanduser(b"~")
        self.requests = {
            3: self.on_open,
            4: self.on_close,
            5: self.on_read,
            6: self.on_write,
            7: self.on_lstat,
            8: self.on_fstat,
            9: self.on_setstat,
            10: self.on_fsetstat,
            11: self.on_opendir,
            12: self.on_readdir,
            13: self.on_remove,
            14: self.on_mkdir,
            15: self.on_rmdir,
            16: self.on_realpath,
            17: self.on_stat,
            18: self.on_rename,
            19: self.on_readlink,
            20: self.on_symlink,
            200: self.on_extended,
        }
        self.extensions = {
            b"posix-rename@openssh.com": self.on_posix_rename,
            b"statvfs@openssh.com": self.on_statvfs,
            b"fstatvfs@openssh.com": self.on_fstatvfs,
            b"hardlink@openssh.com": self.on_hardlink,
            b"fsync@openssh.com": self.on_fsync,
            b"lsetstat@openssh.com": self.on_lsetstat,
            b"limits@openssh.com": self.on_limits,
            b"expand-path@openssh.com": self.on_expand_path,
            b"copy-data": self.on_copy_data,
            b"home-directory": self.on_home_directory,
            b"users-groups-by-id@openssh.com": self.on_users_groups,
        }

    def serve(self) -> int:
        """Until the peer closes its end. Returns an exit code."""
        data = bytearray()
        try:
            while True:
                chunk = os.read(self.reader, 4 * SFTP_PACKET)
                if not chunk:
                    return 0
                data += chunk
                at = 0
                while len(data) - at >= 4:
                    size = int.from_bytes(data[at : at + 4], "big")
                    if not 0 < size <= SFTP_PACKET:
                        return 11
                    if len(data) - at - 4 < size:
                        break
                    with memoryview(data) as view:
                        packet = bytes(view[at + 4 : at + 4 + size])
                    self.answer(packet)
                    at += 4 + size
                del data[:at]
        except BadPacket:
            return 11
        except BrokenPipeError:
            return 1

    def answer(self, data: bytes) -> None:
        packet = Packet(data)
        kind = packet.raw(1)[0]
        if kind == FXP_INIT:
            packet.u32()  # the client's version: whatever it is, it gets 3
            pairs = b"".join(string(name.encode()) + string(version.encode()) for name, version in EXTENSIONS)
            self.send(bytes([FXP_VERSION]) + u32(3) + pairs)
            return
        number = packet.raw(4)
        try:
            handler = self.requests.get(kind)
            if handler is None:
                self.status(number, FX_UNSUPPORTED)
            else:
                handler(number, packet)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and error.filename is self:
                raise
            code = FX_CODES.get(error.errno or 0, FX_FAILURE)
            self.status(number, code, error.strerror or str(error))
        except (OverflowError, MemoryError, ValueError) as error:
            self.status(number, FX_FAILURE, str(error))

    def send(self, head: bytes, body: bytes = b"") -> None:
        queue = deque([u32(len(head) + len(body)) + head, body] if body else [u32(len(head)) + head])  # type: Buffers
        while queue:
            try:
                count = os.writev(self.writer, list(queue))
            except OSError as error:
                raise BrokenPipeError(error.errno, "", self) from None  # not a file's
            advance(queue, count)

    def status(self, number: bytes, code: int, message: str = "") -> None:
        reason = os.fsencode(message or FX_TEXTS.get(code, "Failure"))
        self.send(bytes([FXP_STATUS]) + number + u32(code) + string(reason) + string(b""))

    def name(self, number: bytes, path: bytes) -> None:
        self.send(bytes([FXP_NAME]) + number + u32(1) + string(path) + string(path) + u32(0))

    def new_handle(self, number: bytes, handle: Handle) -> None:
        self.next_handle += 1
        self.handles[self.next_handle] = handle
        self.send(bytes([FXP_HANDLE]) + number + string(u32(self.next_handle)))

    def handle(self, packet: Packet) -> Handle:
        raw = packet.string()
        handle = self.handles.get(int.from_bytes(raw, "big")) if len(raw) == 4 else None
        if handle is None:
            raise OSError(errno.EIO, "no such handle")
        return handle

    def file(self, packet: Packet) -> Handle:
        handle = self.handle(packet)
        if handle.fd < 0:
            raise OSError(errno.EIO, "not a file's handle")
        return handle

    def check_handles(self) -> None:
        if len(self.handles) >= SFTP_HANDLES:
            raise OSError(errno.EMFILE, "too many handles")

    def on_open(self, number: bytes, packet: Packet) -> None:
        path, wanted, attrs = packet.path(), packet.u32(), packet.attrs()
        self.check_handles()
        flags = os.O_RDWR if wanted & 3 == 3 else os.O_WRONLY if wanted & 2 else os.O_RDONLY
        for bit, flag in ((4, os.O_APPEND), (8, os.O_CREAT), (16, os.O_TRUNC), (32, os.O_EXCL)):
            if wanted & bit:
                flags |= flag
        mode = 0o666 if attrs.mode is None else attrs.mode
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, mode)  # a FIFO without a peer must not stop everything
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.set_blocking(fd, True)
        self.new_handle(number, Handle(path, fd, bool(wanted & 4)))

    def on_close(self, number: bytes, packet: Packet) -> None:
        handle = self.handle(packet)
        self.handles = {key: value for key, value in self.handles.items() if value is not handle}
        if handle.fd >= 0:
            os.close(handle.fd)
        self.status(number, FX_OK)

    def on_read(self, number: bytes, packet: Packet) -> None:
        handle, offset, size = self.file(packet), packet.u64(), packet.u32()
        try:
            data = os.pread(handle.fd, min(size, SFTP_DATA), offset)
        except OSError as error:
            if error.errno != errno.ESPIPE:
                raise
            data = os.read(handle.fd, min(size, SFTP_DATA))
        if data or not size:
            self.send(bytes([FXP_DATA]) + number + u32(len(data)), data)
        else:
            self.status(number, FX_EOF)

    def on_write(self, number: bytes, packet: Packet) -> None:
        handle, offset, data = self.file(packet), packet.u64(), memoryview(packet.string())
        while data:
            try:
                count = os.write(handle.fd, data) if handle.append else os.pwrite(handle.fd, data, offset)
            except OSError as error:
                if error.errno != errno.ESPIPE:
                    raise
                count = os.write(handle.fd, data)
            data, offset = data[count:], offset + count
        self.status(number, FX_OK)

    def attrs(self, number: bytes, found: os.stat_result) -> None:
        self.send(bytes([FXP_ATTRS]) + number + attributes(found))

    def on_stat(self, number: bytes, packet: Packet) -> None:
        self.attrs(number, os.stat(packet.path()))

    def on_lstat(self, number: bytes, packet: Packet) -> None:
        self.attrs(number, os.lstat(packet.path()))

    def on_fstat(self, number: bytes, packet: Packet) -> None:
        handle = self.handle(packet)
        self.attrs(number, os.stat(handle.path) if handle.fd < 0 else os.fstat(handle.fd))

    def on_setstat(self, number: bytes, packet: Packet) -> None:
        path, attrs = packet.path(), packet.attrs()
        attrs.apply(path)
        self.status(number, FX_OK)

    def on_fsetstat(self, number: bytes, packet: Packet) -> None:
        handle, attrs = self.handle(packet), packet.attrs()
        attrs.apply(handle.path if handle.fd < 0 else handle.fd)
        self.status(number, FX_OK)

    def on_lsetstat(self, number: bytes, packet: Packet) -> None:
        path, attrs = packet.path(), packet.attrs()
        attrs.apply(path, follow=False)
        self.status(number, FX_OK)

    def on_opendir(self, number: bytes, packet: Packet) -> None:
        path = packet.path()
        self.check_handles()
        names = [b".", b"..", *os.listdir(path or b".")]
        names.reverse()
        self.new_handle(number, Handle(path or b".", names=names))

    def on_readdir(self, number: bytes, packet: Packet) -> None:
        handle = self.handle(packet)
        if handle.names is None:
            raise OSError(errno.EIO, "not a folder's handle")
        entries = []  # type: list[bytes]
        while handle.names and len(entries) < 128:
            name = handle.names.pop()
            try:
                found = os.lstat(os.path.join(handle.path, name))
            except OSError:  # gone meanwhile
                continue
            entries.append(string(name) + string(self.long_name(name, found)) + attributes(found))
        if entries:
            self.send(bytes([FXP_NAME]) + number + u32(len(entries)) + b"".join(entries))
        else:
            self.status(number, FX_EOF)

    def long_name(self, name: bytes, found: os.stat_result) -> bytes:
        """A line of `ls -l`."""
        when = time.localtime(found.st_mtime)
        recent = -86400 < time.time() - found.st_mtime < 15768000
        user = text(self.id_name(found.st_uid, False) or b"%d" % found.st_uid)
        group = text(self.id_name(found.st_gid, True) or b"%d" % found.st_gid)
        date = time.strftime("%b %e %H:%M" if recent else "%b %e  %Y", when)
        mode = stat.filemode(found.st_mode)
        line = f"{mode} {found.st_nlink:3} {user:8} {group:8} {found.st_size:8} {date} "
        return line.encode() + name

    def id_name(self, number: int, group: bool) -> bytes:
        """The name of an id, empty without one."""
        key = (group, number)
        if key not in self.names:
            try:
                found = grp.getgrgid(number).gr_name if group else pwd.getpwuid(number).pw_name
            except (KeyError, AttributeError, OverflowError):
                found = ""
            if len(self.names) > 4096:
                self.names.clear()
            self.names[key] = os.fsencode(found)
        return self.names[key]

    def on_remove(self, number: bytes, packet: Packet) -> None:
        os.unlink(packet.path())
        self.status(number, FX_OK)

    def on_mkdir(self, number: bytes, packet: Packet) -> None:
        path, attrs = packet.path(), packet.attrs()
        os.mkdir(path, 0o777 if attrs.mode is None else attrs.mode)
        self.status(number, FX_OK)

    def on_rmdir(self, number: bytes, packet: Packet) -> None:
        os.rmdir(packet.path())
        self.status(number, FX_OK)

    def real(self, path: bytes) -> bytes:
        """Absolute, without links; only the last component may be missing. Raises OSError."""
        found = os.path.realpath(path or b".")
        try:
            os.stat(path or b".")
        except OSError as error:
            if error.errno == errno.ENOENT:
                os.stat(os.path.dirname(found))
            else:
                raise
        return found

    def on_realpath(self, number: bytes, packet: Packet) -> None:
        self.name(number, self.real(packet.path()))

    def on_expand_path(self, number: bytes, packet: Packet) -> None:
        path = packet.path()
        if path.startswith(b"~"):
            user, _, rest = path[1:].partition(b"/")
            path = os.path.join(self.user_home(user), rest)
        self.name(number, self.real(path))

    def on_home_directory(self, number: bytes, packet: Packet) -> None:
        self.name(number, self.real(self.user_home(packet.path())))

    def user_home(self, user: bytes) -> bytes:
        if not user:
            return self.home
        try:
            return os.fsencode(pwd.getpwnam(os.fsdecode(user)).pw_dir)
        except (KeyError, AttributeError):
            raise OSError(errno.ENOENT, "no such user") from None

    def on_rename(self, number: bytes, packet: Packet) -> None:
        """Never over something that is there."""
        old, new = packet.path(), packet.path()
        if stat.S_ISREG(os.lstat(old).st_mode):
            try:
                os.link(old, new, follow_symlinks=False)
                os.unlink(old)
                self.status(number, FX_OK)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EPERM, errno.EMLINK):
                    raise
        if os.path.lexists(new):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(old, new)
        self.status(number, FX_OK)

    def on_posix_rename(self, number: bytes, packet: Packet) -> None:
        old, new = packet.path(), packet.path()
        os.rename(old, new)
        self.status(number, FX_OK)

    def on_readlink(self, number: bytes, packet: Packet) -> None:
        self.name(number, os.readlink(packet.path()))

    def on_symlink(self, number: bytes, packet: Packet) -> None:
        """The target comes first: OpenSSH's order, which everybody has followed."""
        target, path = packet.path(), packet.path()
        os.symlink(target, path)
        self.status(number, FX_OK)

    def on_hardlink(self, number: bytes, packet: Packet) -> None:
        old, new = packet.path(), packet.path()
        os.link(old, new)
        self.status(number, FX_OK)

    def on_fsync(self, number: bytes, packet: Packet) -> None:
        os.fsync(self.file(packet).fd)
        self.status(number, FX_OK)

    def statvfs(self, number: bytes, target: "bytes | int") -> None:
        found = os.statvfs(target)
        flags = found.f_flag & (os.ST_RDONLY | os.ST_NOSUID)
        sizes = (found.f_bsize, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        body = struct.pack(">11Q", *sizes, found.f_favail, getattr(found, "f_fsid", 0), flags, found.f_namemax)
        self.send(bytes([FXP_EXTENDED_REPLY]) + number + body)

    def on_statvfs(self, number: bytes, packet: Packet) -> None:
        self.statvfs(number, packet.path())

    def on_fstatvfs(self, number: bytes, packet: Packet) -> None:
        handle = self.handle(packet)
        self.statvfs(number, handle.path if handle.fd < 0 else handle.fd)

    def on_limits(self, number: bytes, packet: Packet) -> None:
        body = struct.pack(">4Q", SFTP_PACKET, SFTP_DATA, SFTP_DATA, SFTP_HANDLES)
        self.send(bytes([FXP_EXTENDED_REPLY]) + number + body)

    def on_copy_data(self, number: bytes, packet: Packet) -> None:
        source, start, size = self.file(packet), packet.u64(), packet.u64()
        target, at = self.file(packet), packet.u64()
        if os.path.sameopenfile(source.fd, target.fd) and (not size or abs(start - at) < size):
            raise OSError(errno.EIO, "the ranges overlap")
        end = start + size if size else None
        while end is None or start < end:
            data = memoryview(os.pread(source.fd, 262144 if end is None else min(262144, end - start), start))
            if not data and end is not None:
                raise OSError(errno.EIO, "the file ends before that")
            if not data:
                break
            start += len(data)
            while data:
                count = os.write(target.fd, data) if target.append else os.pwrite(target.fd, data, at)
                data, at = data[count:], at + count
        self.status(number, FX_OK)

    def on_users_groups(self, number: bytes, packet: Packet) -> None:
        users, groups = packet.string(), packet.string()
        replies = []
        for ids, group in ((users, False), (groups, True)):
            numbers = [int.from_bytes(ids[at : at + 4], "big") for at in range(0, len(ids) - 3, 4)]
            replies.append(string(b"".join(string(self.id_name(each, group)) for each in numbers)))
        self.send(bytes([FXP_EXTENDED_REPLY]) + number + b"".join(replies))

    def on_extended(self, number: bytes, packet: Packet) -> None:
        handler = self.extensions.get(packet.string())
        if handler is None:
            self.status(number, FX_UNSUPPORTED)
        else:
            handler(number, packet)


class Failure(Exception):
    """Why `start` did not succeed."""


def state_parents() -> "list[str]":
    """Folders in which a guest may keep its own."""
    return ["/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~")]  # noqa: S108  # `private` checks


def private(path: str) -> bool:
    """Whether this is a folder that nobody else may enter. Raises OSError."""
    found = os.lstat(path)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def state_prefix() -> str:
    """What the names of this user's folders begin with."""
    return ".gatewayd-guest-%d-" % os.geteuid()


def state_folder() -> str:
    """A folder of this file's content and this user, which nobody else may enter. Raises Failure."""
    import hashlib  # not needed once the guest runs

    with open(os.path.abspath(__file__), "rb") as file:
        name = state_prefix() + hashlib.sha256(file.read()).hexdigest()[:16]
    reasons = []
    for parent in state_parents():
        path = os.path.join(parent, name)
        try:
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass
            if private(path):
                return path
            reasons.append("%s is somebody else's" % path)  # who cannot be waited for, nor trusted
        except OSError as error:
            reasons.append("%s: %s" % (path, error.strerror))
    raise Failure("there is no place for its state: " + "; ".join(reasons))


def lock(path: str) -> "int | None":
    """A descriptor with the lock of a file, None while somebody else holds it. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno not in AGAIN:
            raise
        return None
    return fd


def recorded(folder: str, seconds: float) -> str:
    """Port, token and process id of the guest of that folder, which answers. Raises OSError and ValueError when none does."""
    fd = os.open(os.path.join(folder, "state"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd) as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ValueError("somebody else's")
        host, port, token, pid = file.read(1024).split()
    with socket.create_connection((host, int(port)), timeout=seconds) as sock:
        sock.sendall(PREFACE.pack(MAGIC, bytes.fromhex(token), os.urandom(16), 1, 0))
        if sock.recv(1) != b"\1":  # it knows no session of a random id
            raise ValueError("no guest")
    return "%d %s %d" % (int(port), token, int(pid))


def running(folder: str, deadline: float) -> "str | None":
    """The line of the guest that runs, None when none does. Raises Failure."""
    while True:
        alive = lock(os.path.join(folder, "alive"))  # held by a guest as long as it lives
        if alive is not None:
            os.close(alive)
            return None
        try:
            return "GATEWAYD-GUEST 1 " + recorded(folder, ANSWER_SECONDS)
        except (OSError, ValueError):  # just starting, or just ending
            pass
        if time.monotonic() > deadline:
            raise Failure("the guest that runs does not answer")
        time.sleep(0.05)


def others(folder: str) -> "list[str]":
    """A line for each guest of this user beside that of `folder`, the latest first: sessions live on in them."""
    found = set()
    for parent in state_parents():
        try:
            names = os.listdir(parent)
        except OSError:
            continue
        for name in names:
            path = os.path.join(parent, name)
            try:
                if name.startswith(state_prefix()) and path != folder and private(path):
                    found.add((os.lstat(os.path.join(path, "state")).st_mtime, path))
            except OSError:  # no guest lives there
                pass
    lines = []  # type: list[str]
    for _, path in sorted(found, reverse=True)[:OTHERS_TRIED]:
        try:
            lines.append("GATEWAYD-OTHER 1 " + recorded(path, OTHER_SECONDS))
        except (OSError, ValueError):  # it was killed, or speaks another version of the protocol
            pass
    return lines[:MAX_OTHERS]


def start(folder: str) -> str:
    """Find the guest, or start one; the line to print. Raises Failure and OSError."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        starting = lock(os.path.join(folder, "lock"))  # held while somebody looks and starts
        if starting is not None:
            break
        if time.monotonic() > deadline:
            raise Failure("another start does not end")
        time.sleep(0.02)
    try:
        return running(folder, deadline) or launch(folder)
    finally:
        os.close(starting)


def launch(folder: str) -> str:
    """Start a guest; its line. Raises Failure and OSError."""
    sock = None
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.bind((host, 0))
            sock.listen(128)
            break
        except OSError as error:
            trouble = error
            sock = None
    if sock is None:
        raise Failure("cannot listen: %s" % trouble)
    reader, writer = os.pipe()
    token = os.urandom(32)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            daemon(sock, token, folder, writer)
        finally:
            os._exit(1)
    os.close(writer)
    os.waitpid(pid, 0)
    ready = select.select([reader], [], [], START_SECONDS)[0]
    message = os.read(reader, 4096) if ready else b""
    if not message.isdigit():
        raise Failure("the guest did not start: " + (text(message) or "it ended"))
    return "GATEWAYD-GUEST 1 %d %s %s" % (sock.getsockname()[1], token.hex(), text(message))


def daemon(sock: socket.socket, token: bytes, folder: str, report: int) -> None:
    """The guest's life, in a session of its own. Never returns."""
    os.setsid()
    if os.fork():
        os._exit(0)
    try:
        os.chdir("/")
        os.umask(0o077)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        close_descriptors(0, 1, 2, sock.fileno(), report)
        default_signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        alive = lock(os.path.join(folder, "alive"))
        if alive is None:
            raise Failure("another guest runs")
        guest = Guest(sock, token, raise_limit())
        path = os.path.join(folder, "state")
        fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            file.write("%s %d %s %d\n" % (*sock.getsockname()[:2], token.hex(), os.getpid()))
        os.rename(path + ".new", path)
        os.write(report, b"%d" % os.getpid())
    except BaseException as error:  # noqa: BLE001  # whatever it is, `start` says so
        os.write(report, str(error).encode()[:4000] or b"?")
        os._exit(1)
    os.close(report)
    touch(guest, [folder, *(os.path.join(folder, name) for name in ("lock", "alive", "state"))])
    try:
        guest.run()
        os.unlink(path)
    finally:
        os._exit(0)


def touch(guest: Guest, paths: "list[str]") -> None:
    """Every hour, so that nothing that tidies up takes the state for forgotten."""
    for path in paths:
        try:
            os.utime(path)
        except OSError:
            pass
    guest.loop.after(3600.0, lambda: touch(guest, paths))


def raise_limit() -> "tuple[int, int] | None":
    """Let the guest have as many open files as it may; returns what its processes are to have."""
    if not LIMITS:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if 0 < hard <= 65536 else max(soft, 65536), hard))
    except (OSError, ValueError):
        return None
    return soft, hard


def main(args: "list[str]") -> int:
    if not hasattr(select, "epoll"):
        sys.stderr.write("guest.py needs Linux\n")
        return 2
    if args == ["sftp"]:
        os.umask(0o022)
        return SftpServer(0, 1).serve()
    if args not in (["start"], ["start", "others"]):
        sys.stderr.write("usage: guest.py start [others] | sftp\n")
        return 2
    try:
        folder = state_folder()
        lines = [start(folder)]
        if args[1:]:
            lines += others(folder)
    except (Failure, OSError) as error:
        sys.stderr.write("cannot start the guest: %s\n" % error)
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""asyncssh, made to fit. What touches things that asyncssh does not promise to keep is in this file, bulk.py and order.py.

What it changes, and the private names it leans on:

- *Nothing acts on this host.* asyncssh answers agent and X11 requests with listeners of its own on this machine
  (`create_agent_listener`, `attach_x11_listener`): both are replaced.
- *Back-pressure.* asyncssh ignores a transport that asks it to pause; here channels keep their data until it drains
  (`pause_writing`, `_flush_send_buf`).
- *The cipher.* The client's order decides (RFC 4253, section 7.1), and OpenSSH's begins with the ones that are slow here. Its
  KEXINIT comes unasked, so ours waits for it and offers AES-GCM alone where the client can do that (`_send_kexinit`,
  `_process_kexinit`, `_kexinit_sent`, `_enc_algs`).
- *Fewer packets.* asyncssh puts an IGNORE before every packet; that is of use to CBC alone, which is not offered (`send_packet`).
- *Endings.* A disconnect message is delivered before the transport closes (`_force_close`); a cancel of an unknown forward is
  refused instead of ending the connection (`_process_cancel_…`, `_local_listeners`).
- *What asyncssh lacks or limits*: ``eow@openssh.com`` both ways, commands that are not UTF-8, bounds on environment and channels
  (`_process_…_request`, `_start_session`, `_send_request`, `add_channel`, `_channels`).
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, cast

import asyncssh
from asyncssh.channel import SSHAgentChannel, SSHChannel, SSHX11Channel
from asyncssh.constants import MSG_IGNORE, MSG_KEXINIT, OPEN_RESOURCE_SHORTAGE
from asyncssh.packet import SSHPacket, String

from gatewayd.frontends.ssh.authorized import Permits
from gatewayd.frontends.ssh.bulk import BulkConnection

if TYPE_CHECKING:
    from asyncssh.connection import SSHServerConnectionOptions

WINDOW = 2 << 20  # bytes a client may send ahead on a channel
PACKET_MAX = 32768  # bytes of data in a packet to us; what OpenSSH sends at most
CHANNELS_MAX = 1024  # of one connection
WRITE_HIGH = 512 * 1024  # bytes in the transport at which channels keep their data
FLUSH_DEADLINE = 5.0  # seconds a closed connection has to deliver what was written
ENVIRONMENT_MAX = 65536  # bytes of names and values that one session may set
FAST_CIPHERS = (b"aes128-gcm@openssh.com", b"aes256-gcm@openssh.com")  # one call into OpenSSL for each packet
CIPHERS = ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes128-ctr", "aes256-ctr"]
_EAGER_CLIENT = b"SSH-2.0-OpenSSH_"  # sends its KEXINIT without waiting for ours
NOT_SSH = b"Invalid SSH identification string.\r\n"
_NOTHING = String(b"")


class Gate(asyncssh.SSHServer):
    """What a connection asks its owner, beyond what `asyncssh.SSHServer` knows."""

    @abstractmethod
    def begin(self, coro: Coroutine[Any, Any, None], name: str) -> None:
        """Run a task that ends with the connection. Raises RuntimeError when that has ended."""

    @abstractmethod
    async def agent_requested(self) -> bool:
        """Whether the client's agent can be reached from the sandbox now."""

    @abstractmethod
    async def x11_requested(self, session: asyncssh.SSHServerSession[bytes], protocol: bytes, cookie: bytes, screen: int) -> str:
        """The DISPLAY of a session from now on; "" when there can be none."""


class CommandSession(asyncssh.SSHServerSession[bytes]):
    """What a session channel tells its session, beyond what `asyncssh.SSHServerSession` knows."""

    @abstractmethod
    def say(self, text: str) -> None:
        """A message of ours to the client's standard error."""

    @abstractmethod
    def output_stopped(self) -> None:
        """The client reads no output any more (PROTOCOL, 2.1: eow@openssh.com)."""


class _Paced(SSHChannel[bytes]):
    """A channel that keeps its data while the transport is full."""

    def _flush_send_buf(self) -> None:
        if isinstance(self._conn, Connection):
            self._send_bulk(self._conn)
            if self._conn.write_paused:
                if self._session is not None:
                    self._pause_resume_writing()
                return
        super()._flush_send_buf()

    def _send_bulk(self, conn: Connection) -> None:
        """Send what can be sent the short way."""
        while self._send_buf and self._send_window and self._send_chan is not None and not conn.write_paused:
            data, datatype = self._send_buf[0]
            if datatype is not None or not conn.takes_data:
                return
            size = min(len(data), self._send_window, self._send_pktsize)
            self._send_buf_len -= size
            self._send_window -= size
            with memoryview(data) as view, view[:size] as part:
                conn.send_data(self._send_chan, part)
            if size == len(data):
                del self._send_buf[0]
            else:
                del data[:size]

    def flush(self) -> None:
        """Go on after the transport has drained."""
        if self._send_chan is not None and self._session is not None:
            self._flush_send_buf()

    def log_sent_packet(self, *_: Any) -> None:
        """Formats a line for every packet, shown or not."""

    def log_received_packet(self, *_: Any) -> None:
        """As above."""


class TCPChannel(_Paced, asyncssh.SSHTCPChannel[bytes]):
    """direct-tcpip and forwarded-tcpip."""


class UnixChannel(_Paced, asyncssh.SSHUNIXChannel[bytes]):
    """direct-streamlocal and forwarded-streamlocal."""


class AgentChannel(_Paced, SSHAgentChannel):
    """auth-agent@openssh.com, opened by us."""


class X11Channel(_Paced, SSHX11Channel):
    """x11, opened by us."""


class SessionChannel(_Paced, asyncssh.SSHServerChannel[bytes]):
    """A session: shell, command or subsystem."""

    _environment_size = 0  # bytes set so far

    @property
    def environment(self) -> dict[str, str]:
        """What the client has set; bytes that are not UTF-8 are surrogate escapes."""
        return {_text(name): _text(value) for name, value in self._env.items()}

    @property
    def was_closed(self) -> bool:
        """Nothing can be sent any more."""
        return self._send_chan is None or self._send_state in {"close_pending", "closed"}

    def drop_output(self, *, everything: bool = False) -> None:
        """Forget standard output that the client does not read any more; `everything`: also errors it has no window for."""
        every = everything and not self._send_window
        self._send_buf = [] if every else [entry for entry in self._send_buf if entry[1] is not None]
        self._send_buf_len = sum(len(data) for data, _ in self._send_buf)
        self.flush()

    def send_input_stopped(self) -> None:
        """Tell the client that nobody reads its input any more."""
        if not self.was_closed:
            self._send_request(b"eow@openssh.com")

    def _process_env_request(self, packet: SSHPacket) -> bool:
        name, value = packet.get_string(), packet.get_string()
        packet.check_end()
        self._environment_size += len(name) + len(value)
        if not name or b"=" in name or b"\0" in name + value or self._environment_size > ENVIRONMENT_MAX:
            return False
        self._env[name] = value
        return True

    def _process_exec_request(self, packet: SSHPacket) -> bool:
        command = packet.get_string()
        packet.check_end()
        return self._start_session(command=_text(command))

    def _process_eow_at_openssh_dot_com_request(self, packet: SSHPacket) -> bool:
        packet.check_end()
        if isinstance(self._session, CommandSession):
            self._session.output_stopped()
        return True


class Connection(BulkConnection):
    """The server's side of one SSH connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: SSHServerConnectionOptions, gate: Gate) -> None:
        """`options` may be shared by connections."""
        super().__init__(loop, options)
        self._protocol_factory = lambda: gate
        self._gate = gate
        self.write_paused = False  # the transport holds more than WRITE_HIGH
        self._kexinit_due = False  # ours waits for the client's
        self._aborting: asyncio.TimerHandle | None = None  # set while a closed transport delivers its rest

    @property
    def client_version(self) -> str:
        """What the client calls itself."""
        return self._client_version.decode("ascii", "replace")

    @property
    def sessions(self) -> list[CommandSession]:
        """Those that are open."""
        found = [channel._session for channel in self._channels.values()]
        return [session for session in found if isinstance(session, CommandSession)]

    def begin(self, coro: Coroutine[Any, Any, None], name: str) -> None:
        """See OrderedConnection."""
        self._gate.begin(coro, name)

    # --- the transport ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncssh."""
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=WRITE_HIGH)
        super().connection_made(transport)

    def pause_writing(self) -> None:
        """See asyncio."""
        self.write_paused = True

    def resume_writing(self) -> None:
        """See asyncio."""
        self.write_paused = False
        for channel in list(self._channels.values()):
            if isinstance(channel, _Paced):
                channel.flush()
            if self.write_paused:
                break

    def connection_lost(self, exc: Exception | None = None) -> None:
        """See asyncssh."""
        if self._aborting is not None:
            self._aborting.cancel()
            self._aborting = None
        super().connection_lost(exc)

    def _force_close(self, exc: Exception | None) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()
            self._aborting = self._loop.call_later(FLUSH_DEADLINE, transport.abort)
            self._loop.call_soon(self._cleanup, exc)

    def log_sent_packet(self, *_: Any) -> None:
        """Formats a line for every packet, shown or not."""

    def log_received_packet(self, *_: Any) -> None:
        """As above."""

    # --- key exchange -------------------------------------------------------------------------------------------------

    def send_packet(self, pkttype: int, *args: bytes, handler: Any = None) -> None:
        """See asyncssh."""
        if pkttype != MSG_IGNORE or args != (_NOTHING,):
            super().send_packet(pkttype, *args, handler=handler)

    def _send_kexinit(self) -> None:
        if not self._session_id and not self._kexinit_due and self._client_version.startswith(_EAGER_CLIENT):
            self._kexinit_due = True
            return
        super()._send_kexinit()

    def _recv_version(self) -> bool:
        line, newline, _ = self._inpbuf.partition(b"\n")
        if newline and not (line.startswith((b"SSH-2.0-", b"SSH-1.99-")) and line.isascii()):
            self._send(NOT_SSH)  # as sshd answers
            self._force_close(asyncssh.ProtocolNotSupported("Unsupported SSH version"))
            return False
        return super()._recv_version()

    async def _process_kexinit(self, pkttype: int, pktid: int, packet: SSHPacket) -> None:
        if self._kexinit_due and not self._session_id:
            self._kexinit_sent = False
            peek = SSHPacket(packet.get_remaining_payload())
            peek.get_bytes(16)  # cookie
            peek.get_namelist()  # key exchange
            peek.get_namelist()  # host keys
            upward, downward = peek.get_namelist(), peek.get_namelist()
            self._enc_algs = [name for name in FAST_CIPHERS if name in upward and name in downward] or self._enc_algs
        await super()._process_kexinit(pkttype, pktid, packet)

    _packet_handlers = {**BulkConnection._packet_handlers, MSG_KEXINIT: cast(Any, _process_kexinit)}  # noqa: RUF012

    async def reload_config(self) -> None:
        """There is no configuration of asyncssh's own to read again."""

    async def _validate_openssh_certificate(self, username: str, cert: Any) -> Any:
        """As sshd has it, and asyncssh has not: a certificate for nobody in particular is for nobody, and one that forces
        another command than the line of its authority does comes from somebody who may not say so.
        """
        if not cert.principals:
            return None
        key = await super()._validate_openssh_certificate(username, cert)
        commands = {self.get_key_option("command"), cert.options.get("force-command")} - {None}
        return key if len(commands) < 2 else None

    def permits(self, option: str, host: str, port: int) -> bool:
        """Whether PERMIT_OPEN or PERMIT_LISTEN of the client's key, if it has that, allows a forward."""
        permits = self.get_key_option(option)
        return not isinstance(permits, Permits) or permits.allow(host, port)

    # --- channels -----------------------------------------------------------------------------------------------------

    def add_channel(self, chan: SSHChannel[Any]) -> int:
        """See asyncssh."""
        if len(self._channels) >= CHANNELS_MAX:
            raise asyncssh.ChannelOpenError(OPEN_RESOURCE_SHORTAGE, f"a connection holds at most {CHANNELS_MAX} channels")
        return super().add_channel(chan)

    def create_server_channel(self, *_: Any, **__: Any) -> SessionChannel:
        """See asyncssh."""
        self._update_recv_pktlen(PACKET_MAX)
        return SessionChannel(self, self._loop, self._allow_pty, False, False, 0, 0, None, "strict", WINDOW, PACKET_MAX)

    def create_tcp_channel(self, *_: Any, **__: Any) -> TCPChannel:
        """See asyncssh."""
        self._update_recv_pktlen(PACKET_MAX)
        return TCPChannel(self, self._loop, None, "strict", WINDOW, PACKET_MAX)

    def create_unix_channel(self, *_: Any, **__: Any) -> UnixChannel:
        """See asyncssh."""
        self._update_recv_pktlen(PACKET_MAX)
        return UnixChannel(self, self._loop, None, "strict", WINDOW, PACKET_MAX)

    def create_agent_channel(self, *_: Any, **__: Any) -> AgentChannel:
        """See asyncssh."""
        self._update_recv_pktlen(PACKET_MAX)
        return AgentChannel(self, self._loop, None, "strict", WINDOW, PACKET_MAX)

    def create_x11_channel(self, *_: Any, **__: Any) -> X11Channel:
        """See asyncssh."""
        self._update_recv_pktlen(PACKET_MAX)
        return X11Channel(self, self._loop, None, "strict", WINDOW, PACKET_MAX)

    async def open_agent(self, factory: Callable[[], asyncssh.SSHUNIXSession[bytes]]) -> None:
        """A channel to the client's agent. Raises asyncssh.ChannelOpenError."""
        await self.create_agent_channel().open(factory)

    async def open_x11(self, factory: Callable[[], asyncssh.SSHTCPSession[bytes]], host: str, port: int) -> None:
        """A channel to the client's display. Raises asyncssh.ChannelOpenError."""
        await self.create_x11_channel().open(factory, host, port)

    # --- requests that asyncssh would answer with listeners on this host ----------------------------------------------

    async def create_agent_listener(self) -> bool:
        """See asyncssh."""
        return self._may("agent-forwarding") and await self._gate.agent_requested()

    async def attach_x11_listener(self, chan: Any, auth_proto: bytes, auth_data: bytes, screen: int) -> str | None:
        """See asyncssh."""
        if not self._may("X11-forwarding") or chan._session is None:
            return None
        return await self._gate.x11_requested(chan._session, auth_proto, auth_data, screen) or None

    def detach_x11_listener(self, chan: Any) -> None:
        """The listeners belong to their sessions."""

    def _process_cancel_tcpip_forward_global_request(self, packet: SSHPacket) -> None:
        peek = SSHPacket(packet.get_remaining_payload())
        key = peek.get_string().decode("utf-8", "replace").lower(), peek.get_uint32()
        if key in self._local_listeners:
            super()._process_cancel_tcpip_forward_global_request(packet)
        else:
            self._report_global_response(False)

    def _process_cancel_streamlocal_forward_at_openssh_dot_com_global_request(self, packet: SSHPacket) -> None:
        path = SSHPacket(packet.get_remaining_payload()).get_string().decode("utf-8", "replace")
        if path in self._local_listeners:
            super()._process_cancel_streamlocal_forward_at_openssh_dot_com_global_request(packet)
        else:
            self._report_global_response(False)


def _text(data: bytes) -> str:
    """Names of files may be any bytes: what is not UTF-8 is escaped."""
    return data.decode("utf-8", "surrogateescape")

"""What an SSH connection is about: one sandbox, one user in it, and the ways in."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gatewayd.api import ErrorKind
from gatewayd.errors import GatewayError
from gatewayd.relay import ByteStream

if TYPE_CHECKING:
    from gatewayd.sandbox.accounts import Account
    from gatewayd.sandbox.boxes import Directory
    from gatewayd.sandbox.guest_client import GuestListener, Guests, OnStream
    from gatewayd.sandbox.pool import Pool
    from gatewayd.sandbox.session import ProcessSpec, Session

LOCAL_NAMES = frozenset({"", "localhost", "localhost.localdomain", "ip6-localhost"})
READY_DEADLINE = 180.0  # seconds for the guest to run, a sandbox that starts first included


@dataclass(frozen=True)
class Ways:
    """The ways into sandboxes that this daemon has."""

    directory: Directory
    pool: Pool
    guests: Guests


class Target:
    """One user of one sandbox."""

    def __init__(self, ways: Ways, account: Account, sandbox: str, user: str, *, wake: bool = True) -> None:
        """`user` "": the image's own. `wake`: whether a stopped sandbox may be started."""
        self.account = account
        self.sandbox = sandbox
        self.user = user
        self.wake = wake
        self._ways = ways
        self._text_only: bool | None = None  # None: not known yet

    def as_user(self, user: str) -> Target:
        """The same sandbox, as somebody else."""
        return Target(self._ways, self.account, self.sandbox, user, wake=self.wake)

    async def text_only(self) -> bool:
        """Whether the image cannot run the guest; waits until that is known. Raises GatewayError."""
        if self._text_only is None:
            try:
                async with asyncio.timeout(READY_DEADLINE):
                    await self._ways.guests.ready(self.account, self.sandbox, wake=self.wake)
                self._text_only = False
            except TimeoutError:
                raise GatewayError(
                    f"cannot start the guest in sandbox {self.sandbox!r}: not within {READY_DEADLINE:g} s", kind=ErrorKind.TIMEOUT
                ) from None
            except GatewayError as exc:
                if exc.kind != ErrorKind.UNSUPPORTED:
                    raise
                self._text_only = True
        return self._text_only

    async def start(self, spec: ProcessSpec) -> Session:
        """A process. Raises GatewayError."""
        if await self.text_only():
            from gatewayd.sandbox.text_session import start_text_session

            check = None if self.wake else functools.partial(self._ways.pool.check, self.account, self.sandbox)
            return await start_text_session(self.account, self._ways.directory, self.sandbox, spec, check=check)
        return await self._ways.guests.process(self.account, self.sandbox, spec, wake=self.wake)

    async def sftp(self) -> Session:
        """The SFTP service of the guest. Raises GatewayError."""
        await self._need_guest("serve SFTP")
        return await self._ways.guests.sftp(self.account, self.sandbox, self.user, wake=self.wake)

    async def connect_tcp(self, host: str, port: int) -> ByteStream:
        """A connection made inside the sandbox; `host` may be the sandbox itself. Raises GatewayError.

        The guest's outlive a broken link. Where there is no guest, the service connects, to the sandbox itself only.
        """
        if self.is_local(host):
            if await self.text_only():
                return await self._ways.pool.dial(self.account, self.sandbox, port, wake=self.wake)
            host = "localhost"
        else:
            await self._need_guest(f"connect to {host}")
        return await self._ways.guests.connect_tcp(self.account, self.sandbox, host, port, wake=self.wake)

    async def connect_unix(self, path: str) -> ByteStream:
        """A connection to a socket inside. Raises GatewayError."""
        await self._need_guest("connect to a Unix socket")
        return await self._ways.guests.connect_unix(self.account, self.sandbox, path, self.user, wake=self.wake)

    async def listen_tcp(self, host: str, port: int, on_stream: OnStream) -> GuestListener:
        """A listening port inside. Raises GatewayError."""
        await self._need_guest("listen on a port")
        return await self._ways.guests.listen_tcp(self.account, self.sandbox, host, port, self.user, on_stream, wake=self.wake)

    async def listen_unix(self, path: str, on_stream: OnStream) -> GuestListener:
        """A listening socket inside; "" for a fresh private one. Raises GatewayError."""
        await self._need_guest("listen on a Unix socket")
        return await self._ways.guests.listen_unix(self.account, self.sandbox, path, self.user, on_stream, wake=self.wake)

    def is_local(self, host: str) -> bool:
        """Whether `host` means the sandbox itself."""
        host = host.lower()
        if host in LOCAL_NAMES or host in (self.sandbox.lower(), f"sandbox-{self.sandbox}".lower()):
            return True
        try:
            address = ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return address.is_unspecified or str(address) in ("127.0.0.1", "::1")

    async def _need_guest(self, what: str) -> None:
        if await self.text_only():
            raise GatewayError(
                f"cannot {what} in sandbox {self.sandbox!r}: its image has no Python, so only text sessions work",
                kind=ErrorKind.UNSUPPORTED,
                hint="use an image with python3, or one with sshd and `sandbox ssh-setup --direct`",
            )

"""Data packets with AES-GCM, without the copies that asyncssh makes of them; all other packets go its way.

asyncssh cuts what it has received off its buffer twice for each packet, makes a new cipher for each, and copies a packet that it
sends five times. Here a packet is opened where it lies, and sealed in one piece. What this leans on: the attributes that asyncssh
keeps of an encryption (`GCMCipher._key`, `._iv`), of what came (`_inpbuf`, `_recv_pkthdr`, `_recv_packet`), and of channels
(`_recv_state`, `_recv_window`, `_accept_data`).
"""

from __future__ import annotations

import os
import struct
from typing import Any

import asyncssh
from asyncssh.constants import MSG_CHANNEL_DATA
from asyncssh.crypto import GCMCipher, cipher
from asyncssh.encryption import GCMEncryption

from gatewayd.frontends.ssh.order import OrderedConnection

TAG = 16  # bytes behind a packet
BLOCK = 16  # bytes
_AESGCM: Any = cipher.AESGCM  # type: ignore[attr-defined]  # the library that asyncssh uses
_InvalidTag: type[Exception] = cipher.InvalidTag  # type: ignore[attr-defined]
_LENGTH = struct.Struct(">I")
_HEAD = struct.Struct(">BBII")  # length of the padding, type, channel, length of the data


class FastGCM(GCMEncryption):
    """One direction, from one key exchange to the next (RFC 5647, section 7)."""

    def __init__(self, start: GCMCipher) -> None:
        """Goes on where `start` is."""
        super().__init__(start)
        self._aead = _AESGCM(start._key)
        self._fixed = start._iv[:4]  # of every nonce
        self._count = int.from_bytes(start._iv[4:], "big")  # the rest of the next nonce
        self.opened: bytes | None = None  # what `decrypt_packet` will be asked for: it has been opened already

    def _nonce(self) -> bytes:
        count = self._count
        self._count = (count + 1) & 0xFFFFFFFFFFFFFFFF
        return self._fixed + count.to_bytes(8, "big")

    def seal(self, header: bytes, packet: bytes) -> bytes:
        """The packet, encrypted, with its tag."""
        return bytes(self._aead.encrypt(self._nonce(), packet, header))

    def open(self, header: bytes | memoryview, sealed: bytes | memoryview) -> bytes | None:
        """The packet; None when it is not genuine."""
        try:
            return bytes(self._aead.decrypt(self._nonce(), sealed, header))
        except _InvalidTag:
            return None

    def encrypt_packet(self, seq: int, header: bytes, packet: bytes) -> tuple[bytes, bytes]:
        """See asyncssh."""
        sealed = self.seal(header, packet)
        return header + sealed[:-TAG], sealed[-TAG:]

    def decrypt_packet(self, seq: int, first: bytes, rest: bytes, header_len: int, mac: bytes) -> bytes | None:
        """See asyncssh."""
        if self.opened is not None:
            opened, self.opened = self.opened, None
            return opened
        return self.open(first[:header_len], first[header_len:] + rest + mac)


class BulkConnection(OrderedConnection):
    """A connection whose data packets are handled here when they are sealed by AES-GCM."""

    def send_newkeys(self, k: bytes, h: bytes) -> None:
        """See asyncssh."""
        super().send_newkeys(k, h)
        self._send_encryption = _fast(self._send_encryption)
        self._next_recv_encryption = _fast(self._next_recv_encryption)

    # --- out ----------------------------------------------------------------------------------------------------------

    @property
    def takes_data(self) -> bool:
        """Whether `send_data` may be called now."""
        return (
            isinstance(self._send_encryption, FastGCM)
            and self._auth_complete
            and self._kex_complete
            and self._rekey_bytes_sent < self._rekey_bytes
            and self._compressor is None
            and self._transport is not None
        )

    def send_data(self, channel: int, data: memoryview) -> None:
        """SSH_MSG_CHANNEL_DATA. The window is the caller's business."""
        encryption, transport = self._send_encryption, self._transport
        if not isinstance(encryption, FastGCM) or transport is None:
            raise RuntimeError("send_data called although takes_data is false")
        size = _HEAD.size + len(data)
        padding = -size % BLOCK
        padding += BLOCK if padding < 4 else 0  # RFC 4253, section 6
        packet = b"".join((_HEAD.pack(padding, MSG_CHANNEL_DATA, channel, len(data)), data, os.urandom(padding)))
        header = _LENGTH.pack(len(packet))
        transport.writelines((header, encryption.seal(header, packet)))
        self._send_seq = (self._send_seq + 1) & 0xFFFFFFFF
        self._rekey_bytes_sent += len(packet)

    # --- in -----------------------------------------------------------------------------------------------------------

    def _recv_pkthdr(self) -> bool:
        encryption = self._recv_encryption
        if not isinstance(encryption, FastGCM) or not self._auth_complete:
            return super()._recv_pkthdr()
        buffer, at, end = self._inpbuf, 0, 0
        opened: bytes | None = None
        with memoryview(buffer) as view:
            while opened is None and at + 4 <= len(buffer):
                (length,) = _LENGTH.unpack_from(buffer, at)
                if length < BLOCK or length > self._max_recv_pktlen:
                    raise asyncssh.ProtocolError(f"A packet of {length} bytes")
                end = at + 4 + length + TAG
                if end > len(buffer):
                    break
                opened = encryption.open(view[at : at + 4], view[at + 4 : end])
                if opened is None:
                    raise asyncssh.MACError("MAC verification failed")
                if self._took(opened):
                    opened, at = None, end
        if opened is None:
            self._inpbuf = buffer[at:]
            return False  # until more has come
        encryption.opened = opened
        self._inpbuf = buffer[at:end]
        super()._recv_pkthdr()
        goes_on = self._recv_packet()
        self._inpbuf = buffer[end:]
        return goes_on

    def _took(self, packet: bytes) -> bool:
        """Whether it was data for a channel that wants it."""
        padding, kind, number, size = _HEAD.unpack_from(packet)
        if kind != MSG_CHANNEL_DATA or size + _HEAD.size + padding != len(packet):
            return False
        channel: Any = self._channels.get(number)
        if channel is None or channel._recv_state != "open" or size > channel._recv_window:
            return False
        channel._accept_data(packet[_HEAD.size : _HEAD.size + size])
        self._finish_recv_packet(MSG_CHANNEL_DATA, self._recv_seq)
        return True


def _fast(encryption: Any) -> Any:
    return FastGCM(encryption._cipher) if type(encryption) is GCMEncryption else encryption

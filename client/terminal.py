"""The terminal on standard input: raw and back, its size, its modes as a remote terminal takes them over."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
from contextlib import suppress

SIZE_DEFAULT = (80, 24, 0, 0)
_SIZE = struct.Struct("HHHH")  # struct winsize: rows, columns, x pixels, y pixels
_MODE = struct.Struct(">BI")
_VDISABLE = 0  # a control character that is switched off, here
_SSH_VDISABLE = 255  # and in RFC 4254
_IUTF8 = 0x4000  # which the module termios does not name

# RFC 4254, section 8, and RFC 8160 (IUTF8): opcode → name of a control character, or of a flag by its word.
_CHARS = {
    1: "VINTR",
    2: "VQUIT",
    3: "VERASE",
    4: "VKILL",
    5: "VEOF",
    6: "VEOL",
    7: "VEOL2",
    8: "VSTART",
    9: "VSTOP",
    10: "VSUSP",
    12: "VREPRINT",
    13: "VWERASE",
    14: "VLNEXT",
    18: "VDISCARD",
}
_INPUT = {30: "IGNPAR", 31: "PARMRK", 32: "INPCK", 33: "ISTRIP", 34: "INLCR", 35: "IGNCR", 36: "ICRNL", 38: "IXON", 39: "IXANY"}
_INPUT |= {40: "IXOFF", 41: "IMAXBEL"}
_LOCAL = {50: "ISIG", 51: "ICANON", 53: "ECHO", 54: "ECHOE", 55: "ECHOK", 56: "ECHONL", 57: "NOFLSH", 58: "TOSTOP", 59: "IEXTEN"}
_LOCAL |= {60: "ECHOCTL", 61: "ECHOKE"}
_OUTPUT = {70: "OPOST", 72: "ONLCR", 73: "OCRNL", 74: "ONOCR", 75: "ONLRET"}
_CONTROL = {90: "CS7", 91: "CS8", 92: "PARENB", 93: "PARODD"}
_OP_IUTF8, _OP_ISPEED, _OP_OSPEED, _OP_END = 42, 128, 129, 0
_SPEED = 38400  # told for both directions: that of every pseudo-terminal

_PRIVATE = re.compile(rb"\x1b\[\?([0-9;]{1,40})([hl])")  # DECSET and DECRST
_TAIL = 48  # bytes of a sequence that may still be cut off
# Modes that must not stay behind where a program could not end them: mouse reports, focus, bracketed paste, alternate screens.
_UNDONE = (b"9", b"1000", b"1002", b"1003", b"1004", b"1005", b"1006", b"1015", b"2004", b"1", b"47", b"1047", b"1049")


class Terminal:
    """A terminal, raw between `raw` and `restore`."""

    def __init__(self, fd: int = 0) -> None:
        self.fd = fd
        self._saved: list[object] | None = None  # the modes to go back to; None while it is not raw

    @classmethod
    def found(cls, *fds: int) -> Terminal | None:
        """The first of `fds` that is a terminal."""
        for fd in fds:
            with suppress(termios.error):
                termios.tcgetattr(fd)
                return cls(fd)
        return None

    def size(self) -> tuple[int, int, int, int]:
        """Columns, rows, and both in pixels (0: not known)."""
        try:
            rows, columns, xpixel, ypixel = _SIZE.unpack(fcntl.ioctl(self.fd, termios.TIOCGWINSZ, bytes(_SIZE.size)))
        except OSError:
            return SIZE_DEFAULT
        return (columns, rows, xpixel, ypixel) if columns and rows else SIZE_DEFAULT

    def modes(self) -> bytes:
        """Encoded terminal modes (RFC 4254, section 8); b"" when they cannot be read."""
        try:
            iflag, oflag, cflag, lflag, _, _, chars = termios.tcgetattr(self.fd)
        except termios.error:
            return b""
        parts = []
        for opcode, name in _CHARS.items():
            value = chars[getattr(termios, name)]
            code = value if isinstance(value, int) else value[0]
            parts.append(_MODE.pack(opcode, _SSH_VDISABLE if code == _VDISABLE else code))
        for word, table in ((iflag, _INPUT), (lflag, _LOCAL), (oflag, _OUTPUT), (cflag, _CONTROL)):
            for opcode, name in table.items():
                mask = getattr(termios, name)
                parts.append(_MODE.pack(opcode, int(word & mask == mask)))
        parts.append(_MODE.pack(_OP_IUTF8, int(bool(iflag & _IUTF8))))
        parts += (_MODE.pack(_OP_ISPEED, _SPEED), _MODE.pack(_OP_OSPEED, _SPEED), bytes((_OP_END,)))
        return b"".join(parts)

    def raw(self) -> None:
        """Pass every byte on as it is typed. What was typed before stays. Idempotent."""
        if self._saved is not None:
            return
        with suppress(termios.error):
            saved = termios.tcgetattr(self.fd)
            iflag, oflag, cflag, lflag, ispeed, ospeed, chars = saved
            iflag = iflag & ~(
                termios.ISTRIP | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON | termios.IXANY | termios.IXOFF
            )
            iflag = (iflag | termios.IGNPAR) & ~(termios.BRKINT | termios.PARMRK)
            oflag &= ~termios.OPOST
            lflag &= ~(termios.ISIG | termios.ICANON | termios.ECHO | termios.ECHOE | termios.ECHOK | termios.ECHONL)
            lflag &= ~termios.IEXTEN
            chars = list(chars)
            chars[termios.VMIN], chars[termios.VTIME] = 1, 0
            termios.tcsetattr(self.fd, termios.TCSADRAIN, [iflag, oflag, cflag, lflag, ispeed, ospeed, chars])
            self._saved = saved

    @property
    def is_raw(self) -> bool:
        """Whether `raw` is in effect."""
        return self._saved is not None

    def restore(self) -> None:
        """Back to the modes from before `raw`; idempotent."""
        saved, self._saved = self._saved, None
        if saved is not None:
            with suppress(termios.error):
                termios.tcsetattr(self.fd, termios.TCSADRAIN, saved)  # type: ignore[arg-type]  # as tcgetattr returned it


class Screen:
    """Which modes the remote programs have left switched on, told from their output."""

    def __init__(self) -> None:
        self._on: set[bytes] = set()  # of _UNDONE
        self._hidden = False  # the cursor is
        self._tail = b""  # of the output so far: the beginning of a sequence

    def follow(self, data: bytes) -> None:
        """Take note of output."""
        if b"\x1b" not in data and not self._tail:
            return
        data = self._tail + data
        for match in _PRIVATE.finditer(data):
            for mode in match[1].split(b";"):
                if mode == b"25":
                    self._hidden = match[2] == b"l"
                elif mode in _UNDONE:
                    (self._on.add if match[2] == b"h" else self._on.discard)(mode)
        cut = data.rfind(b"\x1b", max(0, len(data) - _TAIL))
        self._tail = data[cut:] if cut >= 0 and _PRIVATE.match(data, cut) is None else b""

    def undo(self) -> bytes:
        """What to write so that the terminal can be used again; b"" after programs that cleaned up themselves."""
        parts = [b"\x1b[?%sl" % mode for mode in _UNDONE if mode in self._on]
        if self._hidden:
            parts.append(b"\x1b[?25h")
        if parts:
            parts.append(b"\x1b[0m")
        self._on.clear()
        self._hidden = False
        return b"".join(parts)


def environment() -> list[tuple[str, str]]:
    """The variables that tell a program on a terminal what it may show, from this process's environment."""
    exact = ("COLORTERM", "LANG", "CLICOLOR", "CLICOLOR_FORCE", "FORCE_COLOR", "NO_COLOR")
    return [(name, value) for name, value in os.environ.items() if name in exact or name.startswith("LC_")]

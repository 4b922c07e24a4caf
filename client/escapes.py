"""What is typed into a raw terminal: bytes for the sandbox, and after a newline ``~`` and a letter for this program."""

from __future__ import annotations

LEAVE, DETACH, HELP, SUSPEND = "leave", "detach", "help", "suspend"  # what `Escapes.feed` returns between the bytes

_LETTERS = {ord("."): LEAVE, ord("d"): DETACH, ord("?"): HELP, 0x1A: SUSPEND}
_NEWLINES = b"\r\n"
_PASTE_BEGINS, _PASTE_ENDS = b"\x1b[200~", b"\x1b[201~"  # bracketed paste, as the terminal reports it
_TILDE = 0x7E

HELP_TEXT = (
    "after a newline:",
    "  ~.   end the session",
    "  ~d   leave it running, to be attached again",
    "  ~^Z  suspend this command",
    "  ~~   type a ~",
    "  ~?   this text",
)


class Escapes:
    """Finds escapes in the order they are typed, however the bytes are cut. Pasted text (bracketed paste) holds none."""

    def __init__(self) -> None:
        self._fresh = True  # at the start of a line
        self._tilde = False  # a ~ at the start of a line waits for its letter
        self._pasting = False  # between the two marks of a bracketed paste
        self._tail = b""  # the last 6 bytes typed: a mark may be cut in two

    def feed(self, data: bytes) -> list[bytes | str]:
        """What `data` means, in order: bytes to send, and one of LEAVE, DETACH, HELP, SUSPEND."""
        if not self._tilde and _TILDE not in data:
            self._sent(data)
            return [data] if data else []
        found: list[bytes | str] = []
        plain = bytearray()
        for byte in data:
            if self._tilde:
                self._tilde = False
                if (action := _LETTERS.get(byte)) is not None:
                    if plain:
                        found.append(bytes(plain))
                        plain.clear()
                    found.append(action)
                    self._fresh = True
                    continue
                if byte != _TILDE:
                    plain.append(_TILDE)
            elif byte == _TILDE and self._fresh and not self._pasting:
                self._tilde = True
                continue
            plain.append(byte)
            self._sent(bytes((byte,)))
        if plain:
            found.append(bytes(plain))
        return found

    def _sent(self, data: bytes) -> None:
        if not data:
            return
        self._fresh = data[-1] in _NEWLINES
        self._tail = (self._tail + data)[-len(_PASTE_BEGINS) :]
        if self._tail == _PASTE_BEGINS:
            self._pasting = True
        elif self._tail == _PASTE_ENDS:
            self._pasting = False

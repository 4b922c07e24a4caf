"""A real terminal emulator to test with: tmux."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .conftest import Gateway, wait_until


class Window:
    """One window of a tmux of its own, with a shell on it."""

    def __init__(self, gateway: Gateway, socket: Path) -> None:
        self._gateway = gateway
        self._socket = socket
        shell = "env -u TMUX PS1='LOCAL> ' bash --norc --noprofile"
        self("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", shell)
        self("set-option", "-g", "status", "off")
        self.prompt("LOCAL>")

    def __call__(self, *args: str, data: bytes | None = None) -> str:
        argv = ["tmux", "-S", str(self._socket), *args]
        env = {**self._gateway.env, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        return subprocess.run(argv, env=env, input=data, capture_output=True, check=True, timeout=20).stdout.decode()

    def type(self, text: str, enter: bool = True) -> None:
        self("send-keys", "-l", "--", text)
        if enter:
            self.key("Enter")

    def key(self, *names: str) -> None:
        self("send-keys", *names)

    def shown(self) -> str:
        return self("capture-pane", "-p")

    def prompt(self, text: str) -> None:
        """Wait until the last line is this prompt and nothing else: what is typed next is for whoever wrote it."""
        try:
            wait_until(lambda: self.shown().rstrip().rpartition("\n")[2].rstrip() == text, f"the prompt {text!r}", 40)
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.shown()}") from None

    def until(self, text: str) -> str:
        """Wait until a line of the screen begins with `text`; the screen."""

        def found() -> str | None:
            screen = self.shown()
            return screen if any(line.startswith(text) for line in screen.splitlines()) else None

        try:
            return str(wait_until(found, f"the screen shows {text!r}", 40))
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.shown()}") from None

"""console as a person has it: in a real terminal emulator (tmux), with programs that paint the whole screen."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import BIN, Gateway, wait_until
from .tmux import Window

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(shutil.which("tmux") is None, reason="not installed: tmux")]

PASTED = 100_000  # bytes


class Tmux(Window):
    """With consoles on it."""

    def console(self, *args: str) -> None:
        """Open a console whose prompt is known."""
        words = shlex.join([str(BIN / "sandbox"), "console", "box", "--shell", "/bin/bash", *args])
        self.type(f"""{words} --env PROMPT_COMMAND="PS1='BOX> '" --env HISTFILE=""")
        self.prompt("BOX>")


@pytest.fixture
def tmux(gateway: Gateway, box: str, request: pytest.FixtureRequest) -> Iterator[Tmux]:
    terminal = Tmux(gateway, gateway.root / f"tmux-{request.node.name}")
    yield terminal
    with contextlib.suppress(subprocess.CalledProcessError):
        terminal("kill-server")


def test_type_resize_interrupt_leave(tmux: Tmux) -> None:
    tmux.console()
    tmux.type("echo $TERM ü€😀; stty size")
    tmux.until("30 100")
    assert "ü€😀" in tmux.shown()
    tmux("resize-window", "-x", "71", "-y", "19")
    tmux.type("clear; stty size")
    tmux.until("19 71")
    tmux.type("sh -c 'echo running; exec sleep 1000'")
    tmux.until("running")
    tmux.key("C-c")
    tmux.type("echo code=$?")
    tmux.until("code=130")
    tmux.key("Enter")
    tmux.type("~.", enter=False)
    tmux.prompt("LOCAL>")
    tmux.type("echo left=$?; stty -a | grep -o ' icanon'")
    tmux.until("left=129")
    tmux.until(" icanon")  # the terminal is as it was


def test_full_screen_programs(tmux: Tmux, gateway: Gateway, box: str) -> None:
    gateway.sh(box, "seq -f 'line %g' 1 500 > /root/lines")
    tmux.console()
    tmux.type("less /root/lines")
    tmux.until("line 1")
    tmux.key("G")
    tmux.until("line 500")
    tmux("resize-window", "-x", "60", "-y", "12")
    painted = [f"line {number}" for number in range(472, 483)]  # from the line that was the first one before
    wait_until(lambda: tmux.shown().splitlines()[:11] == painted, "it is painted anew, in the new size")
    tmux.key("g")
    wait_until(lambda: tmux.shown().splitlines()[:11] == [f"line {number}" for number in range(1, 12)], "the first lines")
    tmux.key("q")
    tmux.prompt("BOX>")
    tmux.type("exit 5")
    tmux.prompt("LOCAL>")
    tmux.type("echo code=$?")
    tmux.until("code=5")


def test_an_editor(tmux: Tmux, gateway: Gateway, box: str) -> None:
    editors = [name for name in ("vim", "vi", "nano") if gateway.sh(box, f"command -v {name} || true").strip()]
    if not editors:
        pytest.skip("no editor in the sandbox")
    tmux.console()
    if editors[0] == "nano":
        tmux.type("nano -I /root/note")
        wait_until(lambda: "GNU nano" in tmux.shown(), "nano is there")
        tmux.type("written in an editor", enter=False)
        tmux.key("C-o", "Enter", "C-x")
    else:
        tmux.type(f"{editors[0]} -u NONE -N /root/note")
        wait_until(lambda: tmux.shown().count("~\n") > 10, "vim is there")
        tmux.type("iwritten in an editor", enter=False)
        tmux.key("Escape")
        tmux.type(":wq")
    tmux.prompt("BOX>")
    tmux.type("clear; cat /root/note")
    tmux.until("written in an editor")


def test_a_paste(tmux: Tmux, tmp_path: Path) -> None:
    """100 KB in one go, with what would be an escape if it were typed."""
    lines = "".join(f"{number:06d} pasted text\n" for number in range(PASTED // 19)) + "~.\n~d\n"
    (tmp_path / "paste").write_text(lines)
    tmux.console()
    tmux.type("clear; printf '\\033[?2004h'; stty -echo; echo ready; cat > /root/pasted; stty echo")
    tmux.until("ready")
    tmux("load-buffer", str(tmp_path / "paste"))
    tmux("paste-buffer", "-p", "-r")
    tmux.key("Enter", "C-d")
    tmux.type("clear; grep -c 'pasted text' /root/pasted; tail -n 4 /root/pasted | cat -v")
    tmux.until(str(PASTED // 19))
    tmux.until("~d")


def test_detach_and_attach(tmux: Tmux) -> None:
    tmux.console()
    tmux.type("X=kept")
    tmux.key("Enter")
    tmux.type("~d", enter=False)
    tmux.until("sandbox: detached")
    tmux.type(f"clear; {BIN}/sandbox attach box")
    tmux.key("Enter")
    tmux.type("echo value=$X")
    tmux.until("value=kept")
    tmux.type("exit")
    tmux.prompt("LOCAL>")


def test_suspend(tmux: Tmux) -> None:
    tmux.console()
    tmux.key("Enter")
    tmux.type("~", enter=False)
    tmux.key("C-z")
    tmux.until("[1]+  Stopped")
    tmux.type("clear; fg")
    tmux.type("echo back=$((1 + 1))")
    tmux.until("back=2")


def test_the_shell_outlives_the_daemon(tmux: Tmux, gateway: Gateway) -> None:
    tmux.console()
    tmux.type("X=still; echo shell=$$")
    pid = next(line for line in tmux.until("shell=").splitlines() if line.startswith("shell="))
    for how in (signal.SIGKILL, signal.SIGTERM):
        daemon = gateway.daemon_pid
        os.kill(daemon, how)
        tmux.type(f"clear; echo $X here {int(how)}; echo shell=$$")
        tmux.until(f"still here {int(how)}")
        tmux.until(pid)
        assert gateway.daemon_pid != daemon
    tmux.type("exit 4")
    tmux.prompt("LOCAL>")  # what is typed before goes to the shell that is just ending
    tmux.type("echo code=$?")
    tmux.until("code=4")

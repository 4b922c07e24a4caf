"""Sandboxes that take all they can get, or kill their own frame: this machine and the other sandboxes live on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .conftest import Host

MIB = 1 << 20


def eventually(true: Callable[[], bool], what: str, deadline: float = 20.0) -> None:
    """Poll something that sends no event."""
    end = time.monotonic() + deadline
    while not true():
        assert time.monotonic() < end, f"not within {deadline:.0f} s: {what}"
        time.sleep(0.05)


def family(host: Host) -> int:
    """Processes of the host's runtime and of its sandboxes."""
    return len(psutil.Process(host.process.pid).children(recursive=True))


FORK_BOMB = """
import errno, os, signal
print("up", flush=True)
os.close(0), os.close(1), os.close(2)
while True:
    try:
        os.fork()
    except OSError:
        signal.pause()
"""


def test_a_fork_bomb_stays_inside_and_is_cleaned_up(host: Host, box: str, fresh: str) -> None:
    before = family(host)
    host.start(fresh)
    assert host.ask("launch", box=fresh, argv=["python3", "-S", "-c", FORK_BOMB])["line"] == "up\n"
    eventually(lambda: family(host) > before + 3000, "the bomb has gone off")
    assert family(host) < before + 4200
    assert host.sh(box, "echo alive") == "alive\n"
    host.ask("stop", box=fresh)
    assert family(host) <= before


def test_a_memory_bomb_ends_itself(host: Host, fresh: str) -> None:
    note = host.start(fresh, mem_bytes=96 * MIB)
    if "mem_bytes" in note:
        pytest.skip(f"no rootless limit here: {note}")
    done = host.run(fresh, "python3", "-S", "-c", "x = bytearray(512 << 20)")
    assert done["code"] == 137
    # what lies in /tmp counts, and may not take the memory that processes need to live
    script = "dd if=/dev/zero of=/tmp/big bs=1M count=200; dd if=/dev/zero of=/root/big bs=1M count=200"
    assert "No space left" in host.run(fresh, "/bin/sh", "-c", script)["err"]
    assert host.sh(fresh, "echo alive") == "alive\n"


def test_descriptors_and_threads_run_out_inside_only(host: Host, box: str, fresh: str) -> None:
    host.start(fresh)
    script = """
import json, os, resource, threading
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
pipes = []
try:
    while len(pipes) < 60_000:
        pipes.append(os.pipe())
except OSError as exc:
    number = exc.errno
print(json.dumps(len(pipes)))
"""
    assert json.loads(host.python(fresh, script)) > 100
    assert host.sh(box, "echo alive | cat") == "alive\n"


def test_a_killed_agent_ends_its_sandbox_only(host: Host, box: str, fresh: str) -> None:
    before = family(host)
    host.start(fresh)
    host.sh(fresh, "echo kept > /root/kept")
    assert host.ask("launch", box=fresh, argv=["sh", "-c", "echo up; sleep 1000 & sleep 1000"])["line"] == "up\n"
    assert host.ask("launch", box=fresh, argv=["sh", "-c", "echo up; sleep 0.2; pkill -9 -x gatewayd-agent"])["line"] == "up\n"
    assert host.ask("ended", box=fresh)["reason"]
    assert family(host) <= before
    assert host.sh(box, "echo alive") == "alive\n"
    host.start(fresh)
    assert host.sh(fresh, "cat /root/kept") == "kept\n"


@pytest.mark.parametrize("victim", ["1", "2"])
def test_a_killed_frame_ends_its_sandbox_only(host: Host, fresh: str, victim: str) -> None:
    before = family(host)
    host.start(fresh)
    host.ask("launch", box=fresh, argv=["sh", "-c", f"echo up; sleep 0.2; kill -9 {victim}; sleep 0.1; kill -9 2"])
    assert host.ask("ended", box=fresh)["reason"]
    assert family(host) <= before


def test_stopped_processes_are_ended_too(host: Host, fresh: str) -> None:
    before = family(host)
    host.start(fresh)
    script = "trap '' TERM HUP INT; echo up; kill -STOP $$"
    assert host.ask("launch", box=fresh, argv=["sh", "-c", script])["line"] == "up\n"
    host.ask(
        "launch", box=fresh, argv=["sh", "-c", "trap '' TERM; echo up; setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done'"]
    )
    host.ask("stop", box=fresh, grace=0.2)
    assert family(host) <= before


def test_a_full_disk_is_full_inside_only(host: Host, fresh: str) -> None:
    note = host.start(fresh, fs_capacity_bytes=32 * MIB)
    if "fs_capacity_bytes" in note:
        pytest.skip(note)
    free = os.statvfs(host.root).f_bavail * os.statvfs(host.root).f_frsize
    done = host.run(
        fresh, "sh", "-c", "for n in 1 2 3; do cat /dev/zero > /root/$n; done; i=0; while mkdir /root/d$i; do i=$((i+1)); done"
    )
    assert "No space left" in done["err"]
    image = Path(host.state, "boxes", fresh, "disk.img")
    assert image.stat().st_blocks * 512 <= 33 * MIB
    assert free - os.statvfs(host.root).f_bavail * os.statvfs(host.root).f_frsize < 512 * MIB  # others write here too
    host.sh(fresh, "rm -rf /root/*; echo room > /root/again")

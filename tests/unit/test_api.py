from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatewayd import api

frames = st.lists(st.tuples(st.sampled_from(list(api.FRAME_TYPES)), st.binary(max_size=300)), max_size=8)


@given(frames, st.integers(min_value=1, max_value=700))
def test_frames_survive_any_chunking(sent: list[tuple[int, bytes]], size: int) -> None:
    wire = b"".join(api.encode_frame(kind, payload) for kind, payload in sent)
    decoder = api.FrameDecoder()
    received = []
    for start in range(0, len(wire), size):
        received += decoder.feed(wire[start : start + size])
    assert received == sent
    assert decoder.pending == 0


@given(frames, st.binary(min_size=1, max_size=4))
def test_an_incomplete_frame_waits(sent: list[tuple[int, bytes]], tail: bytes) -> None:
    head = bytes((api.Frame.STDIN,)) + tail
    decoder = api.FrameDecoder()
    assert decoder.feed(b"".join(api.encode_frame(*frame) for frame in sent) + head[:4]) == sent
    assert decoder.pending == len(head[:4])


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_incomplete(data: bytes) -> None:
    decoder = api.FrameDecoder()
    try:
        found = decoder.feed(data)
    except api.FrameError:
        return
    assert sum(api.FRAME_HEADER + len(payload) for _, payload in found) + decoder.pending == len(data)


def test_bounds_of_frames() -> None:
    whole = api.encode_frame(api.Frame.STDOUT, bytes(api.FRAME_MAX))
    assert api.FrameDecoder().feed(whole) == [(api.Frame.STDOUT, bytes(api.FRAME_MAX))]
    with pytest.raises(api.FrameError, match="limit"):
        api.encode_frame(api.Frame.STDOUT, bytes(api.FRAME_MAX + 1))
    with pytest.raises(api.FrameError, match="unknown frame type 8"):
        api.encode_frame(8)
    with pytest.raises(api.FrameError, match="unknown frame type 9"):
        api.FrameDecoder().feed(b"\x09\0\0\0\0")
    with pytest.raises(api.FrameError, match="limit"):
        api.FrameDecoder().feed(b"\x00" + (api.FRAME_MAX + 1).to_bytes(4, "big"))


def test_lines() -> None:
    assert api.decode_line(api.encode_line({"op": "ssh", "é": "\n"})) == {"op": "ssh", "é": "\n"}
    assert api.encode_line({"a": "\n"}).count(b"\n") == 1
    with pytest.raises(ValueError, match="limit"):
        api.encode_line({"a": "x" * api.LINE_MAX})
    for wrong in (b"", b"nope", b"[1]", b"\xff", b"[" * 60000):
        with pytest.raises(ValueError):
            api.decode_line(wrong)


def test_every_kind_has_an_exit_code_and_a_status() -> None:
    kinds = {value for name, value in vars(api.ErrorKind).items() if name.isupper()}
    assert kinds == set(api.EXIT_CODES) == set(api.HTTP_STATUS)
    assert api.error_body("auth", "m", "h") == {"error": {"kind": "auth", "message": "m", "hint": "h"}}
    assert api.error_body("invented", "m")["error"]["kind"] == "internal"


def test_directories(tmp_path: Path) -> None:
    home = {"HOME": "/home/u"}
    assert api.state_dir(home) == "/home/u/.local/state/gatewayd"
    assert api.state_dir(home | {"XDG_STATE_HOME": "/s"}) == "/s/gatewayd"
    assert api.state_dir(home | {"XDG_STATE_HOME": "relative"}) == "/home/u/.local/state/gatewayd"
    assert api.state_dir(home | {"XDG_STATE_HOME": "/s", "GATEWAYD_STATE_DIR": "/own"}) == "/own"
    assert api.runtime_dir(home | {"XDG_RUNTIME_DIR": str(tmp_path)}) == f"{tmp_path}/gatewayd"
    assert api.runtime_dir({"GATEWAYD_RUNTIME_DIR": "/r", "XDG_RUNTIME_DIR": str(tmp_path)}) == "/r"
    gone = home | {"XDG_RUNTIME_DIR": str(tmp_path / "gone")}
    fallback = f"/run/user/{os.getuid()}/gatewayd"
    assert api.runtime_dir(gone) == (fallback if Path(fallback).parent.is_dir() else "/home/u/.local/state/gatewayd/run")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make another user's directory")
def test_a_runtime_directory_of_another_user_is_not_used(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    assert not api.runtime_dir({"HOME": "/h", "XDG_RUNTIME_DIR": str(tmp_path)}).startswith(str(tmp_path))


def test_what_a_caller_says() -> None:
    env = {"LANGSMITH_API_KEY": " k ", "LANGSMITH_ENDPOINT": "https://e", "LANGSMITH_WORKSPACE_ID": "w", "GATEWAYD_PROFILE": ""}
    whole = {"api_key": "k", "endpoint": "https://e", "workspace": "w"}
    assert api.caller_fields(environ=env) == whole
    assert api.caller_fields("env", env) == {"profile": "env"} | whole
    assert api.caller_fields("work", env) == {"profile": "work"}  # the key belongs to another service
    assert api.caller_fields(environ=env | {"GATEWAYD_PROFILE": "local"}) == {"profile": "local"}
    assert api.caller_fields(environ={"LANGSMITH_ENDPOINT": "https://e"}) == {}
    assert api.caller_headers(environ=env) == {
        "X-Gatewayd-Api-Key": "k",
        "X-Gatewayd-Endpoint": "https://e",
        "X-Gatewayd-Workspace": "w",
    }


def test_it_imports_next_to_nothing() -> None:
    program = "import sys; before = set(sys.modules); import gatewayd.api; print(*sorted(set(sys.modules) - before))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "gatewayd.api" in loaded
    assert loaded.isdisjoint({"json", "typing", "dataclasses", "enum", "pathlib", "socket", "re", "collections"})


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())
    assert project["project"]["version"] == api.VERSION

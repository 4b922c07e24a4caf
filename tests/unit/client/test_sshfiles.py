"""~/.ssh as a whole: where the blocks stand, what is left alone, what a change that failed leaves, and the way back."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from client import atomic, sshtext
from client.proxy import Failure
from client.sshblocks import Gateway
from client.sshconfig import Change, SshConfig
from client.sshorigin import Origin

from .test_sshconfig import asked, contents, entry, tree
from .test_sshgateway import GATEWAY_KEY, HELPER, all_of, put

NOBODY = 65534  # user id
MARKS = "# begin gatewayd\n", "# end gatewayd\n"


def test_inline_and_back(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.ssh.mkdir()
    files.main.write_bytes(b"User me\r\nMatch all\r\n  Port 1")
    put(files, "web")
    assert files.main.read_bytes().startswith(b"Include ~/.ssh/gatewayd/config\nUser me\r\n")
    put(files, "web", inline=True)
    text = files.main.read_bytes()
    assert text.startswith(b"# begin gatewayd\n")
    assert b"Include" not in text
    assert text.endswith(b"# end sandbox-*\nHost *\n# end gatewayd\nUser me\r\nMatch all\r\n  Port 1")
    assert put(files, "web") == []  # it stays in the manner that is there
    files.relist(lambda gateway: gateway.with_name("local", "new", HELPER))
    assert b"\nHost sandbox-new\n" in files.main.read_bytes()
    put(files, "web", inline=False)
    assert files.main.read_bytes() == b"Include ~/.ssh/gatewayd/config\nUser me\r\nMatch all\r\n  Port 1"
    put(files, "web", inline=True)
    files.remove_all()
    assert tree(tmp_path) == {".ssh/config": (files.main.stat().st_mode & 0o777, b"User me\r\nMatch all\r\n  Port 1")}


def test_inline_goes_where_an_include_cannot(tmp_path: Path) -> None:
    home = tmp_path / "per%cent*"
    home.mkdir()
    files = SshConfig(home, tilde=False)
    put(files, "web", inline=True)
    assert put(files, "web") == []
    if shutil.which("ssh"):
        assert asked(files, "sandbox-web")["userknownhostsfile"] == str(files.known_hosts)
    files.remove_all()
    assert not files.ssh.exists()


def test_the_copy_is_replaced_where_it_stands(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    put(files, "web", inline=True)
    files.main.write_text("# mine\nUser me\n" + files.main.read_text() + "Host x\n")
    put(files, "web", "db")
    text = files.main.read_text()
    assert text.startswith("# mine\nUser me\n# begin gatewayd\n")
    assert text.endswith("# end gatewayd\nHost x\n")
    files.remove_all()
    assert files.main.read_text() == "# mine\nUser me\nHost x\n"


@pytest.mark.parametrize("section", ["Match host y\n", "Host x\n  User me\n", 'match="all"\n', "\tHOST\tx\r\n"])
def test_a_section_before_the_copy_is_not_guessed_at(tmp_path: Path, section: str) -> None:
    """Our block would be part of what that section decides about; removing it is refused as well."""
    files = SshConfig(tmp_path)
    put(files, "web", inline=True)
    files.main.write_text(section + files.main.read_text())
    before = tree(tmp_path)
    changes: list[Callable[[], list[Change]]] = [
        lambda: put(files, "web", "db"),
        lambda: put(files, "web", inline=False),
        files.remove_all,
    ]
    for change in changes:
        with pytest.raises(Failure, match="stands before '# begin gatewayd'") as caught:
            change()
        assert caught.value.hint
    assert tree(tmp_path) == before


@pytest.mark.parametrize("damage", ["no end", "no begin", "two", "another begins inside", "another ends inside"])
@pytest.mark.parametrize("where", ["main", "own"])
def test_damaged_marks_are_not_guessed_at(tmp_path: Path, damage: str, where: str) -> None:
    files = SshConfig(tmp_path)
    put(files, "web", inline=True)
    path = files.main if where == "main" else files.config
    begin, end = MARKS if where == "main" else ("# begin sandbox-*\n", "# end sandbox-*\n")
    text = path.read_text()
    path.write_text(
        {
            "no end": text.replace(end, ""),
            "no begin": text.replace(begin, ""),
            "two": text + text,
            "another begins inside": text.replace("    User sandbox\n", "# begin sandbox-x\n"),
            "another ends inside": text.replace("    User sandbox\n", "# end sandbox-x\n"),
        }[damage]
    )
    before = tree(tmp_path)
    changes: list[Callable[[], list[Change]]] = [
        lambda: put(files, "web", "db"),
        lambda: files.remove("web"),
        lambda: files.add(entry()),
        files.remove_all,
    ]
    for change in changes:
        with pytest.raises(Failure, match=f"cannot use {path}") as caught:
            change()
        assert caught.value.kind == "config"
        assert caught.value.hint
    assert tree(tmp_path) == before


@pytest.mark.parametrize("line", ["Host mine\n", "Match all\n", "Host sandbox-a sandbox-b\n", "host sandbox-a\n"])
def test_a_section_of_the_user_s_inside_the_block_is_not_swallowed(tmp_path: Path, line: str) -> None:
    files = SshConfig(tmp_path)
    put(files, "web")
    files.config.write_text(files.config.read_text().replace("# end sandbox-*", f"{line}# end sandbox-*"))
    before = tree(tmp_path)
    with pytest.raises(Failure, match="is not one of `sandbox ssh-setup`"):
        put(files, "web", "db")
    assert tree(tmp_path) == before


def test_an_editor_that_changes_line_ends(tmp_path: Path) -> None:
    """Everything to CRLF: ssh does not mind, and neither do we."""
    files = SshConfig(tmp_path, tilde=False)
    files.add(entry("own"))
    put(files, "web")
    for path in (files.main, files.config):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    put(files, "web", "db")
    text = files.config.read_text()
    assert text.count("# begin sandbox-*") == text.count("# begin sandbox-own") == 1
    assert files.main.read_bytes().count(b"Include") == 1
    assert (files.gateway() or Gateway(b"")).listed.keys() == {"db", "web"}
    if shutil.which("ssh"):
        assert asked(files, "sandbox-db")["user"] == "sandbox"
    files.remove_all()
    assert not files.ssh.exists()


# --- what can go wrong on the way ------------------------------------------------------------------------


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    changes = files.set_gateway(all_of(files, "web"), GATEWAY_KEY, dry=True)
    assert [change.path for change in changes] == [files.known_hosts, files.config, files.main]
    assert not files.ssh.exists()
    assert put(files, "web") == changes
    before = tree(tmp_path)
    changes = files.remove_all(dry=True)
    assert [change.after for change in changes] == [None, None, None]
    assert tree(tmp_path) == before
    assert files.remove_all() == changes


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("step", range(1, 7))
def test_interrupted_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, inline: bool) -> None:
    """Every file is the old one or the new one, whichever write a Ctrl-C hits, and the same command once more completes it."""
    files = SshConfig(tmp_path)
    files.ssh.mkdir()
    files.main.write_bytes(b"Host x\n")
    before = tree(tmp_path)
    count, real = 0, os.fsync

    def interrupted(fd: int) -> None:
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        real(fd)

    monkeypatch.setattr(os, "fsync", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        put(files, "web", inline=inline)
    assert count >= step, "there are fewer writes than steps"
    monkeypatch.setattr(os, "fsync", real)
    left = tree(tmp_path)
    put(files, "web", inline=inline)
    after = tree(tmp_path)
    for path, (mode, content) in left.items():
        assert (mode, content) in (before.get(path), after.get(path)), path
    files.remove_all()
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="a full file system of our own needs root")
def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file systems can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        files = SshConfig(disk)
        files.ssh.mkdir()
        files.main.write_bytes(b"Host x\n")
        put(files, "web")
        before = tree(disk)
        with (disk / "rest").open("wb", buffering=0) as rest, contextlib.suppress(OSError):
            while rest.write(b"x" * 512):
                pass
        with pytest.raises(Failure, match="No space left") as caught:
            put(files, *(f"sandbox{number}" for number in range(500)))
        assert caught.value.kind == "config"
        assert tree(disk) == before
        (disk / "rest").unlink()
        files.remove_all()
        assert tree(disk) == {".ssh/config": (files.main.stat().st_mode & 0o777, b"Host x\n")}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_something_else_in_our_place(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.ssh.mkdir()
    files.own.write_text("mine")
    with pytest.raises(Failure, match=f"cannot (read|change) {files.own}"):
        put(files, "web")
    assert tree(tmp_path).keys() == {".ssh/gatewayd"}


@pytest.fixture
def as_user() -> Iterator[Path]:
    """A home directory of a user for whom permissions count, who we are meanwhile."""
    with tempfile.TemporaryDirectory(prefix="gw-") as directory:
        home, root = Path(directory), os.geteuid() == 0
        if root:
            os.chown(home, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield home
        finally:
            if root:
                os.seteuid(0)


def test_a_directory_that_cannot_be_written(as_user: Path) -> None:
    files = SshConfig(as_user)
    files.ssh.mkdir()
    files.main.write_bytes(b"Host x\n")
    files.ssh.chmod(0o500)
    with pytest.raises(Failure, match=r"cannot change .*Permission denied"):
        put(files, "web")
    assert list(files.ssh.iterdir()) == [files.main]
    files.ssh.chmod(0o700)
    put(files, "web")
    files.main.chmod(0)
    before = files.config.read_bytes()
    with pytest.raises(Failure, match=r"cannot read .*Permission denied"):
        put(files, "web", "db")
    files.main.chmod(0o400)  # it can be replaced, and stays as it was otherwise
    files.remove_all()
    assert (files.main.read_bytes(), files.main.stat().st_mode & 0o777) == (b"Host x\n", 0o400)
    assert before.count(b"Host sandbox-web\n") == 1


def test_a_second_writer_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SshConfig(tmp_path)
    put(files, "web")
    real = atomic.locked
    with real(files.ssh):
        monkeypatch.setattr(atomic, "locked", lambda path: real(path, deadline=0.05))
        with pytest.raises(Failure, match="locked by another program"):
            put(files, "web", "db")


names = st.sampled_from(["demo", "demo-2", "all", "b"])
steps = st.lists(
    st.tuples(st.sampled_from(["all", "only", "direct", "remove", "list"]), names, st.sampled_from([None, None, False, True])),
    max_size=10,
)


@settings(max_examples=150, deadline=None)
@given(contents, st.sampled_from([0o600, 0o644]), steps, st.booleans())
@example(b"Include ~/.ssh/gatewayd/config", 0o600, [("only", "demo", True), ("remove", "demo", None)], True)
@example(None, 0o600, [("direct", "demo", True), ("all", "demo", False)], False)
def test_setting_up_and_removing_is_exact(
    content: bytes | None, mode: int, changes: list[tuple[str, str, bool | None]], tilde: bool
) -> None:
    """After any sequence of changes, and the removal of everything, everything is as it was."""
    with contextlib.ExitStack() as stack:
        monkey = stack.enter_context(pytest.MonkeyPatch.context())
        monkey.setattr(os, "fsync", lambda fd: None)  # nothing here survives a crash anyway
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = SshConfig(home, tilde=tilde)
        if content is not None:
            files.ssh.mkdir(mode=0o700)
            files.main.write_bytes(content)
            files.main.chmod(mode)
        before = tree(home) if files.ssh.exists() else None
        for change, name, inline in changes:
            if change == "all":
                put(files, "demo", name, inline=inline)
            elif change == "only":
                put(files, "demo", only=name, inline=inline)
                assert not files.has(name)
            elif change == "direct":
                files.add(entry(name), inline=inline)
                assert files.has(name)
            elif change == "remove":
                files.remove(name)
            else:
                files.relist(lambda gateway, name=name: gateway.with_name("work", name, HELPER))  # type: ignore[misc]  # bound at once
            if files.config.exists():
                main, text = files.main.read_bytes(), files.config.read_bytes()
                assert content is None or main.endswith(content)
                assert (files.main.stat().st_mode & 0o777) == (0o600 if content is None else mode)
                copies, linked = main.count(b"# begin gatewayd\n"), sshtext.includes(main, files.include)
                assert copies + linked == 1 or (copies == 1 and Origin.PRESENT.encode() in text)
                gateway = files.gateway()
                assert gateway is None or not set(gateway.listed) & set(files.direct())
            else:
                assert (tree(home) if files.ssh.exists() else None) == before
        files.remove_all()
        assert (tree(home) if files.ssh.exists() else None) == before

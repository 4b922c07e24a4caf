"""What ssh-setup writes below ~/.ssh: read by the real ssh, and undone to the byte."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from client import atomic
from client.proxy import Failure
from client.sshblocks import Entry
from client.sshconfig import SshConfig
from client.sshorigin import Origin

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExampleExampleExampleExampleExampleExampleExam"
needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="OpenSSH is not installed")


def entry(name: str = "demo", **changes: object) -> Entry:
    proxy = ["/usr/bin/python3", "-I", "-S", "/opt/gatewayd/client/proxy.py", "--profile", "local", name]
    return Entry(**{"name": name, "user": "root", "host_keys": [KEY], "proxy": proxy, **changes})  # type: ignore[arg-type]  # a test's shorthand


def block(files: SshConfig, name: str, **changes: object) -> str:
    return entry(name, **changes).render(files.known_hosts).decode()


def tree(home: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below ~/.ssh with its mode and content."""
    return {
        str(path.relative_to(home)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes() if path.is_file() else b"")
        for path in sorted((home / ".ssh").rglob("*"))
    }


def asked(files: SshConfig, host: str) -> dict[str, str]:
    """What the real ssh makes of the configuration for `host`."""
    done = subprocess.run(["ssh", "-G", "-F", str(files.main), host], capture_output=True, text=True, check=True)
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def test_the_files(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.add(entry(identity=Path("/home/me/.ssh/id_ed25519"), authorized=["ssh-ed25519 AAAA me"], profile="local"))
    assert files.main.read_text() == "Include ~/.ssh/gatewayd/config\n"
    assert files.config.read_text() == (
        "# Written by `sandbox ssh-setup`: what stands between two marks is replaced as a whole.\n"
        "# ssh-config: made with ~/.ssh\n"
        "# begin sandbox-demo\n"
        "# profile: local\n"
        "# authorized: ssh-ed25519 AAAA me\n"
        "Host sandbox-demo\n"
        "    User root\n"
        "    HostKeyAlias sandbox-demo\n"
        f"    UserKnownHostsFile {tmp_path}/.ssh/gatewayd/known_hosts\n"
        "    StrictHostKeyChecking yes\n"
        "    CheckHostIP no\n"
        "    IdentityFile /home/me/.ssh/id_ed25519\n"
        "    IdentitiesOnly yes\n"
        "    ProxyCommand /usr/bin/python3 -I -S /opt/gatewayd/client/proxy.py --profile local demo\n"
        "    ProxyUseFdpass yes\n"
        "# end sandbox-demo\n"
    )
    assert files.known_hosts.read_text() == f"sandbox-demo {KEY}\n"
    assert files.authorized("demo") == ["ssh-ed25519 AAAA me"]
    assert files.profile("demo") == "local"
    assert files.authorized("other") == []
    modes = {path: mode for path, (mode, _) in tree(tmp_path).items()}
    assert modes == {
        ".ssh/config": 0o600,
        ".ssh/gatewayd": 0o700,
        ".ssh/gatewayd/config": 0o600,
        ".ssh/gatewayd/known_hosts": 0o600,
    }
    assert stat.S_IMODE(files.ssh.stat().st_mode) == 0o700
    assert files.remove("demo")
    assert not files.ssh.exists()


@needs_ssh
def test_ssh_understands_it(tmp_path: Path) -> None:
    files = SshConfig(tmp_path, tilde=False)
    files.ssh.mkdir()
    files.main.write_text("Host *\n  User nobody\n  ProxyJump bastion\n  ControlMaster auto\n  StrictHostKeyChecking no\n")
    files.add(entry(identity=tmp_path / "id_ed25519"))
    files.add(entry("other"))
    seen = asked(files, "sandbox-demo")
    assert seen["user"] == "root"
    assert seen["hostkeyalias"] == "sandbox-demo"
    assert seen["userknownhostsfile"] == str(files.known_hosts)
    assert seen["stricthostkeychecking"] == "true"
    assert seen["checkhostip"] == "no"
    assert seen["identityfile"] == str(tmp_path / "id_ed25519")
    assert seen["identitiesonly"] == "yes"
    assert seen["proxyusefdpass"] == "yes"
    assert seen["proxycommand"].endswith("/proxy.py --profile local demo")
    assert seen["forwardagent"] == "no"
    assert asked(files, "sandbox-other")["identitiesonly"] == "no"
    elsewhere = asked(files, "example.com")
    assert elsewhere["user"] == "nobody"
    assert "proxycommand" not in elsewhere


@needs_ssh
@pytest.mark.parametrize(
    "directory",
    ["with space", "it's", "per%cent", "100%h", "#hash", "$HOME", "a=b", "q?*[x]", "ünï", "back`tick", "semi;colon", "tab(le)"],
)
def test_awkward_paths(tmp_path: Path, directory: str) -> None:
    """The real ssh runs the helper from there, through the user's shell, with its arguments whole."""
    home = tmp_path / directory
    home.mkdir()
    helper = home / "helper"
    helper.write_text('#!/bin/sh\nprintf "%s|" "$0" "$@" > "$(dirname "$0")/ran"\n')
    helper.chmod(0o755)
    files = SshConfig(home, tilde=False)
    if any(c in directory for c in "%?*["):  # an Include cannot name these; blocks and paths in them can
        with pytest.raises(Failure, match="in an ssh configuration"):
            files.add(entry())
        assert not files.ssh.exists()
        main = home / "config"
        main.write_bytes(entry(proxy=[str(helper), "a b", "demo"]).render(files.known_hosts))
    else:
        files.add(entry(proxy=[str(helper), "a b", "demo"]))
        main = files.main
    done = subprocess.run(["ssh", "-F", str(main), "-o", "ProxyUseFdpass=no", "sandbox-demo"], capture_output=True, check=False)
    assert done.returncode == 255
    assert (home / "ran").read_text() == f"{helper}|a b|demo|", done.stderr
    seen = subprocess.run(["ssh", "-G", "-F", str(main), "sandbox-demo"], capture_output=True, text=True, check=True).stdout
    assert f"userknownhostsfile {files.known_hosts}\n" in seen


@pytest.mark.parametrize("path", ['quo"te', "new\nline", "back\\slash", "${HOME}"])
def test_paths_that_ssh_cannot_express(tmp_path: Path, path: str) -> None:
    files = SshConfig(tmp_path / path, tilde=False)
    with pytest.raises(Failure, match="in an ssh configuration"):
        files.add(entry())
    assert not files.ssh.exists()


def test_twice_changes_nothing(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.add(entry())
    files.add(entry("other"))
    before = {path: (tmp_path / path).stat().st_ino for path in tree(tmp_path)}
    files.add(entry())
    assert {path: (tmp_path / path).stat().st_ino for path in tree(tmp_path)} == before


def test_a_block_is_replaced_where_it_stands(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    for name in ("a", "b", "c"):
        files.add(entry(name))
    text = files.config.read_text().replace("# end sandbox-a\n", "# end sandbox-a\n# a line of mine\n")
    files.config.write_text(text)
    files.add(entry("b", user="me", host_keys=[KEY + "2", KEY + "3"]))
    changed = files.config.read_text()
    assert changed == text.replace(block(files, "b"), block(files, "b", user="me"))
    assert files.known_hosts.read_text() == (f"sandbox-a {KEY}\nsandbox-b {KEY}2\nsandbox-b {KEY}3\nsandbox-c {KEY}\n")


def test_a_name_that_is_the_beginning_of_another(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.add(entry("demo-2"))
    files.add(entry("demo"))
    files.remove("demo")
    assert "sandbox-demo-2" in files.config.read_text()
    assert files.known_hosts.read_text() == f"sandbox-demo-2 {KEY}\n"


def test_a_block_without_an_end_is_not_guessed_at(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.add(entry())
    files.config.write_text(files.config.read_text().replace("# end sandbox-demo\n", ""))
    before = tree(tmp_path)
    changes: list[Callable[[], object]] = [lambda: files.add(entry()), lambda: files.remove("demo")]
    for change in changes:
        with pytest.raises(Failure, match="has no '# end sandbox-demo' after it"):
            change()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", [b"\xff\xfe", b"Host x\n\0", b"caf\xe9"])
def test_a_configuration_that_is_no_text_is_left_alone(tmp_path: Path, content: bytes) -> None:
    files = SshConfig(tmp_path)
    files.ssh.mkdir()
    files.main.write_bytes(content)
    with pytest.raises(Failure, match="text") as caught:
        files.add(entry())
    assert caught.value.kind == "config"
    assert tree(tmp_path) == {".ssh/config": (files.main.stat().st_mode & 0o777, content)}


def test_a_configuration_that_is_a_directory(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.main.mkdir(parents=True)
    with pytest.raises(Failure, match="not a file"):
        files.add(entry())


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.ssh.mkdir()
    dotfiles = tmp_path / "dotfiles"
    dotfiles.mkdir()
    target = dotfiles / "ssh_config"
    target.write_text("Host x\n")
    target.chmod(0o644)
    files.main.symlink_to("../dotfiles/ssh_config")
    files.add(entry())
    assert files.main.readlink() == Path("../dotfiles/ssh_config")
    assert target.read_text() == "Include ~/.ssh/gatewayd/config\nHost x\n"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    files.remove("demo")
    assert files.main.is_symlink()
    assert target.read_text() == "Host x\n"
    assert list(dotfiles.iterdir()) == [target]


def test_a_link_to_nothing(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.ssh.mkdir()
    files.main.symlink_to("elsewhere")
    files.add(entry())
    assert (files.ssh / "elsewhere").read_text() == "Include ~/.ssh/gatewayd/config\n"
    files.remove("demo")
    assert files.main.is_symlink()
    assert not (files.ssh / "elsewhere").exists()


def test_a_line_that_was_there_already_stays(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.ssh.mkdir()
    files.main.write_text("# mine\n  Include ~/.ssh/gatewayd/config\nHost x\n")
    before = tree(tmp_path)
    files.add(entry())
    assert tree(tmp_path)[".ssh/config"] == before[".ssh/config"]
    assert Origin.PRESENT in files.config.read_text()
    files.remove("demo")
    assert tree(tmp_path) == before


def test_a_line_inside_a_host_block_does_not_count(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.ssh.mkdir()
    files.main.write_text("Host x\n  Include ~/.ssh/gatewayd/config\n")
    files.add(entry())
    assert files.main.read_text().startswith("Include ~/.ssh/gatewayd/config\nHost x\n")
    files.remove("demo")
    assert files.main.read_text() == "Host x\n  Include ~/.ssh/gatewayd/config\n"


def test_a_line_that_was_taken_out_comes_back(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.add(entry())
    files.main.write_text("Host x\n")
    files.add(entry())
    assert files.main.read_text() == "Include ~/.ssh/gatewayd/config\nHost x\n"
    files.remove("demo")
    assert files.main.read_text() == "Host x\n"


def test_what_the_user_adds_in_between_stays(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.add(entry())
    files.main.write_text(files.main.read_text() + "Host mine\n")
    (files.own / "notes").write_text("mine")
    files.remove("demo")
    assert files.main.read_text() == "Host mine\n"
    assert [path.name for path in files.own.iterdir()] == ["notes"]


def test_removing_what_is_not_there(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    assert not files.remove("demo")
    assert not files.ssh.exists()
    files.add(entry())
    before = tree(tmp_path)
    assert not files.remove("other")
    assert tree(tmp_path) == before


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = SshConfig(tmp_path)
    files.ssh.mkdir()
    files.main.write_text("Host x\n")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failure, match="No space left"):
        files.add(entry())
    assert files.main.read_text() == "Host x\n"
    assert [path.name for path in files.own.iterdir()] == []


def test_writers_take_turns(tmp_path: Path) -> None:
    with atomic.locked(tmp_path), pytest.raises(TimeoutError), atomic.locked(tmp_path, deadline=0.05):
        pass
    with atomic.locked(tmp_path, deadline=0.05):
        pass


# Configurations as people have them, and as nobody has them.
lines = st.sampled_from(
    [
        "Host *\n",
        "Host sandbox-demo\n",
        "  User me\n",
        "# begin sandbox-demo\n",
        "# a comment\r\n",
        "Include ~/.ssh/gatewayd/config\n",
        "Include ~/.ssh/gatewayd/config",
        "include other\n",
        "Match all\n",
        "match=all\n",
        "\n",
        "\r",
        " ",
        "Host=x",
    ]
)
contents = (
    st.none()
    | st.lists(lines, max_size=6).map(lambda parts: "".join(parts).encode())
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40).map(str.encode)
)
names = st.sampled_from(["demo", "demo-2", "a", "b"])
steps = st.lists(st.tuples(st.sampled_from(["add", "remove"]), names), max_size=12)


@settings(max_examples=150, deadline=None)
@given(contents, st.sampled_from([0o600, 0o644]), steps, st.booleans())
@example(b"Include ~/.ssh/gatewayd/config", 0o600, [("add", "demo")], True)
@example(b"", 0o644, [("add", "demo")], True)
@example(None, 0o600, [("add", "demo"), ("add", "a"), ("remove", "demo")], True)
def test_adding_and_removing_is_exact(content: bytes | None, mode: int, changes: list[tuple[str, str]], tilde: bool) -> None:
    """After any sequence of changes that leaves nothing set up, everything is as it was."""
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
        present: dict[str, bytes] = {}
        for change, name in changes:
            if change == "add":
                files.add(entry(name))
                present[name] = entry(name).render(files.known_hosts)
            else:
                assert bool(files.remove(name)) == (name in present)
                present.pop(name, None)
            if present:
                text = files.config.read_bytes()
                assert all(text.count(block) == 1 for block in present.values())
                main = files.main.read_bytes()
                assert content is None or main.endswith(content)
                assert (files.main.stat().st_mode & 0o777) == (0o600 if content is None else mode)
        for name in list(present):
            files.remove(name)
        assert (tree(home) if files.ssh.exists() else None) == before

"""The block for all sandboxes, and what the real ssh makes of it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import asyncssh
import pytest

from client.sshblocks import LISTED_MAX, Gateway, gateway_options
from client.sshconfig import Change, SshConfig

from .test_sshconfig import KEY, asked, entry, needs_ssh, tree

HELPER = ["/usr/bin/python3", "-I", "-S", "/opt/gatewayd/client/proxy.py"]
GATEWAY_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGatewayGatewayGatewayGatewayGatewayGatewayGatew"


def all_of(files: SshConfig, *names: str, profile: str = "local", only: str = "") -> Callable[[Gateway | None], Gateway]:
    """What ssh-setup does with these sandboxes there; `only`: as for that name alone."""

    def edit(old: Gateway | None) -> Gateway:
        options = gateway_options(profile, HELPER, files.known_hosts)
        new = Gateway(options, profile, frozenset()) if old is None else replace(old.moved(profile, HELPER), options=options)
        new = new.with_names(profile, names, HELPER)
        if not only:
            return replace(new, asked=None)
        return replace(new, asked=None if new.asked is None else new.asked | {only}).with_name(profile, only, HELPER)

    return edit


def put(files: SshConfig, *names: str, profile: str = "local", only: str = "", inline: bool | None = None) -> list[Change]:
    return files.set_gateway(all_of(files, *names, profile=profile, only=only), GATEWAY_KEY, name=only or None, inline=inline)


def test_the_files(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    put(files, "web", "db")
    assert files.main.read_text() == "Include ~/.ssh/gatewayd/config\n"
    assert files.config.read_text() == (
        "# Written by `sandbox ssh-setup`: what stands between two marks is replaced as a whole.\n"
        "# ssh-config: made with ~/.ssh\n"
        "# begin sandbox-*\n"
        "# profile: local\n"
        "# for: *\n"
        "Host sandbox-db\n"
        "Host sandbox-web\n"
        "Host sandbox-*\n"
        "    User sandbox\n"
        f"    UserKnownHostsFile {tmp_path}/.ssh/gatewayd/known_hosts\n"
        "    StrictHostKeyChecking yes\n"
        "    CheckHostIP no\n"
        "    GlobalKnownHostsFile /dev/null\n"
        "    UpdateHostKeys no\n"
        "    VerifyHostKeyDNS no\n"
        "    CanonicalizeHostname no\n"
        "    PreferredAuthentications none\n"
        "    ProxyCommand /usr/bin/python3 -I -S /opt/gatewayd/client/proxy.py --profile local '%h'\n"
        "    ProxyUseFdpass yes\n"
        "# end sandbox-*\n"
    )
    assert files.known_hosts.read_text() == f"sandbox-* {GATEWAY_KEY}\n"
    assert {path: mode for path, (mode, _) in tree(tmp_path).items()} == {
        ".ssh/config": 0o600,
        ".ssh/gatewayd": 0o700,
        ".ssh/gatewayd/config": 0o600,
        ".ssh/gatewayd/known_hosts": 0o600,
    }
    before = {path: (tmp_path / path).stat().st_ino for path in tree(tmp_path)}
    assert put(files, "db", "web") == []
    assert {path: (tmp_path / path).stat().st_ino for path in tree(tmp_path)} == before
    assert files.remove_all()
    assert not files.ssh.exists()


@needs_ssh
@pytest.mark.parametrize("inline", [False, True])
def test_ssh_understands_it(tmp_path: Path, inline: bool) -> None:
    files = SshConfig(tmp_path, tilde=False)
    files.ssh.mkdir()
    files.main.write_text(
        "CheckHostIP yes\nCanonicalizeHostname always\n"
        "Match host sandbox-* user nobody\n  Port 2200\n"
        "Host *\n  User nobody\n  ProxyJump bastion\n  StrictHostKeyChecking no\n  ControlMaster auto\n  ForwardAgent yes\n"
        "  VerifyHostKeyDNS yes\n  UpdateHostKeys yes\n  PreferredAuthentications publickey\n"
    )
    plain = asked(files, "example.com")
    put(files, "web", inline=inline)
    for host in ("sandbox-web", "sandbox-never-heard-of"):
        seen = asked(files, host)
        assert seen["user"] == "sandbox"
        assert seen["hostname"] == host
        assert seen["proxycommand"].endswith("/proxy.py --profile local '%h'")
        assert seen["proxyusefdpass"] == "yes"
        assert seen["userknownhostsfile"] == str(files.known_hosts)
        assert seen["globalknownhostsfile"] == "/dev/null"
        assert seen["stricthostkeychecking"] == "true"
        assert seen["checkhostip"] == "no"
        assert seen["verifyhostkeydns"] == "false"
        assert seen["updatehostkeys"] == "false"
        assert seen["canonicalizehostname"] == "false"
        assert seen["preferredauthentications"] == "none"
        assert seen["port"] == "22"
        assert (seen["controlmaster"], seen["forwardagent"]) == ("auto", "yes")  # the user's own wishes stay
    assert asked(files, "example.com") == plain
    other = "sandboxes.example.com"
    assert asked(files, other) == {**plain, "host": other, "hostname": other}


def test_another_program_reads_the_same(tmp_path: Path) -> None:
    """One with a parser of its own, which knows fewer tokens than ssh."""
    files = SshConfig(tmp_path, tilde=False)
    put(files, "web")
    files.add(entry("own"))
    put(files, profile="work")
    for host, user, words in (
        ("sandbox-web", "sandbox", [*HELPER, "--profile", "local", "sandbox-web"]),
        ("sandbox-new", "sandbox", [*HELPER, "--profile", "work", "sandbox-new"]),
        ("sandbox-own", "root", [*HELPER, "--profile", "local", "own"]),
    ):
        options = asyncssh.SSHClientConnectionOptions(config=str(files.main), host=host)
        assert (options.username, list(options.proxy_command or ())) == (user, words)


@needs_ssh
def test_a_direct_one_takes_nothing_from_the_block_for_all(tmp_path: Path) -> None:
    files = SshConfig(tmp_path, tilde=False)
    files.add(entry("own"))
    alone = asked(files, "sandbox-own")
    put(files, "own", "web")
    assert asked(files, "sandbox-own") == alone
    assert "Host sandbox-web\nHost sandbox-* !sandbox-own\n" in files.config.read_text()
    assert files.known_hosts.read_text() == f"sandbox-own {KEY}\nsandbox-*,!sandbox-own {GATEWAY_KEY}\n"
    assert [found("sandbox-own", files), found("sandbox-web", files)] == [[KEY.split()[1]], [GATEWAY_KEY.split()[1]]]
    files.add(entry("web"))  # the other order: it comes before the block for all
    text = files.config.read_text()
    assert text.index("# begin sandbox-web") < text.index("# begin sandbox-*")
    assert "\nHost sandbox-* !sandbox-own !sandbox-web\n" in text
    assert text.count("Host sandbox-web\n") == 1
    assert asked(files, "sandbox-web")["user"] == "root"
    files.remove("web")
    assert asked(files, "sandbox-web")["user"] == "sandbox"
    assert found("sandbox-web", files) == [GATEWAY_KEY.split()[1]]


def found(host: str, files: SshConfig) -> list[str]:
    """The keys that ssh accepts for `host`, as ssh-keygen finds them."""
    done = subprocess.run(["ssh-keygen", "-F", host, "-f", str(files.known_hosts)], capture_output=True, text=True, check=False)
    return [line.split()[2] for line in done.stdout.splitlines() if not line.startswith("#")]


def test_asked_for_again_without_direct(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    files.add(entry("web"))
    put(files, "web", only="web")
    assert files.direct() == []
    assert files.known_hosts.read_text() == f"sandbox-* {GATEWAY_KEY}\n"
    files.add(entry("web"))  # and back: nobody has asked for another one
    assert files.gateway() is None
    assert files.known_hosts.read_text() == f"sandbox-web {KEY}\n"


@needs_ssh
def test_a_sandbox_of_another_profile(tmp_path: Path) -> None:
    files = SshConfig(tmp_path, tilde=False)
    put(files, "web", "both")
    put(files, "cloud", "both", profile="work")  # as the profile of all others from now on; what was found stays reachable
    for name, profile in (("web", "local"), ("cloud", "work"), ("both", "work"), ("new", "work")):
        assert asked(files, f"sandbox-{name}")["proxycommand"].endswith(f"/proxy.py --profile {profile} '%h'")
    assert asked(files, "sandbox-web")["userknownhostsfile"] == str(files.known_hosts)
    before = files.config.read_bytes()
    assert put(files, "cloud", "both", profile="work") == []
    assert files.config.read_bytes() == before
    put(files, profile="work")
    assert list((files.gateway() or Gateway(b"")).listed) == ["web"]
    put(files, profile="local")
    assert (files.gateway() or Gateway(b"x")).listed == {}


def test_names_come_and_go(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    assert files.relist(lambda gateway: gateway.with_name("local", "web", HELPER)) == []
    assert not files.ssh.exists()
    put(files, "db")
    assert len(files.relist(lambda gateway: gateway.with_name("local", "web", HELPER))) == 1
    assert sorted((files.gateway() or Gateway(b"")).listed) == ["db", "web"]
    files.relist(lambda gateway: gateway.without_names(["web"], "work"))  # another one of that name
    files.relist(lambda gateway: gateway.without_names(["db"], "local"))
    assert sorted((files.gateway() or Gateway(b"")).listed) == ["web"]
    many = [f"n{number}" for number in range(LISTED_MAX + 5)]
    put(files, *many)
    files.relist(lambda gateway: gateway.with_name("local", "web", HELPER))
    listed = (files.gateway() or Gateway(b"")).listed
    assert len(listed) == LISTED_MAX
    assert "web" in listed


def test_for_single_names_the_last_one_takes_everything_along(tmp_path: Path) -> None:
    files = SshConfig(tmp_path)
    put(files, "a", "b", "c", only="a")
    put(files, "a", "b", "c", only="b")
    assert "\n# for: a b\n" in files.config.read_text()
    assert files.remove("c")  # only listed
    assert files.remove("a")
    assert files.gateway() is not None
    assert files.remove("b")
    assert not files.ssh.exists()
    put(files, only="all")
    assert (files.gateway() or Gateway(b"")).asked == frozenset({"all"})  # a name like any other
    put(files)
    files.remove("all")
    assert (files.gateway() or Gateway(b"", asked=frozenset("x"))).asked is None  # asked for all: a name's removal leaves that

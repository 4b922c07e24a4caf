from __future__ import annotations

import os
from pathlib import Path

import pytest

from gatewayd.config import (
    DEFAULT_ENDPOINT,
    Caller,
    Config,
    Proxies,
    Settings,
    check_endpoint,
    check_key,
    is_loopback,
    load,
    tls_context,
)
from gatewayd.errors import GatewayError

SECRET = "lsv2_very_secret"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "work.key"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


def configured(tmp_path: Path, text: str, **environ: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return load({"HOME": str(tmp_path), "GATEWAYD_CONFIG": str(path), **environ})


def refused(tmp_path: Path, text: str) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        configured(tmp_path, text)
    assert caught.value.kind == "config"
    assert str(tmp_path / "config.toml") in caught.value.message
    return caught.value


def test_nothing_configured_means_local(tmp_path: Path) -> None:
    config = load({"HOME": str(tmp_path)})
    assert config.config_file == tmp_path / ".config/gatewayd/config.toml"
    assert config.resolve(Caller()) is None
    assert config.resolve(Caller(profile="local")) is None


def test_starting_on_connect_can_be_switched_off(tmp_path: Path) -> None:
    assert load({"HOME": str(tmp_path)}).start_on_connect
    assert not configured(tmp_path, "start_on_connect = false\n").start_on_connect


def test_keepalives_can_be_made_faster(tmp_path: Path) -> None:
    config = load({"HOME": str(tmp_path)})
    assert (config.keepalive_interval, config.keepalive_timeout) == (15, 10)
    config = configured(tmp_path, "keepalive_interval = 1\nkeepalive_timeout = 0.5\n")
    assert (config.keepalive_interval, config.keepalive_timeout) == (1, 0.5)


def test_a_profile_of_the_file(tmp_path: Path, key_file: Path) -> None:
    config = configured(
        tmp_path,
        'default_profile = "work"\n[profiles.work]\nendpoint = "https://ls.example.com/api/v1/"\n'
        'api_key_file = "work.key"\nworkspace_id = "w-1"\n',
    )
    profile = config.resolve(Caller())
    assert profile is not None
    assert (profile.name, profile.endpoint, profile.api_key) == ("work", "https://ls.example.com", SECRET)
    assert profile.headers() == {"X-Api-Key": SECRET, "X-Tenant-Id": "w-1"}
    assert config.resolve(Caller(profile="local")) is None
    assert SECRET not in repr(profile)
    assert key_file.exists()


def test_the_order_of_profiles(tmp_path: Path, key_file: Path) -> None:
    text = f'[profiles.work]\nendpoint = "https://a"\napi_key_file = "{key_file}"\n'
    plain = configured(tmp_path, text, LANGSMITH_API_KEY="daemon-key")
    from_daemon = plain.resolve(Caller())
    assert from_daemon is not None
    assert (from_daemon.name, from_daemon.endpoint, from_daemon.api_key) == ("env", DEFAULT_ENDPOINT, "daemon-key")
    with_default = configured(tmp_path, f'default_profile = "work"\n{text}', LANGSMITH_API_KEY="daemon-key")
    by_default = with_default.resolve(Caller())
    assert by_default is not None
    assert by_default.name == "work"
    sent = with_default.resolve(Caller(api_key="sent-key", endpoint="http://127.0.0.1:9/", workspace="w"))
    assert sent is not None
    assert (sent.name, sent.endpoint, sent.api_key, sent.workspace_id) == ("env", "http://127.0.0.1:9", "sent-key", "w")
    named = with_default.resolve(Caller(profile="work", api_key="sent-key"))
    assert named is not None
    assert (named.name, named.api_key) == ("work", SECRET)


def test_unknown_profile_names_the_known_ones(tmp_path: Path) -> None:
    config = configured(tmp_path, '[profiles.work]\nendpoint = "https://a"\n')
    with pytest.raises(GatewayError, match=r"no \[profiles.nope\]") as caught:
        config.resolve(Caller(profile="nope"))
    assert caught.value.kind == "config"
    assert "local, env, work" in caught.value.hint


def test_env_without_a_key(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match="LANGSMITH_API_KEY is not set"):
        load({"HOME": str(tmp_path)}).resolve(Caller(profile="env"))


def test_api_key_env(tmp_path: Path) -> None:
    text = '[profiles.work]\nendpoint = "https://a"\napi_key_env = "WORK_KEY"\n'
    found = configured(tmp_path, text, WORK_KEY="from-env").resolve(Caller(profile="work"))
    assert found is not None
    assert found.api_key == "from-env"
    with pytest.raises(GatewayError, match="has no WORK_KEY"):
        configured(tmp_path, text).resolve(Caller(profile="work"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    config = configured(tmp_path, f'[profiles.w]\nendpoint = "https://a"\napi_key_file = "{key_file}"\n')
    with pytest.raises(GatewayError, match="can be read by others") as caught:
        config.resolve(Caller(profile="w"))
    assert caught.value.kind == "config"
    assert caught.value.hint == f"chmod 600 {key_file}"
    assert SECRET not in caught.value.message


def test_key_files_that_hold_no_key(tmp_path: Path, key_file: Path) -> None:
    config = configured(tmp_path, '[profiles.w]\nendpoint = "https://a"\napi_key_file = "work.key"\n')
    for content in ("", "\n", f"{SECRET} and more", f"{SECRET}\nsecond line", "x" * 5000):
        key_file.write_text(content)
        with pytest.raises(GatewayError) as caught:
            config.resolve(Caller(profile="w"))
        assert caught.value.kind == "config"
        assert SECRET not in caught.value.message + caught.value.hint
    key_file.unlink()
    with pytest.raises(GatewayError, match="cannot read"):
        config.resolve(Caller(profile="w"))
    key_file.mkdir()
    with pytest.raises(GatewayError, match=r"cannot read|not a regular file"):
        config.resolve(Caller(profile="w"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("endpoint = ", "not valid TOML"),
        ("\x00", "not valid TOML"),
        ("defualt_profile = 'a'", "unknown key 'defualt_profile'"),
        ("default_profile = 3", "default_profile must be a string"),
        ("start_on_connect = 'no'", "start_on_connect must be true or false"),
        ("keepalive_interval = true", "keepalive_interval must be a number of seconds, 0.1 to 3600"),
        ("keepalive_interval = nan", "keepalive_interval must be a number of seconds"),
        ("keepalive_timeout = 0", "keepalive_timeout must be a number of seconds"),
        ("default_profile = 'gone'", "'gone' is not defined"),
        ("profiles = 3", "profiles must be tables"),
        ("[profiles]\nwork = 3", "profiles.work must be a table"),
        ("[profiles.local]\nendpoint = 'https://a'", "built in"),
        ("[profiles.'a b']\nendpoint = 'https://a'", "a profile's name"),
        ("[profiles.w]\nworkspace_id = 'x'", "profiles.w.endpoint is missing"),
        ("[profiles.w]\nendpoint = 'ftp://a'", "not an http or https URL"),
        ("[profiles.w]\nendpoint = 'https://a'\napi_key = 'x'", "unknown key 'api_key'"),
        ("[profiles.w]\nendpoint = 'https://a'\nca_file = 3", "profiles.w.ca_file must be a string"),
        ("[profiles.w]\nendpoint = 'https://a'\napi_key_file = 'a'\napi_key_env = 'b'", "exclude each other"),
        ("[profiles.w]\nendpoint = 'https://a'\nworkspace_id = 'a b'", "printable ASCII"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text).message


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(GatewayError, match="no such file"):
        load({"HOME": str(tmp_path), "GATEWAYD_CONFIG": str(tmp_path / "gone.toml")})


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    environ = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    settings = Settings(environ)
    assert settings.current().default_profile == ""
    assert settings.current() is settings.current()
    path = tmp_path / "xdg/gatewayd/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text('default_profile = "env"\n')
    assert settings.current().default_profile == "env"
    path.write_text("broken = \n")
    with pytest.raises(GatewayError):
        settings.current()
    path.unlink()
    assert settings.current().default_profile == ""


def test_relative_paths_survive_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    settings = Settings({"HOME": str(tmp_path), "GATEWAYD_CONFIG": "own.toml", "GATEWAYD_STATE_DIR": "state"})
    monkeypatch.chdir("/")
    (tmp_path / "own.toml").write_text('default_profile = "env"\n')
    config = settings.current()
    assert (config.default_profile, config.config_file, config.state_dir) == ("env", tmp_path / "own.toml", tmp_path / "state")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://api.smith.langchain.com", "https://api.smith.langchain.com"),
        (" https://h/api/v1/ ", "https://h"),
        ("https://h:8443/base/", "https://h:8443/base"),
        ("http://[::1]:1984/api/v1", "http://[::1]:1984"),
    ],
)
def test_endpoints(url: str, expected: str) -> None:
    assert check_endpoint(url, "here") == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h",
        "ftp://h",
        "https://",
        "https://u:p@h",
        "https://h?x=1",
        "https://h#f",
        "https://h:port",
        "https://h:0",
        "https://a b/",
    ],
)
def test_endpoints_that_are_none(url: str) -> None:
    with pytest.raises(GatewayError, match="here: ") as caught:
        check_endpoint(url, "here")
    assert caught.value.kind == "config"


def test_keys_fit_for_a_header() -> None:
    assert check_key(" abc\n", "here") == "abc"
    for wrong in ("", "  ", "a b", "a\r\nX-Evil: 1", "ключ", "x" * 5000):
        with pytest.raises(GatewayError):
            check_key(wrong, "here")


def test_proxies() -> None:
    proxies = Proxies(http="http://p:1", https="p:2", no_proxy="internal.example, .corp,10.0.0.0/8,exact:8080")
    assert proxies.for_url("https://api.example") == "http://p:2"
    assert proxies.for_url("wss://api.example") == "http://p:2"
    assert proxies.for_url("http://api.example") == "http://p:1"
    assert proxies.for_url("ws://api.example/x") == "http://p:1"
    for direct in (
        "https://internal.example",
        "https://a.internal.example",
        "https://x.corp",
        "https://10.1.2.3",
        "https://exact",
        "http://127.0.0.1:8",
        "http://localhost",
        "ws://[::1]:2/",
    ):
        assert proxies.for_url(direct) is None, direct
    assert Proxies(https="http://p", no_proxy="*").for_url("https://a") is None
    assert Proxies(every="http://p").for_url("https://a") == "http://p"
    assert Proxies().for_url("https://a") is None
    with pytest.raises(GatewayError, match="socks5 proxy"):
        Proxies(every="socks5://p").for_url("https://a")
    assert "secret" not in repr(Proxies(https="http://u:secret@p"))


def test_loopback_names() -> None:
    assert all(is_loopback(host) for host in ("localhost", "a.localhost", "127.3.2.1", "::1"))
    assert not any(is_loopback(host) for host in ("", "example.com", "10.0.0.1", "localhost.example.com"))


def test_a_ca_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    with pytest.raises(GatewayError, match="cannot use ca_file"):
        tls_context(str(path))
    path.write_text("no certificate")
    with pytest.raises(GatewayError, match="cannot use ca_file") as caught:
        tls_context(str(path))
    assert caught.value.kind == "config"


def test_the_environment_is_not_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings({"HOME": str(tmp_path)})
    monkeypatch.setenv("LANGSMITH_API_KEY", "later")
    assert settings.current().resolve(Caller()) is None
    assert "LANGSMITH_API_KEY" in os.environ

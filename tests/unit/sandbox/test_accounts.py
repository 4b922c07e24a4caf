from __future__ import annotations

from pathlib import Path

import pytest

from gatewayd.config import Caller, Settings
from gatewayd.errors import GatewayError
from gatewayd.sandbox import accounts as accounts_module
from gatewayd.sandbox.accounts import Accounts
from gatewayd.sandbox.embedded import Embedded


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    environ = {"HOME": str(tmp_path), "GATEWAYD_CONFIG": str(tmp_path / "config.toml")}
    (tmp_path / "config.toml").write_text('[profiles.work]\nendpoint = "http://127.0.0.1:1"\napi_key_file = "key"\n')
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text("first")
    return Accounts(Settings(environ), Embedded(tmp_path / "state", environ))


async def test_equal_callers_share_an_account(accounts: Accounts) -> None:
    assert accounts.select(Caller()) is accounts.select(Caller(profile="local"))
    one = accounts.select(Caller(api_key="a"))
    assert accounts.select(Caller(api_key="a", profile="env")) is one
    assert accounts.select(Caller(api_key="b")) is not one
    assert accounts.select(Caller(api_key="a", endpoint="http://127.0.0.1:2")) is not one
    with pytest.raises(GatewayError):
        accounts.select(Caller(profile="nope"))
    await accounts.aclose()


async def test_a_key_that_changed_makes_another_account(accounts: Accounts, tmp_path: Path) -> None:
    before = accounts.select(Caller(profile="work"))
    assert accounts.select(Caller(profile="work")) is before
    (tmp_path / "key").write_text("second")
    after = accounts.select(Caller(profile="work"))
    assert after is not before
    assert (await after.access.current()).api_key == "second"
    await accounts.aclose()


async def test_the_longest_unused_one_goes(accounts: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts_module, "ACCOUNTS_MAX", 2)
    a, b = accounts.select(Caller(api_key="a")), accounts.select(Caller(api_key="b"))
    assert accounts.select(Caller(api_key="a")) is a
    accounts.select(Caller(api_key="c"))
    assert accounts.select(Caller(api_key="a")) is a
    assert accounts.select(Caller(api_key="b")) is not b
    await accounts.aclose()

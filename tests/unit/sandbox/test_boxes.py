from __future__ import annotations

import pytest

from gatewayd.config import Profile
from gatewayd.errors import GatewayError
from gatewayd.sandbox import boxes
from gatewayd.sandbox.accounts import Account
from gatewayd.sandbox.boxes import Directory, Place, data_plane, list_boxes, wait_for
from tests.unit.fakeservice import Answer, FakeService


async def test_listing_goes_page_by_page(service: FakeService, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "PAGE", 3)
    for number in range(8):
        service.add_box(f"b{number}")
    everything = await list_boxes(account.rest, {}, 1000, 0)
    assert [box["name"] for box in everything] == [f"b{number}" for number in range(8)]
    assert [seen.query for seen in service.seen] == ["limit=3&offset=0", "limit=3&offset=3", "limit=3&offset=6"]
    assert [box["name"] for box in await list_boxes(account.rest, {"status": "ready"}, 4, 2)] == ["b2", "b3", "b4", "b5"]
    assert service.seen[-1].query == "status=ready&limit=1&offset=5"
    assert await list_boxes(account.rest, {}, 0, 0) == []


@pytest.mark.parametrize("body", [{}, {"sandboxes": 3}, {"sandboxes": [3]}])
async def test_lists_that_make_no_sense(service: FakeService, account: Account, body: object) -> None:
    service.answers.append(Answer(200, body))
    with pytest.raises(GatewayError, match="not what a sandbox service sends"):
        await list_boxes(account.rest, {}, 10, 0)


async def test_a_service_that_ignores_the_page_size_is_cut(service: FakeService, account: Account) -> None:
    service.answers.append(Answer(200, {"sandboxes": [{"name": str(number)} for number in range(500)]}))
    assert len(await list_boxes(account.rest, {}, 5, 0)) == 5


async def test_waiting(service: FakeService, account: Account) -> None:
    service.add_box("x", status="provisioning")
    service.answers.extend([Answer(200, {"status": "provisioning"}), Answer(200, {"status": "ready"})])
    assert (await wait_for(account.rest, "x", "ready", 5))["name"] == "x"
    with pytest.raises(GatewayError, match="still provisioning after 0 s") as caught:
        await wait_for(account.rest, "x", "ready", 0)
    assert caught.value.kind == "timeout"
    service.boxes["x"]["status"] = "failed"
    with pytest.raises(GatewayError, match="is failed"):
        await wait_for(account.rest, "x", "stopped", 5)


async def test_the_directory_remembers_for_a_while(
    service: FakeService, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.add_box("x")
    directory = Directory()
    place, remembered = await directory.locate(account, "x")
    assert (place.url, remembered) == (f"{service.ws_origin}/dp/id-x", False)
    assert await directory.locate(account, "x") == (place, True)
    directory.forget(account, "x")
    assert await directory.locate(account, "x") == (place, False)
    monkeypatch.setattr(boxes, "PLACE_MAX_AGE", 0.0)
    assert await directory.locate(account, "x") == (place, False)


async def test_the_directory_is_bounded(service: FakeService, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "PLACES_MAX", 2)
    directory = Directory()
    for name in ("a", "b", "c"):
        service.add_box(name)
        await directory.locate(account, name)
    assert [(await directory.locate(account, name))[1] for name in ("c", "b", "a")] == [True, True, False]


def test_the_key_does_not_travel_in_the_clear() -> None:
    secure = Profile("env", "https://api.example", "k")
    with pytest.raises(GatewayError, match="in the clear"):
        data_plane({"dataplane_url": "http://sandbox.example/x"}, secure, "x")
    assert data_plane({"dataplane_url": "https://sandbox.example/x/"}, secure, "x") == "https://sandbox.example/x"
    assert data_plane({"dataplane_url": "http://127.0.0.1:9/x"}, secure, "x") == "http://127.0.0.1:9/x"
    assert data_plane({"dataplane_url": "http://sandbox.example/x"}, Profile("env", "http://api.example", "k"), "x")


def test_websocket_urls() -> None:
    assert Place(Profile("p", "https://e"), "https://h/x").websocket("/tunnel") == "wss://h/x/tunnel"
    assert Place(Profile("p", "http://e"), "http://http.example/x").websocket("/tunnel") == "ws://http.example/x/tunnel"

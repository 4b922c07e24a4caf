"""The parts of the network that need none: names, addresses, messages, first bytes, policies."""

from __future__ import annotations

import re
import ssl
import struct
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gatewayd.local.egress import dnswire, nametable
from gatewayd.local.egress.addresses import Reach
from gatewayd.local.egress.hello import Endless, Hello, Plain, classify
from gatewayd.local.egress.hostnames import canonical, matcher, path_matcher
from gatewayd.local.egress.policy import PathTooLong, Policy, SecretMissing
from gatewayd.local.egress.trust import environment
from gatewayd.local.proxyconfig import ProxyConfig, shown, stored
from gatewayd.local.runtime.packetfilter import rules


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("API.Example.COM.", "api.example.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("[::1]", "::1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("10.0.0.1", "10.0.0.1"),
        ("_srv.example", "_srv.example"),
    ],
)
def test_one_spelling(text: str, made: str) -> None:
    assert canonical(text) == made


NO_HOSTS = ["", ".", "a..b", "a b", "-a.b", "a/b", "x" * 64, "a." * 130, "127.1", "0x7f000001", "1.2.3.4.5", "a\0b"]


@pytest.mark.parametrize("text", NO_HOSTS)
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ValueError, match="not a host name"):
        canonical(text)


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("Example.com.", ["example.com"], ["www.example.com", "example.com.evil.net"]),
        ("*.example.com", ["a.example.com", "a.b.example.com"], ["example.com", "aexample.com", "a.example.com.evil.net"]),
        ("*", ["a", "10.0.0.1"], []),
        ("10.0.0.0/8", ["10.1.2.3"], ["11.0.0.1", "ten.example"]),
        ("fd00::/8", ["fd00::1"], ["fe80::1", "10.0.0.1"]),
        ("::1", ["::1"], ["::2"]),
        ("~api[0-9]+\\.example\\.com", ["api1.example.com"], ["xapi1.example.com", "api1.example.com.evil.net"]),
    ],
)
def test_patterns(pattern: str, matched: list[str], others: list[str]) -> None:
    matches = matcher(pattern)
    assert all(matches(host) for host in matched)
    assert not any(matches(host) for host in others)


@pytest.mark.parametrize("pattern", ["", "~(", "10.0.0.0/64", "a b", "http://x", "*.exa mple", "x" * 2000])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(ValueError):
        matcher(pattern)


def test_addresses_are_public_or_opened() -> None:
    reach = Reach(["10.1.0.0/16", "fd12::/16"])
    closed = ["127.0.0.1", "0.0.0.0", "10.2.0.1", "169.254.169.254", "192.168.1.1", "100.64.0.1", "224.0.0.1", "255.255.255.255"]
    closed += ["::1", "::", "::ffff:10.2.0.1", "::ffff:127.0.0.1", "64:ff9b::a02:1", "2002:7f00:1::", "fe80::1", "fd13::1"]
    closed += ["ff02::1", "198.18.0.5", "168.63.129.16", "fe80::1%1"]
    opened = ["1.1.1.1", "2606:4700::1111", "10.1.2.3", "::ffff:10.1.2.3", "fd12::1", "64:ff9b::101:101"]
    assert [text for text in closed if not reach.refusal(ip_address(text))] == []
    assert [text for text in opened if reach.refusal(ip_address(text))] == []
    for text in ("127.0.0.0/8", "0.0.0.0/0", "::/0", "::1/128", "nonsense"):
        with pytest.raises(ValueError):
            Reach([text])
    filter_rules = rules(reach.network())
    assert "10.1.0.0/16" in filter_rules.partition("10.0.0.0/8")[0]  # exceptions come first


def test_names_get_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nametable, "MAX_NAMES", 3)
    table = nametable.NameTable()
    numbers = [table.number(name) for name in ("a", "b", "c")]
    assert len(set(numbers)) == 3
    assert table.name(nametable.ipv4(numbers[0])) == table.name(nametable.ipv6(numbers[0])) == "a"  # used again: "b" is older
    fourth = table.number("d")
    assert fourth not in numbers
    assert [table.name(nametable.ipv4(number)) for number in (*numbers, fourth)] == ["a", None, "c", "d"]
    assert table.name(ip_address("198.18.0.1")) is None
    assert nametable.stands_for_a_name(ip_address("198.19.255.255"))


def query(name: str, kind: int = dnswire.A) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", kind, 1)


def test_dns_messages() -> None:
    parsed = dnswire.parse(query("api.example") + b"\0\0\x29")  # with the beginning of EDNS behind it
    assert isinstance(parsed, dnswire.Query)
    assert (parsed.name, parsed.kind) == ("api.example", dnswire.A)
    answer = dnswire.answer(parsed, dnswire.NOERROR, bytes([198, 18, 1, 2]), 60)
    assert answer[:8] == struct.pack(">4H", 7, 0x8180, 1, 1)
    assert answer[-4:] == bytes([198, 18, 1, 2])
    assert dnswire.parse(b"short") is None
    assert dnswire.parse(answer) is None  # an answer is not answered
    for bad in (query("a" * 64), query("x")[:-5], struct.pack(">6H", 7, 0, 2, 0, 0, 0) + b"\0\0\1\0\1"):
        refused = dnswire.parse(bad)
        assert isinstance(refused, bytes)
        assert refused[3] & 15 == dnswire.FORMERR


@given(st.binary(max_size=600))
def test_no_bytes_break_the_parsers(data: bytes) -> None:
    dnswire.parse(data)
    dnswire.parse(query("a.b") + data)
    classify(data)
    classify(b"\x16\x03\x01" + data)


def client_hello(name: str | None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def records(body: bytes, size: int) -> bytes:
    """A handshake message in records of `size` bytes."""
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"\x16\x03\x01" + struct.pack(">H", len(piece)) + piece for piece in pieces)


def test_a_hello_in_too_many_pieces_is_not_waited_for() -> None:
    body = client_hello("api.example")[5:]
    pieces = records(body, 1)
    assert classify(pieces[: 16 * 6 - 1]) is None
    assert classify(pieces[: 16 * 6]) == classify(pieces) == Endless()
    long = b"\x01\xff\xff\xff" + bytes(1 << 17)
    assert classify(records(long, 1 << 14)[: (1 << 16) - 1]) is None
    assert classify(records(long, 1 << 14)[: 1 << 16]) == Endless()


def test_first_bytes() -> None:
    whole = client_hello("api.example")
    assert classify(whole) == classify(whole + b"more") == Hello("api.example")
    assert [classify(whole[:size]) for size in range(len(whole))] == [None] * len(whole)
    body = whole[5:]
    assert classify(records(body, -(-len(body) // 16))) == Hello("api.example")  # one message in many records
    assert classify(client_hello(None)) == Hello(None)
    assert classify(b"GET / HTTP/1.1\r\n") == Plain(http=True)
    assert classify(b"GE") is None
    assert classify(b"SSH-2.0-x\r\n") == classify(b"\x16\x02\x00\x00\x05hello") == Plain(http=False)


def compiled(config: dict[str, Any]) -> Policy:
    kept = stored(ProxyConfig.model_validate(config), None, lambda value: value[::-1])
    return Policy(kept, lambda sealed: sealed[::-1], {"KEY": "v"}.__getitem__)


def header(kind: str, value: str, name: str = "X") -> dict[str, str]:
    return {"name": name, "type": kind, "value": value}


def giving(kind: str, value: str, name: str = "X") -> dict[str, Any]:
    """A configuration with one rule that gives one header."""
    return {"rules": [{"name": "r", "match_hosts": ["a"], "headers": [header(kind, value, name)]}]}


def test_rules_add_up_and_the_last_counts() -> None:
    policy = compiled(
        {
            "rules": [
                {"name": "a", "match_hosts": ["*.example"], "headers": [header("plaintext", "1"), header("opaque", "s", "Y")]},
                {
                    **{"name": "b", "match_hosts": ["api.example"], "match_paths": ["/v1/*"]},
                    "headers": [header("workspace_secret", "{KEY}!")],
                },
                {"name": "c", "enabled": False, "match_hosts": ["*"], "headers": [header("plaintext", "never")]},
                {"name": "d", "type": "attribution", "headers": [header("plaintext", "me", "By")]},
            ],
            "no_proxy": ["raw.example"],
        }
    )
    assert policy.headers("api.example", "/v1/x", encrypted=True) == ({b"x": b"v!", b"y": b"s", b"by": b"me"}, ["a", "b", "d"])
    assert policy.headers("api.example", "/v2", encrypted=True) == ({b"x": b"1", b"y": b"s", b"by": b"me"}, ["a", "d"])
    with pytest.raises(SecretMissing, match="not sent without TLS"):
        policy.headers("api.example", "/v2", encrypted=False)
    assert [policy.intercepts(host) for host in ("api.example", "raw.example", "other")] == [True, False, False]


def test_paths_that_are_too_long_are_not_matched() -> None:
    rule = {"name": "r", "match_hosts": ["api.example"], "match_paths": ["/v1/*"], "headers": [header("plaintext", "1")]}
    policy = compiled({"rules": [rule]})
    longest = "/v1/".ljust(4096, "x")
    assert policy.headers("api.example", longest, encrypted=True) == ({b"x": b"1"}, ["r"])
    with pytest.raises(PathTooLong, match="at most 4096 characters, this one has 4097"):
        policy.headers("api.example", longest + "x", encrypted=True)
    assert policy.headers("other.example", longest + "x", encrypted=True) == ({}, [])  # no rule about paths applies


_GLOBS = st.text("ab/*?", max_size=8).map("/".__add__)


@given(_GLOBS, st.text("ab/\n", max_size=10).map("/".__add__))
def test_path_globs_match_as_the_plain_expression_does(pattern: str, path: str) -> None:
    plain = re.compile("".join({"*": ".*", "?": "."}.get(char) or re.escape(char) for char in pattern), re.DOTALL)
    assert path_matcher(pattern)(path) == (plain.fullmatch(path) is not None)


def test_many_stars_do_not_multiply() -> None:
    assert not path_matcher("/" + "*a" * 300 + "*b")("/" + "a" * 4000)  # ends, which it would not if stars reconsidered
    assert not matcher("*a" * 100 + "*b")("a" * 253)
    assert path_matcher("/" + "*a" * 300 + "*b")("/" + "a" * 4000 + "b")


def test_opaque_values_are_kept_when_they_are_not_repeated() -> None:
    first = stored(ProxyConfig.model_validate(giving("opaque", "s")), None, str.upper)
    answered = shown(first)
    assert answered is not None
    assert answered["rules"][0]["headers"] == [{"name": "X", "type": "opaque", "is_set": True}]
    again = ProxyConfig.model_validate(answered)
    assert stored(again, first, str.upper) == first
    with pytest.raises(ValueError, match="no value for header X yet"):
        stored(again, None, str.upper)
    assert stored(ProxyConfig.model_validate({"rules": [], "no_proxy": []}), first, str.upper) is None
    assert "SSL_CERT_FILE" in environment(first)
    assert environment(None) == {}


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"rules": [{"name": "r", "match_hosts": ["a b"]}]}, ("rules", 0, "match_hosts", 0)),
        ({"rules": [{"name": "r", "match_paths": ["x"]}]}, ("rules", 0, "match_paths", 0)),
        ({"rules": [{"name": "r", "headers": [header("plaintext", "v")]}]}, ("rules", 0)),
        (giving("plaintext", "a\r\nb: c"), ("rules", 0, "headers", 0)),
        (giving("workspace_secret", "no key"), ("rules", 0, "headers", 0)),
        (giving("plaintext", "v", "Host"), ("rules", 0, "headers", 0, "name")),
        (giving("secret", "v"), ("rules", 0, "headers", 0, "type")),
        ({"rules": [{"name": "r"}, {"name": "r"}]}, ()),
        ({"rules": [{"name": "r", "type": "aws"}]}, ("rules", 0)),
        ({"rules": [{"name": "r", "env_vars": {"A=B": "c"}}]}, ("rules", 0, "env_vars")),
        ({"access_control": {"allow_list": [], "deny_list": []}}, ("access_control",)),
        ({"callbacks": [{}]}, ()),
        ({"unknown": 1}, ("unknown",)),
    ],
)
def test_refusals_name_the_place_and_not_the_value(config: dict[str, Any], place: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        ProxyConfig.model_validate(config)
    assert [error["loc"] for error in caught.value.errors()] == [place]

"""Nothing of the SDK's sandbox clients is unaccounted for, and docs/compatibility.md says what the conformance run saw.

Runs after the other conformance files, whose calls it judges; of a part of them it can say nothing.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from types import ModuleType

import pytest
from langsmith import sandbox as sdk

from tests.compatibility import Row, publish, table
from tests.sdk import test_conformance, test_conformance_generated
from tests.sdk.conformance import FAILED, OK, REFUSED, finished, seen, surface

# A pattern that fits the whole name, without "Async" → why. Every method that fits none must be seen to succeed and to fail.
CANNOT_FAIL = {
    r"\w+\.(__enter__|__aenter__)": "gives the object itself",
    r"SandboxClient\.(close|aclose)": "idempotent",
    r"SandboxClient\.(to_async|to_sync)|Sandbox\.(to_async|to_sync)": "the same sandboxes through the SDK's other form",
    r"(SandboxClient|SandboxesResource)\.(boxes|registries|snapshots)": "the generated resource",
    r"(Sandbox|RunConfig|GlobResult|GrepResult)\.from_dict|RunConfig\.to_payload": "converts what is answered or sent",
    r"(GlobResult|GrepResult)\.__iter__|ExecutionResult\.success|FileChunk\.end": "reads what was answered",
    r"CommandHandle\.(command_id|pid|last_stdout_offset|last_stderr_offset)": "reads what was answered",
    r"CommandHandle\.(kill|close_input)": "no effect on a command that has ended",
    r"Tunnel\.(local_port|remote_port)": "reads what the tunnel holds",
    r"Tunnel\.close": "idempotent",
    r"proxy_config|\w+_secret|attribution": "builds what is sent",
}
ONLY_REFUSED = {
    r"SandboxClient\.create_snapshot_from_dockerfile": "the default snapshot has no BuildKit",
    r"(SandboxClient|Sandbox)\.service|BoxesResource\.(generate|delete)_service_url": "ports are reached through tunnels",
    r"(SandboxClient|Sandbox|BoxesResource)\.generate_download_url": "files are read through `read` and `read_range`",
    r"aws_auth|gcp_auth": "`proxy_config`: requests are signed for no cloud; rules set headers",
    r"mount_config|\w+_mount": "`mount_config`: nothing is mounted into sandboxes",
}
EMPTY = {  # they work, and find nothing
    r"BoxesResource\.list_service_urls": "always empty: ports are reached through tunnels",
}
NOT_REACHED = {
    r"ServiceURL\.\w+": ("made by `service`", "SandboxClient.service"),
}
CLOUD_ONLY = {
    r"SandboxTokenVerifier\.\w+": "checks tokens that LangSmith signs for users of service URLs",
    r"SandboxesResource\.list_usage_costs": "billing",
}


def plain(name: str) -> str:
    """A name without what tells the two forms of the SDK apart."""
    return name.removeprefix("Async")


def fitting(patterns: dict[str, str], name: str) -> str | None:
    """What a table says about a name."""
    return next((note for pattern, note in patterns.items() if re.fullmatch(pattern, plain(name))), None)


def judge(name: str) -> tuple[str, str] | None:
    """State and note of one method, from what was seen of it; None when nothing accounts for it."""
    outcomes = seen[name]
    if outcomes >= {OK, FAILED}:
        return "tested", fitting(EMPTY, name) or ""
    if outcomes == {OK} and (note := fitting(CANNOT_FAIL, name)) is not None:
        return "tested, cannot fail", note
    if outcomes == {REFUSED} and (note := fitting(ONLY_REFUSED, name)) is not None:
        return "refused", note
    if not outcomes and (note := fitting(CLOUD_ONLY, name)) is not None:
        return "cloud only", note
    for pattern, (note, maker) in NOT_REACHED.items():
        if not outcomes and re.fullmatch(pattern, plain(name)) and seen[maker] == {REFUSED}:
            return "not reached", note
    return None


def scenarios(*modules: ModuleType) -> set[str]:
    """Every test of the modules, in both forms, as it names itself when it has run."""
    names = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("test_") and inspect.iscoroutinefunction(value)
    }
    return {f"{name}[{mode}]" for name in names for mode in ("sync", "async")}


@pytest.fixture
def complete() -> None:
    """Only a whole run can be judged."""
    if missing := scenarios(test_conformance, test_conformance_generated) - finished:
        pytest.skip(f"needs the whole conformance run; {len(missing)} of its tests are not in this one")


@pytest.mark.usefixtures("complete")
def test_every_public_method_is_accounted_for() -> None:
    names = surface()
    assert len(names) > 200
    unknown = {name: sorted(seen[name]) for name in sorted(names) if judge(name) is None}
    assert unknown == {}, "tests must call these, once with success and once with failure, or a table above must say why not"
    assert not {name for name in seen if seen[name]} - names, "seen, but not found by introspection"


def test_a_method_that_nobody_has_looked_at_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = surface()
    monkeypatch.setattr(sdk.AsyncSandbox, "defrost", lambda self: None, raising=False)
    monkeypatch.setattr(sdk, "defrosted", lambda: None, raising=False)
    added = surface() - before
    assert added == {"AsyncSandbox.defrost", "defrosted"}
    assert [judge(name) for name in added] == [None, None]


@pytest.mark.usefixtures("complete")
def test_no_table_speaks_of_what_is_not_there() -> None:
    for patterns in (CANNOT_FAIL, ONLY_REFUSED, EMPTY, NOT_REACHED, CLOUD_ONLY):
        for pattern in patterns:
            assert any(re.fullmatch(pattern, plain(name)) for name in surface()), pattern


@pytest.mark.usefixtures("complete")
def test_the_document_says_what_was_seen() -> None:
    modes: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    owners = {name.partition(".")[0] for name in surface()}
    for name in surface():
        judged = judge(name)
        assert judged is not None, name
        state, note = judged
        owner = name.partition(".")[0]
        both = f"Async{plain(owner)}" not in owners
        mode = "both" if both else "async" if owner.startswith("Async") else "sync"
        modes[(plain(name), state, note)].add(mode)
    rows: list[Row] = [
        (name, ", ".join(sorted(found, reverse=True)), state, note) for (name, state, note), found in modes.items()
    ]
    publish("python", table(rows))

"""OpenSSH's own regression scripts against the gateway's SSH front end. What they say is recorded in docs/compatibility.md.

    make nightly
    .venv/bin/pytest tests/nightly -m slow -k 'script and forwarding'      # one script
    .venv/bin/pytest tests/nightly -m slow -k 'sshd and forwarding'        # the same against sshd, in the same place

A script that begins to fail fails here, and so does one that is expected to fail and passes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.compatibility import publish
from tests.e2e.conftest import new_gateway
from tests.nightly.bench import REAL_SSHD, Bench, Outcome, fetch
from tests.nightly.scripts import CASES, ELSEWHERE, LOCAL, Case

NEEDED = ("bwrap", "apt-get", "dpkg-deb", "ssh", "ssh-keygen", "socat")
missing = [name for name in NEEDED if shutil.which(name) is None]
DEADLINE = 60  # seconds for a sandbox and the end of it, on top of a script's own

by_name = [pytest.param(case, id=case.name, marks=pytest.mark.timeout(case.timeout + DEADLINE)) for case in CASES]
seen: set[str] = set()  # scripts that did in this run what is expected of them


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One sandbox for all scripts."""
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    suite = fetch(tmp_path_factory.mktemp("debian") / "openssh")
    for gateway in new_gateway():
        bench = Bench(gateway, suite)
        with bench.running():
            assert bench.run("connect").code == 0
            bench.offer()
            yield bench


def complaint(outcome: Outcome, complaints: list[str]) -> str:
    """Why a script is not content."""
    said = "\n".join(complaints)
    return f"exit {outcome.code}\n{said}\n--- the end of what it wrote\n{outcome.output[-2000:]}"


@pytest.mark.parametrize("case", by_name)
def test_script(bench: Bench, case: Case) -> None:
    outcome = bench.run(case.name, timeout=case.timeout, data=case.data)
    unexpected, missed = case.judge(outcome)
    assert not unexpected, complaint(outcome, unexpected)
    assert not missed, f"expected to fail, and did not: {missed}"
    seen.add(case.name)


@pytest.mark.parametrize("case", by_name)
def test_sshd_itself(bench: Bench, case: Case) -> None:
    """The same script against sshd, in the same sandbox: what fails there too is not the front end's fault."""
    if not case.beside_sshd:
        pytest.skip("cannot pass here")
    outcome = bench.run(case.name, REAL_SSHD, timeout=case.timeout, data=case.data)
    assert outcome.code == 0, complaint(outcome, [f"{step}: {what}" for step, what in outcome.failures])


def test_the_record(bench: Bench) -> None:
    """docs/compatibility.md says what this run has seen. Every script of the package is accounted for."""
    names = {path.stem for path in bench.suite.folder.glob("*.sh")}
    accounted = {case.name for case in CASES} | set(ELSEWHERE) | LOCAL
    assert names == accounted, f"not accounted for: {names - accounted}; no longer there: {accounted - names}"
    if len(seen) < len(CASES):
        pytest.skip("not every script has run and done what is expected of it")
    publish("openssh", record(bench.suite.version))


def record(version: str) -> str:
    """The part of the page."""
    lines = ["| script | result | note |", "|---|---|---|"]
    lines += [f"| `{case.name}` | {case.state} | {case.remark} |" for case in CASES]
    lines += [f"| `{name}` | not run | {why} |" for name, why in sorted(ELSEWHERE.items())]
    return f"OpenSSH {version}.\n\n" + "\n".join(lines)

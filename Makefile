# Two commands matter: `make demo` and `make test`. Both set up what they need.

.PHONY: demo demo-down test check unit e2e nightly setup-test runsc clean

demo:
	@scripts/setup demo
	@scripts/demo

# Undo what the demo left: its sandbox, its ssh configuration, the daemon and the service.
demo-down:
	@scripts/demo-down

test: setup-test check
	.venv/bin/pytest

setup-test:
	@scripts/setup test

# gVisor, for the tests of the runsc runtime; `make test` builds it by itself as root beside Docker.
runsc:
	@scripts/runsc

check: setup-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

unit: setup-test
	.venv/bin/pytest tests/unit tests/property tests/test_layering.py

e2e: setup-test
	.venv/bin/pytest tests/e2e

# Suites of other projects against the gateway: half an hour, and packages from the network.
nightly: setup-test
	.venv/bin/pytest tests/nightly -m slow

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .runsc

"""Real databases inside, their real clients outside: what the demo does, and more of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .conftest import Gateway, make, serve

pytestmark = pytest.mark.e2e

START_POSTGRES = """
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
as="setpriv --reuid=1000 --regid=1000 --clear-groups env HOME=/home/user"
cd /home/user
[ -d db ] || $as "$bin/initdb" -D db -U demo --auth=trust --no-sync >/dev/null
$as "$bin/pg_ctl" -D db -l db.log -w -o "-c listen_addresses=127.0.0.1 -c unix_socket_directories=/tmp" start >/dev/null
"""


@pytest.fixture(scope="module")
def database(gateway: Gateway) -> str:
    """A sandbox with PostgreSQL on its usual port."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")):
        pytest.skip("PostgreSQL's server is not installed")
    name = make(gateway, "database")
    gateway.sh(name, START_POSTGRES)
    return name


def psql(gateway: Gateway, port: int, *args: str, stdin: bytes | None = None) -> str:
    words = ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", "demo", "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-qAt", *args]
    return str(gateway.run(*words, input=stdin).stdout.decode())


def test_psql_through_a_forward(gateway: Gateway, database: str) -> None:
    with gateway.tunnel(database, 5432) as tunnel:
        assert psql(gateway, tunnel.port, "-c", "select 6 * 7") == "42\n"
        rows = "".join(f"{number}\t{'x' * 100}\n" for number in range(20_000)).encode()
        psql(gateway, tunnel.port, "-c", "create table t (id int, text text)")
        psql(gateway, tunnel.port, "-c", "copy t from stdin", stdin=rows)
        assert psql(gateway, tunnel.port, "-c", "copy t to stdout").encode() == rows
        many = [
            subprocess.Popen(
                [
                    "psql",
                    "-h",
                    "127.0.0.1",
                    "-p",
                    str(tunnel.port),
                    "-U",
                    "demo",
                    "-d",
                    "postgres",
                    "-At",
                    "-c",
                    f"select {number}",
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(10)
        ]
        assert [process.communicate(timeout=30)[0] for process in many] == [f"{number}\n" for number in range(10)]


def test_a_database_survives_a_stop(gateway: Gateway, database: str) -> None:
    with gateway.tunnel(database, 5432) as tunnel:
        psql(gateway, tunnel.port, "-c", "create table if not exists kept (id int)", "-c", "insert into kept values (1)")
        gateway.sandbox("stop", database)
        gateway.sh(database, START_POSTGRES)
        assert psql(gateway, tunnel.port, "-c", "select id from kept") == "1\n"  # the same forward, on a new link


def test_redis_through_a_forward(gateway: Gateway, database: str) -> None:
    serve(gateway, database, 6379, ["redis-server", "--port", "6379", "--save", "", "--bind", "127.0.0.1"])
    with gateway.tunnel(database, 6379) as tunnel:
        cli = ["redis-cli", "-p", str(tunnel.port)]
        assert gateway.run(*cli, "set", "key", "value").stdout == b"OK\n"
        assert gateway.run(*cli, "get", "key").stdout == b"value\n"
        pipe = b"".join(b"SET k%d %d\r\n" % (number, number) for number in range(10_000))
        assert b"errors: 0, replies: 10000" in gateway.run(*cli, "--pipe", input=pipe).stdout

"""glob, ls and grep through the SDK, among hostile names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langsmith.sandbox import ResourceNotFoundError, SandboxOperationError

if TYPE_CHECKING:
    from tests.sdk.conftest import Service

TREE = r"""
mkdir -p /srv/t/src/deep/er /srv/t/empty && cd /srv/t
echo 'import this' > src/a.py; echo 'import that' > src/deep/er/b.py; echo nothing > src/c.txt; echo hidden > .h
ln -s /etc src/link; mkfifo src/fifo; : > "$(printf 'new\nline.py')"; : > "$(printf 'bad\377.py')"; : > 'st*r [x].py'; : > -dash
touch -d @1700000000 src/c.txt
"""


@pytest.fixture(scope="module")
def tree(sandbox: Any) -> Any:
    """The sandbox, with a tree at /srv/t."""
    assert sandbox.run(TREE).exit_code == 0
    return sandbox


def paths(result: Any) -> list[str]:
    assert not result.truncated
    return [match.path.removeprefix("/srv/t/") for match in result]


def test_ls(tree: Any) -> None:
    result = tree.ls("/srv/t")
    assert paths(result) == ["-dash", ".h", "bad\ufffd.py", "empty", "new\nline.py", "src", "st*r [x].py"]
    assert {match.path for match in result if match.is_dir} == {"/srv/t/empty", "/srv/t/src"}
    assert paths(tree.ls("/srv/t/empty")) == []
    [entry] = [match for match in tree.ls("/srv/t/src/") if match.path.endswith("c.txt")]
    assert (entry.size_bytes, entry.modified_at, entry.is_dir) == (8, "2023-11-14T22:13:20Z", False)


def test_glob(tree: Any) -> None:
    assert paths(tree.glob("**/*.py", "/srv/t")) == [
        "bad\ufffd.py",
        "new\nline.py",
        "src/a.py",
        "src/deep/er/b.py",
        "st*r [x].py",
    ]
    assert paths(tree.glob("src/*", "/srv/t")) == ["src/a.py", "src/c.txt", "src/deep", "src/fifo", "src/link"]
    assert paths(tree.glob("src/**/b.py", "/srv/t")) == ["src/deep/er/b.py"]
    assert paths(tree.glob("[s]*[[]x].py", "/srv/t")) == ["st*r [x].py"]
    assert paths(tree.glob("nowhere/*", "/srv/t")) == []
    assert paths(tree.glob("../t/*", "/srv/t")) == []
    limited = tree.glob("**", "/srv/t", limit=2)
    assert (len(limited), limited.truncated) == (2, True)
    assert not tree.glob("**", "/srv/t", limit=14).truncated


def test_grep(tree: Any) -> None:
    found = {(match.path, match.line, match.text) for match in tree.grep("import", "/srv/t")}
    assert found == {("/srv/t/src/a.py", 1, "import this"), ("/srv/t/src/deep/er/b.py", 1, "import that")}
    assert paths(tree.grep("th", "/srv/t", glob="*.txt")) == ["src/c.txt"]
    assert paths(tree.grep("import", "/srv/t", glob="src/*.py")) == ["src/a.py"]
    assert paths(tree.grep("import", "/srv/t", glob="src/**/b.*")) == ["src/deep/er/b.py"]
    assert paths(tree.grep("i.port", "/srv/t")) == []  # no regular expression
    assert paths(tree.grep("-e", "/srv/t")) == []
    limited = tree.grep("i", "/srv/t", limit=1)
    assert (len(limited), limited.truncated) == (1, True)


def test_much(tree: Any) -> None:
    tree.run(
        "mkdir /srv/many && cd /srv/many && seq 1 3000 | xargs touch && seq -f 'word %g' 1 20000 > big; head -c 9M /dev/zero > 0"
    )
    tree.run("cd /srv/many && { printf 'word '; head -c 3M /dev/zero | tr '\\0' x; } > long")
    result = tree.ls("/srv/many")
    assert (len(result), result.truncated) == (1000, True)
    assert len(tree.ls("/srv/many", limit=5000)) == 3003
    lines = tree.grep("word", "/srv/many", glob="big", limit=9999)
    assert [match.line for match in lines] == list(range(1, 10000))
    assert lines.truncated
    [long] = tree.grep("word", "/srv/many", glob="long")
    assert long.text == "word " + "x" * 4091
    assert paths(tree.grep("word", "/", glob="src/*")) == []  # /proc and /dev do not hold it up


def test_as_whom(client: Any, name: str) -> None:
    with client.sandbox(name=name, run_config={"user": "nobody"}) as made:
        made.run(
            "cd /srv && mkdir -m 700 private && mkdir -p open/shut && touch private/x open/shut/x && chmod 0 open/shut",
            run_config={"user": "root"},
        )
        assert [match.path for match in made.glob("**", "/srv/open")] == ["/srv/open/shut"]
        with pytest.raises(SandboxOperationError, match="Permission denied"):
            made.ls("/srv/private")


async def test_async(service: Service, name: str) -> None:
    async with service.async_client() as client, await client.sandbox(name=name) as made:
        await made.write("/srv/x.txt", "needle\n")
        assert [match.path for match in await made.glob("*.txt", "/srv")] == ["/srv/x.txt"]
        assert [match.text for match in await made.grep("needle", "/srv")] == ["needle"]
        with pytest.raises(ResourceNotFoundError):
            await made.ls("/nowhere")


def test_refusals(service: Service, tree: Any) -> None:
    with pytest.raises(ResourceNotFoundError):
        tree.ls("/srv/t/nowhere")
    with pytest.raises(SandboxOperationError, match="Not a directory"):
        tree.ls("/srv/t/src/c.txt")
    with service.http() as http:
        for body, field in [
            ({"pattern": "x", "path": "relative"}, "path"),
            ({"pattern": "", "path": "/"}, "pattern"),
            ({"pattern": "a\nb", "path": "/"}, "pattern"),
            ({"pattern": "a", "path": "/", "limit": 0}, "limit"),
        ]:
            answer = http.post(f"{tree.dataplane_url}/grep", json=body)
            assert answer.status_code == 422
            assert answer.json()["detail"][0]["loc"] == ["body", field]

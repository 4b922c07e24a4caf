"""Glob patterns."""

from __future__ import annotations

import pytest

from gatewayd.local.globs import Glob


def fits(pattern: str, path: str) -> bool:
    """As the service uses it: the folder is gone to, the rest is matched."""
    glob = Glob(pattern)
    if glob.folder:
        if not path.startswith(glob.folder + "/"):
            return False
        path = path.removeprefix(glob.folder + "/")
    assert glob.depth is None or not glob.matches(path) or path.count("/") + 1 == glob.depth
    return glob.matches(path)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*", ["a", ".hidden", "a b", "ü", "new\nline", "x" * 255], ["a/b"]),
        ("*.py", ["a.py", ".py"], ["a.pyc", "d/a.py"]),
        ("**", ["a", "a/b", "a/b/c"], []),
        ("**/*.py", ["a.py", "d/a.py", "d/e/a.py"], ["a.pyc", "a.py/b"]),
        ("src/**/test_*.py", ["src/test_a.py", "src/a/b/test_.py"], ["test_a.py", "srcs/test_a.py", "src/a/tests.py"]),
        ("a/**", ["a/b", "a/b/c"], ["b/a", "ab"]),
        ("**/a/**/b", ["a/b", "x/a/y/z/b", "a/a/b/b"], ["b", "a", "x/b/a"]),
        ("a/b", ["a/b"], ["a", "a/b/c", "x/a/b"]),
        ("a?c", ["abc", "aüc"], ["ac", "abbc"]),
        ("[abc]x", ["ax", "cx"], ["dx", "[abc]x"]),
        ("[!a-c]x", ["dx", "üx"], ["ax", "bx"]),
        ("[^a]", ["b"], ["a"]),
        ("[]]", ["]"], ["["]),
        ("[a-]", ["a", "-"], ["b"]),
        ("[z-a]", [], ["a", "z", "-"]),
        ("[.^$]*", [".x", "^", "$1"], ["a"]),
        ("[", ["["], ["a"]),
        ("a[b", ["a[b"], ["ab"]),
        (r"\*", ["*"], ["a", r"\*"]),
        (r"a\\b", [r"a\b"], []),
        ("a**b", ["ab", "axxb"], ["a/b"]),
        ("*a*b*c", ["abc", "xaxbxc", "aabbcc", "abcabc"], ["acb", "abcx"]),
        ("./a//b", ["a/b"], ["a"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    for path in yes:
        assert fits(pattern, path), path
    for path in no:
        assert not fits(pattern, path), path


def test_what_is_left_to_find() -> None:
    def hints(pattern: str) -> tuple[str, int | None, str]:
        glob = Glob(pattern)
        return glob.folder, glob.depth, glob.name

    assert hints("*") == ("", 1, "*")
    assert hints("src/lib/*.c") == ("src/lib", 1, "*.c")
    assert hints("src/**/a[bc]?.c") == ("src", None, "a*.c")
    assert hints("src/**") == ("src", None, "*")
    assert hints("exact/name") == ("exact", 1, "name")
    assert hints(r"\[x\]*") == ("", 1, r"\[x]*")
    assert Glob("../x").parents
    assert not Glob("a..b/x").parents
    assert Glob("*.py").matches_name("deep/down/x.py")
    assert not Glob("*.py").matches_name("deep/x.py/y")


def test_no_pattern_takes_long() -> None:
    assert not fits("*a" * 100 + "b", "a" * 255)
    assert not fits("/".join(["**", "a*a"] * 30) + "/b", "/".join(["aaaa"] * 500))
    assert fits("*a" * 100, "a" * 255)

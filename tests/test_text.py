"""Names of files and classes as text that is safe everywhere."""

import os

import pytest

from dino_jax.text import cut, printable, same_class


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat", "cat"),
        ("日本語 🐱", "日本語 🐱"),
        ("C:\\cats", "C:\\cats"),
        ("two\nlines", r"two\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("a\u2028b\u202ec", r"a\u2028b\u202ec"),
        ("one\\n\n", r"one\\n\n"),
    ],
)
def test_printable(name: str, expected: str) -> None:
    assert printable(name) == expected
    printable(name).encode()  # UTF-8


def test_shortened_file_names_stay_different() -> None:
    long = "日" * 100
    names = [cut(long + end) for end in "ab"]
    assert len(set(names)) == 2
    assert all(len(name.encode()) <= 200 for name in names)
    assert cut("short") == "short"


def test_spellings_of_one_class() -> None:
    assert same_class("cafe\u0301") == same_class("caf\xe9")

"""Error messages."""

import pytest

from dino_jax.errors import UsageError, about, listed


def test_listed_counts_omitted_items() -> None:
    assert listed(["a", 2]) == "a, 2"
    assert listed("abcde") == "a, b, c, d, e"
    assert listed("abcdefg") == "a, b, c, d, e and 2 more"
    assert listed({1, 2, 3}, limit=1) == "1 and 2 more"
    assert listed([]) == ""


def test_about_prefixes_only_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"^x\.pth: broken$"), about("x.pth"):
        raise UsageError("broken")
    with pytest.raises(ValueError, match=r"^a bug$"), about("x.pth"):
        raise ValueError("a bug")

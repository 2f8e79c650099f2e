"""Valid and invalid files in the legacy format."""

import struct
from typing import Any

import numpy as np
import pytest

from tests.support.torch_files import (
    Call,
    expect_error,
    legacy_file,
    pickle_of,
    read,
    storage,
    tensor,
)

SIX = np.arange(6, dtype=np.float32)
TWO = np.array([7, 8], np.int64)
VALUE = {
    "a": tensor(storage(6), 0, (2, 3), (3, 1)),
    "b": tensor(storage(2, "Long", "1"), 1, (), ()),
}
GOOD = legacy_file(VALUE, {"0": SIX, "1": TWO})


def test_tensors_of_several_types() -> None:
    result = read(GOOD)
    np.testing.assert_array_equal(result["a"], SIX.reshape(2, 3), strict=True)
    np.testing.assert_array_equal(result["b"], TWO[1], strict=True)
    # Storages are sorted by key, not in the order of the pickle.
    result = read(legacy_file(VALUE, {"1": TWO, "0": SIX}))
    np.testing.assert_array_equal(result["a"], SIX.reshape(2, 3), strict=True)


def test_windows_of_one_storage() -> None:
    """torch 0.2 and 0.3 saved slices of a storage as storages that are views of a root storage."""
    window = storage(6, "Float", "0", ("9", 2, 3))
    whole = storage(6, "Float", "0", None)
    value = [tensor(window, 1, (2,), (1,)), tensor(whole, 0, (6,), (1,))]
    part, all_of_it = read(legacy_file(value, {"0": SIX}))
    np.testing.assert_array_equal(part, SIX[3:5], strict=True)
    np.testing.assert_array_equal(all_of_it, SIX, strict=True)
    for view, offset, message in (
        (("9", 2, 3), 2, "reaches element 3 of a storage of 3"),
        (("9", 4, 3), 0, "invalid size or window"),
        (("9", -1, 3), 0, "invalid size or window"),
        (("9", 10**300, 0), 0, "invalid size or window"),
        (("9", 1), 0, "damaged"),
        ("abc", 0, "invalid size or window"),
    ):
        value = tensor(storage(6, "Float", "0", view), offset, (2,), (1,))
        expect_error(legacy_file(value, {"0": SIX}), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 1002}, "not version 1001"),
        ({"version": [1]}, "not version 1001"),
        ({"machine": []}, "not version 1001"),
        ({"machine": {"little_endian": False}}, "big-endian"),
        ({"machine": {}}, "big-endian"),
        ({"machine": tensor(storage(1), 0, (1,), (1,))}, "a tensor in its header"),
        ({"machine": Call("os.system", ("x",))}, "asks for 'os.system'"),
        ({"keys": ["0"]}, "do not match its tensors"),
        ({"keys": ["0", "1", "2"]}, "do not match its tensors"),
        ({"keys": ["0", "0"]}, "do not match its tensors"),
        ({"keys": ["0", 1]}, "do not match its tensors"),
        ({"keys": "01"}, "do not match its tensors"),
        ({"keys": ["1", "0"]}, "does not have the length in its"),
    ],
)
def test_rejects_pickles(options: dict[str, Any], message: str) -> None:
    expect_error(legacy_file(VALUE, {"0": SIX, "1": TWO}, **options), message)


def test_rejects_storages() -> None:
    expect_error(GOOD + b"x", "1 bytes follow its last tensor")
    conflict = [tensor(storage(6), 0, (1,), (1,)), tensor(storage(3, "Double"), 0, (1,), (1,))]
    expect_error(legacy_file(conflict, {"0": SIX}), "describes storage '0' in two ways")
    huge = tensor(storage(2**60), 0, (2**60,), (1,))
    expect_error(legacy_file(huge, {"0": SIX}), "truncated")
    negative = GOOD.replace(struct.pack("<q", 6), struct.pack("<q", -6))
    expect_error(negative, "does not have the length")


def test_every_truncation_is_an_error() -> None:
    for length in range(len(GOOD)):
        expect_error(GOOD[:length], "truncated|empty|damaged|do not match")


def test_rejects_globals() -> None:
    evil = GOOD.replace(pickle_of(VALUE), pickle_of({"x": Call("posix.system", ("touch x",))}))
    expect_error(evil, r"asks for 'posix\.system'")

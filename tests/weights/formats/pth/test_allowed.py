"""Tensors must stay within the bounds of their storages."""

from typing import Any

import numpy as np
import pytest

from tests.support.torch_files import (
    Call,
    Reference,
    Type,
    expect_error,
    read,
    storage,
    tensor,
    zip_file,
)

FOUR = {"0": np.arange(4, dtype=np.float32).tobytes()}


def test_strides_and_offsets() -> None:
    content = np.arange(12, dtype=np.float32)
    storages = {"0": content.tobytes()}
    for offset, size, stride, expected in (
        (0, (3, 4), (4, 1), content.reshape(3, 4)),
        (0, (4, 3), (1, 4), content.reshape(3, 4).T),
        (2, (2, 3), (5, 2), np.float32([[2, 4, 6], [7, 9, 11]])),
        (11, (), (), np.float32(11)),
        (0, (3, 4), (1, 1), np.float32([[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]])),
        (5, (4,), (0,), np.float32([5] * 4)),
        (
            11,
            (1, 1),
            (10**300, 7),
            np.float32([[11]]),
        ),  # strides of axes with a single element are not checked
        (0, (0, 5), (5, 1), np.zeros((0, 5), np.float32)),
        (99, (2, 0), (1, 1), np.zeros((2, 0), np.float32)),
    ):
        result = read(zip_file(tensor(storage(12), offset, size, stride), storages))
        np.testing.assert_array_equal(result, expected, strict=True)


@pytest.mark.parametrize(
    ("offset", "size", "stride", "message"),
    [
        (1, (4,), (1,), "reaches element 4 of a storage of 4"),
        (4, (), (), "reaches element 4"),
        (0, (2, 2), (3, 1), "reaches element 4"),
        (10**300, (1,), (1,), r"reaches element more than 2\*\*63"),
        (0, (2,), (10**300,), r"reaches element more than 2\*\*63"),
        (0, (5,), (0,), "5 elements on a storage of 4"),
        (0, (2**40, 2**40), (0, 0), r"more than 2\*\*63 elements on a storage of 4"),
        (-1, (1,), (1,), "not non-negative integers"),
        (3, (2,), (-1,), "not non-negative integers"),
        (0, (-1, -1), (1, 1), "not non-negative integers"),
        (0, (1,) * 17, (1,) * 17, "at most 16 axes"),
        (0, (2, 2), (1,), "not non-negative integers"),
        (0, (True,), (1,), "not non-negative integers"),
        (0, (1.0,), (1,), "not non-negative integers"),
        (None, (1,), (1,), "not non-negative integers"),
        (0, [1], [1], "not non-negative integers"),
        (0, (0, 2**62, 2**62), (1, 1, 1), "empty tensor of an invalid shape"),
    ],
)
def test_rejects_tensors_out_of_bounds(offset: Any, size: Any, stride: Any, message: str) -> None:
    expect_error(zip_file(tensor(storage(4), offset, size, stride), FOUR), message)


@pytest.mark.parametrize("numel", [-1, 3, 5, 10**300, True, 4.0, None, "4"])
def test_rejects_storages_of_wrong_sizes(numel: Any) -> None:
    value = tensor(storage(numel), 0, (1,), (1,))
    expect_error(zip_file(value, FOUR), "invalid size|or has another size")


def test_bool_bytes_must_be_0_or_1() -> None:
    value = tensor(storage(3, "Bool"), 0, (3,), (1,))
    np.testing.assert_array_equal(read(zip_file(value, {"0": b"\0\1\0"})), [False, True, False])
    expect_error(zip_file(value, {"0": b"\0\1\2"}), "a bool that is neither 0 nor 1")
    untyped = Reference(("storage", Type("torch.storage.UntypedStorage"), "0", "cpu", 3))
    value = Call(
        "torch._utils._rebuild_tensor_v3",
        (untyped, 0, (3,), (1,), False, {}, Type("torch.bool")),
    )
    expect_error(zip_file(value, {"0": b"\0\1\2"}), "damaged")

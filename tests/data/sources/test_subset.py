"""Slices of a source."""

import numpy as np
import pytest

from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("[3:7]", range(3, 7)),
        ("[:5]", range(5)),
        ("[18:]", range(18, 20)),
        ("[15:99]", range(15, 20)),
    ],
)
def test_a_slice_contains_the_images_of_its_range(part: str, expected: range) -> None:
    whole, some = open_source("shapes:20@train"), open_source("shapes:20@train" + part)
    assert len(some) == len(expected)
    assert some.spec == f"shapes:20@train[{expected.start}:{expected.stop}]"
    assert some.class_names == whole.class_names
    for index, record in enumerate(expected):
        assert some.name(index) == whole.name(record)
        assert some.label(index) == some.labels[index] == whole.label(record)
        assert some.stamp(index) == whole.stamp(record)
        np.testing.assert_array_equal(some.image(index), whole.image(record))


def test_an_empty_slice_is_rejected() -> None:
    with pytest.raises(UsageError, match=r"'shapes:20@train\[20:\]' is empty: .* the 20 images"):
        open_source("shapes:20@train[20:]")

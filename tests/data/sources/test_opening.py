"""What is wrong with a source is said in words, before anything is read."""

import pytest

from dino_jax.data.sources.opening import open_source
from dino_jax.errors import UsageError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "webdataset:/data",
            "unknown kind 'webdataset'; the kinds are folder, idx, records, shapes, tfds",
        ),
        ("shapes:", "names no location"),
        ("shapes:@train", "names no location"),
        ("", "names no location"),
        ("folder:/no/such/place", "/no/such/place is not a folder"),
        ("/no/such/place", "/no/such/place is not a folder"),
        ("folder:/no/such/place@train", "/no/such/place is not a folder"),
        ("folder:~nobody_of_that_name/x", "~nobody_of_that_name/x is not a folder; check"),
        ("idx:/no/such/place@train", "/no/such/place is not a folder"),
        ("records:/no/such/place", "there is no /no/such/place/records.json: give a folder that"),
        ("records:/no/such/place@val", "no /no/such/place/val/records.json"),
        ("idx:/tmp@validation", "@train and @test"),
        ("idx:/tmp", "@train and @test"),
        ("shapes:many", "number of pictures"),
        ("shapes:0", "number of pictures"),
        ("shapes:-4", "number of pictures"),
        ("shapes:10@dev", "there are train, val, test"),
    ],
)
def test_refusals(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(spec)

"""A wrong source is rejected, with an explanation, before anything is read."""

import pytest

from dino_jax.data.sources import open_source
from dino_jax.errors import UsageError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "webdataset:/data",
            "unknown kind 'webdataset'; choose one of folder, idx, records, shapes, tfds",
        ),
        ("shapes:", "has no location"),
        ("shapes:@train", "has no location"),
        ("", "has no location"),
        ("folder:/no/such/place", "/no/such/place is not a folder"),
        ("/no/such/place", "/no/such/place is not a folder"),
        ("folder:/no/such/place@train", "/no/such/place is not a folder"),
        (
            "folder:~nobody_of_that_name/x",
            "the home folder of ~nobody_of_that_name is unknown; give",
        ),
        ("idx:/no/such/place@train", "/no/such/place is not a folder"),
        ("records:/no/such/place", "/no/such/place/records.json does not exist: give a folder"),
        ("records:/no/such/place@val", "/no/such/place/val/records.json does not"),
        ("idx:/tmp@validation", "@train or @test"),
        ("idx:/tmp", "@train or @test"),
        ("shapes:many", "give the number of images"),
        ("shapes:0", "give the number of images"),
        ("shapes:-4", "give the number of images"),
        ("shapes:10@dev", "choose one of train, val, test"),
    ],
)
def test_wrong_sources_are_rejected(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(spec)

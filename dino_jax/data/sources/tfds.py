"""`tfds:name[/config][:version]@split`: a prepared TensorFlow Datasets set, without TensorFlow."""

import io
import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dino_jax.data.decode import open_image
from dino_jax.errors import UsageError

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

_UNKNOWN = -2  # a label that has not been read yet


class TfdsSource:
    """Encoded pictures in array_record files.

    A label lies in the same record as its picture, so it is remembered when the picture is read.
    """

    labels = None

    def __init__(self, builder: "DatasetBuilder", split: str, spec: str) -> None:
        import tensorflow_datasets as tfds

        features = dict(builder.info.features.items())
        pictures = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        if len(pictures) != 1:
            raise UsageError(
                f"source {spec!r}: one Image feature is needed, this set has {pictures or 'none'}"
            )
        self.spec = spec
        self._folder = builder.data_dir  # of one version of the set
        self._picture = pictures[0]
        has_label = isinstance(features.get("label"), tfds.features.ClassLabel)
        try:
            self._records = builder.as_data_source(
                split=split, decoders={self._picture: tfds.decode.SkipDecoding()}
            )
        except ValueError as error:
            raise UsageError(
                f"source {spec!r}: {' '.join(str(error).split())} "
                f"The splits are {', '.join(builder.info.splits)}, and slices of them"
            ) from error
        self._labels = np.full(len(self._records), _UNKNOWN, np.int32) if has_label else None
        self.class_names = tuple(features["label"].names) if has_label else None

    def __len__(self) -> int:
        return len(self._records)

    def image(self, index: int) -> Image.Image:
        return open_image(io.BytesIO(self.encoded(index)))

    def encoded(self, index: int) -> bytes:
        try:
            record = self._records[int(index)]
            if record[self._picture] is None:  # so tfds reads what has been cut off
                raise ValueError("it is empty")
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{self.name(index)} cannot be read ({reason}); {self._folder} is damaged: copy or "
                "prepare it again"
            ) from error
        if self._labels is not None:
            self._labels[index] = record["label"]
        return record[self._picture]

    def label(self, index: int) -> int:
        if self._labels is None:
            return -1
        if self._labels[index] == _UNKNOWN:
            self.encoded(index)
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self.spec} record {index}"

    def stamp(self, index: int) -> str:
        return f"{self._folder} {self.spec} {index}"


def open_tfds(location: str, split: str | None) -> TfdsSource:
    """Opens `tfds:location@split`, prepared below TFDS_DATA_DIR; see `open_source`."""
    import tensorflow_datasets as tfds  # half a second, which other kinds need not pay
    from google.protobuf.json_format import ParseError  # tfds brings it

    spec = f"tfds:{location}" + (f"@{split}" if split else "")
    data_dir = os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
    prepare = (
        "prepare it where TensorFlow is installed: "
        f"tfds build {location} --file_format=array_record --data_dir={data_dir}"
    )
    try:
        # From the files alone: never the network, and no generation code with TensorFlow.
        builder = tfds.core.read_only_builder.builder_from_files(location, data_dir=data_dir)
    except ValueError as error:  # DatasetNotFoundError is one
        raise UsageError(
            f"source {spec!r}: no prepared set of that name in {data_dir} (TFDS_DATA_DIR); "
            f"{prepare}"
        ) from error
    except ParseError as error:
        raise UsageError(
            f"source {spec!r}: dataset_info.json of the set in {data_dir} (TFDS_DATA_DIR) is "
            f"damaged ({error}); copy the set again, or {prepare}"
        ) from error
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UsageError(
            f"source {spec!r}: prepared as {', '.join(sorted(formats))}, which cannot be read in "
            f"random order; {prepare}"
        )
    if split is None:
        raise UsageError(
            f"source {spec!r} names no split; add one of "
            f"{', '.join('@' + name for name in builder.info.splits)}"
        )
    return TfdsSource(builder, split, spec)

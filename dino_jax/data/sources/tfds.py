"""`tfds:name[/config][:version]@split`: a prepared TFDS dataset, read without TensorFlow."""

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
    """Encoded images in array_record files.

    A label is stored in the same record as its image, so reading an image caches its label.
    """

    labels = None

    def __init__(self, builder: "DatasetBuilder", split: str, spec: str) -> None:
        import tensorflow_datasets as tfds

        features = dict(builder.info.features.items())
        pictures = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        if len(pictures) != 1:
            raise UsageError(
                f"source {spec!r}: the dataset must have exactly one Image feature, but has "
                f"{', '.join(pictures) or 'none'}; choose another dataset"
            )
        self.spec = spec
        self._folder = builder.data_dir  # of one version of the dataset
        self._picture = pictures[0]
        has_label = isinstance(features.get("label"), tfds.features.ClassLabel)
        try:
            self._records = builder.as_data_source(
                split=split, decoders={self._picture: tfds.decode.SkipDecoding()}
            )
        except ValueError as error:
            raise UsageError(
                f"source {spec!r}: {' '.join(str(error).split())} "
                f"Choose one of the splits {', '.join(builder.info.splits)}, or a slice of one"
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
            if record[self._picture] is None:  # as tfds reads truncated files
                raise ValueError("it is empty")
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{self.name(index)} cannot be read ({reason}): {self._folder} is damaged; copy or "
                "prepare the dataset again"
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
    """Opens `tfds:location@split`, prepared in TFDS_DATA_DIR; see `open_source`."""
    import tensorflow_datasets as tfds  # takes half a second, and other kinds do not need it
    from google.protobuf.json_format import ParseError  # a dependency of tfds

    spec = f"tfds:{location}" + (f"@{split}" if split else "")
    data_dir = os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
    prepare = (
        "prepare it on a machine with TensorFlow: "
        f"tfds build {location} --file_format=array_record --data_dir={data_dir}"
    )
    try:
        # Reads files only: no network access, and no generation code, which needs TensorFlow.
        builder = tfds.core.read_only_builder.builder_from_files(location, data_dir=data_dir)
    except ValueError as error:  # including DatasetNotFoundError
        raise UsageError(
            f"source {spec!r}: no prepared dataset of that name in {data_dir} (TFDS_DATA_DIR); "
            f"{prepare}"
        ) from error
    except ParseError as error:
        raise UsageError(
            f"source {spec!r}: dataset_info.json in {data_dir} (TFDS_DATA_DIR) is damaged "
            f"({error}); copy the dataset again, or {prepare}"
        ) from error
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UsageError(
            f"source {spec!r}: prepared as {', '.join(sorted(formats))}, which has no random "
            f"access; {prepare}"
        )
    if split is None:
        raise UsageError(
            f"source {spec!r} has no split; add one of "
            f"{', '.join('@' + name for name in builder.info.splits)}"
        )
    return TfdsSource(builder, split, spec)

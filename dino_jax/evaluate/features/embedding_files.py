"""Features written batch by batch to files of any length: `.npy` and Parquet.

Rows are never collected in memory. A file gets its name only when it is complete.

Dims: N images, B images of a batch.
"""

import contextlib
import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dino_jax.errors import UsageError
from dino_jax.evaluate.features.square_pass import Features
from dino_jax.output import whole_or_nothing

Append = Callable[[Features, Sequence[str]], None]


class NpyStream:
    """An `.npy` file that rows are appended to; use it as a context manager."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]) -> None:
        """Args: the file, and dtype and shape of a row."""
        self._dtype, self._row_shape, self._rows = np.dtype(dtype), row_shape, 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Writes rows [B, *row_shape]."""
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._rows += len(rows)

    def __enter__(self) -> "NpyStream":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        # NumPy pads the header for more digits of the first axis, so the length stays the same.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


@contextlib.contextmanager
def open_npy(path: Path, row_shape: tuple[int, ...]) -> Iterator[Append]:
    """Writes the features, and a `.csv` of the same name with row, index, label and name."""
    with (
        whole_or_nothing(path) as part,
        whole_or_nothing(names_file(path)) as table_part,
        NpyStream(part, np.float32, row_shape) as features,
        table_part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["row", "index", "label", "name"])
        row = 0

        def append(batch: Features, names: Sequence[str]) -> None:
            nonlocal row
            features.append(batch.features)
            for index, label, name in zip(batch.index, batch.labels, names, strict=True):
                writer.writerow([row, index, label, name])
                row += 1

        yield append


@contextlib.contextmanager
def open_parquet(path: Path, row_shape: tuple[int, ...]) -> Iterator[Append]:
    """Writes the columns `name`, `index`, `label` and `feature`, a list of fixed length.

    Features with several axes are flattened; the metadata `shape` has their shape.
    """
    import pyarrow as pa
    from pyarrow import parquet

    width = int(np.prod(row_shape))
    fields = {
        "name": pa.string(),
        "index": pa.int32(),
        "label": pa.int32(),
        "feature": pa.list_(pa.float32(), width),
    }
    schema = pa.schema(fields.items(), metadata={"shape": str(list(row_shape))})
    with (
        whole_or_nothing(path) as part,
        parquet.ParquetWriter(part, schema, use_dictionary=["name", "label"]) as writer,
    ):

        def append(batch: Features, names: Sequence[str]) -> None:
            values = pa.array(batch.features.astype(np.float32, copy=False).ravel())
            feature = pa.FixedSizeListArray.from_arrays(values, width)
            names = [os.fsencode(name).decode(errors="replace") for name in names]  # any bytes
            columns = [pa.array(names, pa.string()), batch.index, batch.labels, feature]
            writer.write_table(pa.table(columns, schema))

        yield append


FORMATS = {".npy": open_npy, ".parquet": open_parquet}


def names_file(path: Path) -> Path:
    """The file with the names of the images: the `.csv` of an `.npy` file, else the file itself."""
    return path.with_suffix(".csv") if path.suffix == ".npy" else path


def check_embedding_format(path: Path) -> None:
    """Raises UsageError for an unknown file extension, or if a required package is missing."""
    if path.suffix not in FORMATS:
        raise UsageError(
            f"output={path} must end in .npy (the names go to a .csv file beside it) or .parquet"
        )
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401 - half a second, which other formats need not pay
        except ImportError as error:
            raise UsageError(f"output={path}: Parquet needs pip install pyarrow") from error

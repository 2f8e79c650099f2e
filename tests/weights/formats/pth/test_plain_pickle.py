"""Pickles of plain data in every protocol, and files that must be rejected."""

import contextlib
import datetime
import io
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_jax.errors import UsageError
from dino_jax.weights.formats.pth.pickles import MAX_PICKLE_BYTES
from dino_jax.weights.formats.pth.plain_pickle import read_plain_pickle

PLAIN = {
    "names": ["all_souls_000013", "größer", ""],
    "boxes": [(136.5, -34.1, 648.5, 955.7), ()],
    "numbers": [0, 1, 255, 256, 65536, -1, 2**31, 2**70, -(2**3000), 1e300, True, False, None],
    "bytes": [b"", b"\x00\xff", b"x" * 300],
    "ordered": OrderedDict(b=1, a=2),
    "long": ["x" * 70_000],
    7: {"nested": [[], {}, (1,), (1, 2), (1, 2, 3, 4)]},
}


def read(content: bytes, folder: Path) -> Any:
    path = folder / "gnd.pkl"
    path.write_bytes(content)
    return read_plain_pickle(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    shared = ["same"]
    result = read(pickle.dumps(PLAIN | {"twice": [shared, shared]}, protocol), tmp_path)
    assert result.pop("twice") == [["same"], ["same"]]
    assert result == PLAIN
    assert [type(x) for x in result["numbers"]] == [type(x) for x in PLAIN["numbers"]]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "float16", "float64"])
def test_arrays_of_every_protocol(dtype: str, protocol: int, tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    arrays = [array, np.asfortranarray(array), array[:0], array[0, 0, 0:1], array[:, ::2], array]
    result = read(pickle.dumps([arrays, array[1, 1, 1]], protocol), tmp_path)
    for ours, theirs in zip(result[0], arrays, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert result[0][0] is result[0][-1]
    assert result[1] == array[1, 1, 1].item()


def test_text_of_python_2(tmp_path: Path) -> None:
    """Strings and arrays pickled by Python 2, in protocols 0 and 2."""
    assert read(b"(lp0\nS'a_1'\np1\naI01\naL5L\naF0.5\na.", tmp_path) == ["a_1", True, 5, 0.5]
    array = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x00\xff\xfftb."
    )
    np.testing.assert_array_equal(read(array, tmp_path), np.array([1, -1], np.int16))


class Command:
    """Its pickle calls `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_rejects_code_by_name_without_running_it(protocol: int, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    content = pickle.dumps({"imlist": ["a"], "gnd": Command(f"touch {proof}")}, protocol)
    with pytest.raises(UsageError, match=r"gnd\.pkl: it asks for '(posix|nt)\.system'.*nothing"):
        read(content, tmp_path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (datetime.date(2020, 1, 1), r"asks for 'datetime\.date'"),
        (np.array(["text"]), "not a number"),
        (np.array([None, {}], object), "not a number"),
        (np.arange(3).astype(">i4"), "big-endian"),
        (range, r"asks for '(builtins|__builtin__)\.\w*range'"),
        ({(1, 2): 3}, "dict with a key of type tuple"),
        (np.ndarray, "bare global"),
    ],
)
def test_rejects_more_than_plain_data(value: Any, message: str, tmp_path: Path) -> None:
    for protocol in (2, 4):
        with pytest.raises(UsageError, match=message):
            read(pickle.dumps(value, protocol), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!doctype html><p>404",
        b"\x80\x04.",
        b"\x80\x02(K\x01.",
        b"\x80\x02N",
        b"\x80\x02U\x00Q.",
        b"\x80\x02K\x00\x85b.",
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
        b"(iposix\nsystem\n.",
        b"(K\x01d.",
    ],
)
def test_rejects_damaged_and_other_files(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"damaged or not a pickle of plain data|opcode INST"):
        read(content, tmp_path)


@pytest.mark.parametrize(
    ("shape", "content"),
    [
        ((2**62, 4), b""),
        ((2**62, 4, 0), b""),
        ((1,) * 70, b"\0\0"),
        ((-1, -1), b"\0\0"),
        ((2,), b"\0\0"),
        ((True,), b"\0\0"),
    ],
)
def test_rejects_invalid_shapes(shape: tuple[int, ...], content: bytes, tmp_path: Path) -> None:
    """For some of these shapes, NumPy would raise MemoryError."""
    array = np.empty(0, np.int16)
    blank, arguments, _ = array.__reduce__()
    state = (1, shape, array.dtype, False, content)
    written = io.BytesIO()
    pickler = pickle.Pickler(written, 2)
    pickler.dispatch_table = {np.ndarray: lambda _: (blank, arguments, state)}
    pickler.dump(array)
    with pytest.raises(UsageError, match="damaged or not a pickle of plain data"):
        read(written.getvalue(), tmp_path)


def test_every_damage_raises_our_error(tmp_path: Path) -> None:
    """After changing or removing any bytes, reading gives plain data or raises our error."""
    generator = random.Random(0)
    value = [{"easy": np.arange(5), "bbx": [1.5, 2]}, ("a", b"b"), np.float32(3)]
    for protocol in (0, 2, 4, 5):
        whole = pickle.dumps(value, protocol)
        for _ in range(300):
            content = bytearray(whole[: generator.randrange(1, len(whole) + 1)])
            content[generator.randrange(len(content))] = generator.randrange(256)
            with contextlib.suppress(UsageError):
                read(bytes(content), tmp_path)


def test_rejects_oversized_files(tmp_path: Path) -> None:
    lists = b"\x80\x02]q\x00" + b"(" + b"h\x00" * 10 + b"e."
    with pytest.raises(UsageError, match="nested deeper"):
        read(lists, tmp_path)
    megabyte = b"B" + (2**20).to_bytes(4, "little") + bytes(2**20) + b"q\x01"
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1K\x00K\x01\x87Rq\x02"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    state = b"(K\x01J\x00\x00\x10\x00\x85h\x02\x89h\x01tb"
    with pytest.raises(UsageError, match="expands to far more"):
        read(b"\x80\x03" + megabyte + dtype + b"]" + (array + state + b"a") * 9 + b".", tmp_path)
    with pytest.raises(UsageError, match="but at most"):
        read(bytes(MAX_PICKLE_BYTES + 1), tmp_path)
    with pytest.raises(UsageError, match=r"cannot be read: No such file"):
        read_plain_pickle(tmp_path / "none.pkl")

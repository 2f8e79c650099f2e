"""Zip archives that are valid, damaged, repacked or hostile."""

import io
import struct
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from dino_jax.weights.formats.pth import zip
from tests.support.torch_files import (
    archive,
    expect_error,
    read,
    storage,
    tensor,
    with_checksums,
    zip_file,
)

FOUR = np.arange(4, dtype=np.float32)
VALUE = {"w": tensor(storage(4), 0, (4,), (1,))}
GOOD = zip_file(VALUE, {"0": FOUR.tobytes()})

END = GOOD.rindex(b"PK\x05\x06")
DIRECTORY = GOOD.index(b"PK\x01\x02")


def patched(at: int, layout: str, *values: int, of: bytes = GOOD) -> bytes:
    content = bytearray(of)
    struct.pack_into(layout, content, at, *values)
    return bytes(content)


def entry_of(name: bytes) -> int:
    return GOOD.index(name, DIRECTORY) - 46


def test_archive() -> None:
    np.testing.assert_array_equal(read(GOOD)["w"], FOUR, strict=True)


def test_older_archives_have_no_byteorder() -> None:
    with zipfile.ZipFile(io.BytesIO(GOOD)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    del members["archive/byteorder"]
    np.testing.assert_array_equal(read(archive(members))["w"], FOUR)


def test_zip64() -> None:
    """The zip64 records of files above 4 GiB, here with small numbers."""
    at, size = entry_of(b"archive/data/0"), FOUR.nbytes
    header = struct.unpack_from("<I", GOOD, at + 42)[0]
    wide = struct.pack("<2H3Q", 1, 24, size, size, header)
    other = struct.pack("<2H4s", 0x5455, 4, b"time")
    content = bytearray(GOOD[:END])
    struct.pack_into("<2I", content, at + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", content, at + 30, len(other + wide))
    struct.pack_into("<I", content, at + 42, 0xFFFFFFFF)
    name_end = at + 46 + len("archive/data/0")
    content[name_end:name_end] = other + wide
    number, length = struct.unpack_from("<HI", GOOD, END + 10)
    length += len(other + wide)
    end64 = struct.pack(
        "<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, number, number, length, DIRECTORY
    )
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(content), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, *[0xFFFFFFFF] * 2, 0)
    file = bytes(content) + end64 + locator + end
    np.testing.assert_array_equal(read(file)["w"], FOUR)
    truncated_field = bytearray(file)
    struct.pack_into("<H", truncated_field, name_end + len(other) + 2, 8)
    expect_error(bytes(truncated_field), "compressed|damaged")
    far = file.replace(locator, struct.pack("<4sIQI", b"PK\x06\x07", 0, 2**63, 1))
    expect_error(far, "zip structure is damaged")
    wrong = file.replace(end64, b"XX" + end64[2:])
    expect_error(wrong, "zip structure is damaged")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../evil",
        "archive/../../evil",
        "archive/./data/0",
        "archive//data/0",
        "archive/data/",
        "archive\\data\\0",
        "archive/da\nta/0",
        "archive/\x1b[2J",
    ],
)
def test_rejects_unsafe_names(name: str) -> None:
    expect_error(zip_file(VALUE, {"0": FOUR.tobytes()}, {name: b"x"}), "unsafe name")


def test_rejects_names_that_are_not_text_or_not_unique() -> None:
    expect_error(
        GOOD.replace(b"archive/version", b"archive/\xff\xff\xff\xff\xff\xff\xff"), "unsafe"
    )
    twice = zip_file(VALUE, {"0": FOUR.tobytes(), "1": b""}).replace(b"data/1", b"data/0")
    expect_error(twice, "zip structure is damaged")


def test_rejects_compressed_and_encrypted_members() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10**7))
    expect_error(stream.getvalue(), "compressed or encrypted")
    at = entry_of(b"archive/data/0")
    expect_error(patched(at + 8, "<H", 1), "compressed or encrypted")
    expect_error(patched(at + 10, "<H", 8), "compressed or encrypted")
    expect_error(patched(at + 24, "<I", 10**9), "compressed or encrypted")


def test_rejects_members_that_share_bytes() -> None:
    """With many names for the same bytes, a small file could take long to read."""
    count, size = 200, 2**16
    value = {str(i): tensor(storage(size, "Byte", str(i)), 0, (size,), (1,)) for i in range(count)}
    separate = zip_file(value, {str(i): bytes(size if i == 0 else 0) for i in range(count)})
    content = bytearray(separate)
    at = separate.index(b"archive/data/0", separate.index(b"PK\x01\x02")) - 46
    crc_and_sizes = separate[at + 16 : at + 28]
    for i in range(1, count):
        at = separate.index(f"archive/data/{i}PK".encode(), separate.index(b"PK\x01\x02")) - 46
        content[at + 16 : at + 28] = crc_and_sizes
    expect_error(bytes(content), "zip structure is damaged")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (zip_file(VALUE, {"0": b""}), "missing from the archive or has another"),
        (zip_file(VALUE, {"1": FOUR.tobytes()}), "storage '0' .* missing from the archive"),
        (
            zip_file(VALUE, {"0": FOUR.tobytes() + b"x"}),
            "missing from the archive or has another",
        ),
        (zip_file(tensor(storage(4, key="../version"), 0, (4,), (1,))), "missing from the archive"),
        (zip_file(tensor(storage(4, key=0), 0, (4,), (1,))), "damaged"),
        (zip_file(VALUE, {}, {"archive/byteorder": b"big"}), "big-endian"),
        (zip_file(1, {}, {"archive/code/__torch__.py": b"def f(): pass"}), "TorchScript"),
        (zip_file(1, {}, {"archive/constants.pkl": b""}), "TorchScript"),
        (zip_file(1, {}, {"other/data.pkl": b""}), r"exactly one FOLDER/data\.pkl"),
        (GOOD.replace(b"data.pkl", b"data.bin"), r"exactly one FOLDER/data\.pkl"),
        (zip_file(1, {}).replace(b"archive/", b"archi/e/"), r"exactly one FOLDER/data\.pkl"),
        (GOOD + b"\n", "bytes are missing or were appended"),
        (GOOD[:-1], "bytes are missing or were appended"),
        (patched(END + 10, "<H", 0), "damaged"),
        (patched(END + 10, "<H", 3), "damaged"),
        (patched(END + 10, "<H", 5), "damaged"),
        (patched(END + 12, "<I", 0), "damaged"),
        (patched(END + 12, "<I", 2**32 - 1), "damaged"),
        (patched(END + 16, "<I", 0), "damaged"),
        (patched(END + 16, "<I", 2**32 - 1), "damaged"),
        (patched(entry_of(b"archive/data/0") + 16, "<I", 0), "checksum"),
        (patched(entry_of(b"archive/data/0") + 28, "<H", 2**16 - 1), "damaged|unsafe"),
        (patched(entry_of(b"archive/data/0") + 42, "<I", 1), "damaged"),
        (patched(entry_of(b"archive/data/0") + 42, "<I", 2**31), "damaged"),
        (patched(entry_of(b"archive/data/0") + 42, "<I", 0), "damaged"),
        (patched(GOOD.index(b"archive/data/0") - 2, "<H", 2**16 - 1), "damaged"),
        (patched(GOOD.index(b"archive/data/0"), "<B", 65), "damaged"),
    ],
)
def test_rejects_archives(file: bytes, message: str) -> None:
    expect_error(file, message)


def test_limits_the_number_of_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip, "MAX_MEMBERS", 3)
    expect_error(GOOD, "it has 4 members, but at most 3 are allowed")


def changes() -> list[Callable[[bytes], bytes]]:
    return [
        lambda file: file.replace(b"FloatStorage", b"FloatStorag\xff"),
        lambda file: file.replace(b"_rebuild_tensor_v2", b"_rebuild_qtensor12"),
    ]


@pytest.mark.parametrize("change", changes())
def test_rejects_damaged_pickles_with_valid_checksums(change: Callable[[bytes], bytes]) -> None:
    expect_error(change(GOOD), "checksum")
    expect_error(with_checksums(change(GOOD)), "damaged|refused|quantised")

"""Whole files: fixtures written by torch, files that torch writes in the test, other files."""

import argparse
import bz2
import collections
import gzip
import io
import lzma
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dino_jax.errors import TorchFileError
from dino_jax.weights.formats.pth.file import read_torch_file
from tests.conftest import parity_cases
from tests.support.torch_files import (
    archive,
    expect_error,
    legacy_file,
    read,
    storage,
    tensor,
    zip_file,
)

FIXTURES = parity_cases("pth/*.pth")
BAD_NAMES = ("evil", "truncated")


def assert_same(ours: Any, theirs: Any) -> None:
    """Compares our plain data with the result of torch.load, including types and bytes."""
    torch = pytest.importorskip("torch")
    match theirs:
        case torch.Tensor():
            assert isinstance(ours, np.ndarray)
            assert f"torch.{ours.dtype.name}" == str(theirs.dtype)
            assert ours.shape == tuple(theirs.shape)
            content = theirs.detach().contiguous().reshape(-1).view(torch.uint8)
            assert ours.tobytes() == content.numpy().tobytes()
        case argparse.Namespace():
            assert_same(ours, vars(theirs))
        case dict():
            assert type(ours) is dict
            assert list(ours) == list(theirs)
            for key in theirs:
                assert_same(ours[key], theirs[key])
        case list() | tuple():
            assert type(ours) is (list if isinstance(theirs, list) else tuple)
            assert len(ours) == len(theirs)
            for mine, other in zip(ours, theirs, strict=True):
                assert_same(mine, other)
        case torch.device() | torch.dtype():
            assert ours == str(theirs)
        case np.generic():
            assert_same(ours, theirs.item())
        case _:
            assert type(ours) is type(theirs)
            assert ours == theirs


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_fixtures_equal_what_torch_loads(path: Path) -> None:
    torch = pytest.importorskip("torch")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            theirs = torch.load(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):
        assert path.name.startswith(BAD_NAMES)
        with pytest.raises(TorchFileError):
            read_torch_file(path)
    else:
        assert_same(read_torch_file(path), theirs)


def test_fixtures_agree_with_each_other(goldens: Path) -> None:
    full, backbone, legacy, half, bfloat16, views = (
        read_torch_file(goldens / "pth" / f"{name}.pth")
        for name in (
            "full_checkpoint",
            "backbone",
            "backbone_legacy",
            "backbone_fp16",
            "backbone_bf16",
            "views",
        )
    )
    expected = np.load(goldens / "pth" / "expected.npz")
    np.testing.assert_array_equal(full["dino_loss"]["center"], expected["center"])
    assert full["args"]["global_crops_scale"] == (0.4, 1.0)
    assert type(full["args"]) is dict
    assert list(legacy) == list(half) == list(bfloat16) == list(backbone)
    for key, array in backbone.items():
        np.testing.assert_array_equal(full["teacher"][f"backbone.{key}"], array, strict=True)
        np.testing.assert_array_equal(legacy[key], array, strict=True)
        np.testing.assert_array_equal(half[key], array.astype(np.float16), strict=True)
        np.testing.assert_array_equal(bfloat16[key], array.astype(ml_dtypes.bfloat16), strict=True)
    whole = np.arange(24, dtype=np.float32)
    np.testing.assert_array_equal(views["a"], whole[4:16].reshape(3, 4).T, strict=True)
    np.testing.assert_array_equal(views["b"], whole[16:], strict=True)
    np.testing.assert_array_equal(views["c"], whole, strict=True)


def test_rejects_code_without_running_it(
    goldens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the file would create `dino_jax_pwned` here
    with pytest.raises(
        TorchFileError, match=r"evil.pth: .* asks for 'posix.system'.*torch\.save\("
    ):
        read_torch_file(goldens / "pth" / "evil.pth")
    assert not list(tmp_path.iterdir())


def test_every_truncation_is_an_error(goldens: Path) -> None:
    content = (goldens / "pth" / "views.pth").read_bytes()
    for length in range(len(content)):
        expect_error(content[:length], "bytes are missing|truncated|an empty file")
    expect_error((goldens / "pth" / "truncated.pth").read_bytes(), "bytes are missing")


class Plain:
    """A class, which readers of plain data must reject."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reads_what_torch_writes(tmp_path: Path, zipped: bool) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    with_state = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with_state.note = "an attribute"
    value = {
        "dtypes": [
            torch.arange(7).to(dtype)
            for dtype in (
                torch.float64,
                torch.float32,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int32,
                torch.int16,
                torch.int8,
                torch.uint8,
                torch.bool,
            )
        ],
        "strides": (base.view(4, 6).T, base.view(2, 3, 4)[:, 1:, ::2], base[3:9].view(2, 3)),
        "shapes": [torch.tensor(2.5), torch.zeros(0, 5), torch.ones(1, 1, 1), torch.zeros(0)],
        "model": module.state_dict(),
        "parameters": [parameter, with_state],
        "optimizer": optimizer.state_dict(),
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "args": argparse.Namespace(lr=5e-4, seed=0, tags=["x"], inner=argparse.Namespace(k=1)),
        "torch": [torch.Size([2, 3]), torch.device("cuda", 1), torch.device("cpu"), torch.float32],
        "numpy": [np.float64(0.1), np.float32(0.5), np.int64(-3), np.bool_(True)],
        "numbers": [0, 255, 256, -1, 2**31, -(2**63), 2**200, 0.5, float("inf"), True, None],
        "bytes": [b"", b"\x00\xff"],
        "texts": ["", "é€😀", "\n\x00"],
        "nested": {1: [(), [], {}, ((1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))]},
    }
    value["shared"] = [value["nested"], value["nested"]]
    path = tmp_path / "file.pth"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    # The NumPy scalars and the namespaces are the reason why torch needs weights_only=False.
    assert_same(read_torch_file(path), torch.load(path, weights_only=False))


def test_untyped_storages(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "file.pth"
    torch.save([torch.tensor([1, 2, 60000]).to(torch.uint16)[1:]], path)
    np.testing.assert_array_equal(read_torch_file(path)[0], np.uint16([2, 60000]), strict=True)


def test_rejects_unsupported_values(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "file.pth"
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    for value, message in (
        (torch.ones(2, dtype=torch.complex64), "complex numbers"),
        (torch.ones(2, 2).to_sparse(), "sparse tensors"),
        (torch.ones(2, device="meta"), "without values"),
        (torch.ones(2).to(torch.float8_e4m3fn), "8-bit floating-point numbers"),
        (torch.nn.Linear(1, 1), r"torch\.save\(model\.state_dict\(\), FILE\)"),
        (torch.zeros(1).expand(5), "expanded"),
        (negated, "complex numbers|negation"),
        (torch.nn.Linear(2, 2), "asks for 'torch.nn.modules.linear.Linear'.*nothing in it was run"),
        (torch.zeros(2).untyped_storage(), "bare storage"),
        (Plain(), "asks for '.*Plain'"),
        (np.zeros(3), "asks for 'numpy.*_reconstruct'"),
        ({(1, 2): 3}, "key of type tuple"),
        (2**3000, "opcode"),
    ):
        torch.save(value, path)
        with pytest.raises(TorchFileError, match=message):
            read_torch_file(path)
    torch.save([1], path, pickle_protocol=4)
    with pytest.raises(TorchFileError, match="protocol 2"):
        read_torch_file(path)


def test_tensors_are_views_of_the_file() -> None:
    content = np.arange(6, dtype=np.float32)
    for file in (
        zip_file(
            [tensor(storage(6), 0, (2, 3), (3, 1)), tensor(storage(6), 3, (3,), (1,))],
            {"0": content.tobytes()},
        ),
        legacy_file(
            [tensor(storage(6), 0, (2, 3), (3, 1)), tensor(storage(6), 3, (3,), (1,))],
            {"0": content},
        ),
    ):
        whole, part = read(file)
        np.testing.assert_array_equal(whole, content.reshape(2, 3))
        assert np.shares_memory(whole[1], part)
        assert not whole.flags.writeable


def test_reading_allocates_no_tensor(tmp_path: Path) -> None:
    content = np.zeros((2**12, 2**11), np.float32)
    content[5, 7] = 1
    value = {"w": tensor(storage(content.size), 0, content.shape[::-1], (1, 2**11))}
    for name, file in (
        ("zip.pth", zip_file(value, {"0": content.tobytes()})),
        ("legacy.pth", legacy_file(value, {"0": content})),
    ):
        (tmp_path / name).write_bytes(file)
        tracemalloc.start()
        try:
            array = read_torch_file(tmp_path / name)["w"]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        np.testing.assert_array_equal(array, content.T)
        assert peak < 0.3 * content.nbytes


def test_rejects_a_flipped_bit(goldens: Path) -> None:
    content = bytearray((goldens / "pth" / "views.pth").read_bytes())
    storage_at = content.find(np.arange(24, dtype=np.float32).tobytes())
    content[storage_at + 50] ^= 1
    expect_error(bytes(content), r"checksum of 'views/data/0' differs")


def compressed(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, bytes(1000))
    return stream.getvalue()


def npz(save: Callable[..., None]) -> bytes:
    stream = io.BytesIO()
    save(stream, a=np.arange(100), b=np.zeros(100))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page, not weights"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        ((32).to_bytes(8, "little") + b'{"w":{"dtype":"F32"}}', "a safetensors file"),
        (b"tensors" + bytes(250) + b"ustar" + bytes(600), "a tar archive, the format of torch 0.1"),
        (b"PK", "truncated after a few bytes"),
        (b"\x80\x02\x8a\x0al", "truncated after a few bytes"),
        (pickle.dumps({"w": 1}, protocol=2), "a pickle that torch.save did not write"),
        (pickle.dumps({"w": 1}), "a pickle that torch.save did not write"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file, not written by torch.save"),
        (gzip.compress(bytes(100)), "a gzip archive, .*; unpack it first"),
        (bz2.compress(bytes(100)), "a bzip2 archive, .*; unpack it first"),
        (lzma.compress(bytes(100)), "an xz archive, .*; unpack it first"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "a NumPy array, .*; give the .pth file"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0" + bytes(100), "an ONNX file"),
        (b'{"model_type": "dinov2"}', "a JSON file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "an image"),
        (compressed("m/code/x.py"), "a TorchScript archive"),
        (npz(np.savez), r"a NumPy \.npz file; give the"),
        (npz(np.savez_compressed), r"a NumPy \.npz file; give the"),
        (archive({"weights.pth": b"x"}), r"a zip archive .*; unpack it if it contains the \.pth"),
        (b"weights" + bytes(100), "not written by torch.save: it starts with"),
        (bytes(100), "not written by torch.save"),
    ],
)
def test_rejects_other_file_formats(content: bytes, message: str) -> None:
    expect_error(content, message)


def test_rejects_paths(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "none.pth", "none.pth: no such file; check the path"),
        (str(tmp_path), "a folder or a device"),
        (tmp_path / "pipe", "a folder or a device"),
        ("x" * 5000, "it cannot be read: .*too long"),
    ):
        with pytest.raises(TorchFileError, match=message):
            read_torch_file(path)

"""Changes `.pth` files at random. Reading them must give plain data or our error, and run no code.

python -m tests.support.fuzz_torch_file --seconds=60 --seed=1
"""

import argparse
import contextlib
import io
import itertools
import pickletools
import random
import struct
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dino_jax.errors import TorchFileError
from dino_jax.weights.formats.pth.allowed import CALLS, STORAGE_DTYPES
from dino_jax.weights.formats.pth.legacy import LEGACY_MAGIC
from tests.support.torch_files import (
    REBUILD,
    Call,
    Type,
    archive,
    legacy_file,
    opcodes,
    read,
    storage,
    tensor,
    with_checksums,
    zip_file,
)

_HARMLESS = {"open", "mmap.__new__", "tempfile.mkstemp", "os.remove", "builtins.id"}
_EXTREME = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63]
_watching = False
"".encode("raw-unicode-escape")  # pickletools uses this codec, which Python imports on first use


def _audit(event: str, arguments: tuple) -> None:
    if _watching and event not in _HARMLESS:
        raise AssertionError(f"reading a file raised the audit event {event} {arguments}")


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """A context manager in which imports, exec, processes and other audited events are errors."""
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False


sys.addaudithook(_audit)


def reads_or_refuses(content: bytes) -> bool:
    """Whether the bytes can be read; fails on any exception but our own."""
    try:
        with nothing_runs():
            value = read(content)
    except TorchFileError as error:
        message = str(error)
    else:
        touch(value)
        return True
    assert message.isprintable()
    assert len(message) < 2000
    return False


def touch(value: Any) -> None:
    """Traverses plain data and reads the first and last element of every array."""
    match value:
        case dict():
            for key, item in value.items():
                assert type(key) in (str, int)
                touch(item)
        case list() | tuple():
            for item in value:
                touch(item)
        case np.ndarray():
            if value.size:
                first, last = value[(0,) * value.ndim], value[(-1,) * value.ndim]
                assert first.dtype == last.dtype == value.dtype
        case _:
            assert type(value) in (str, int, float, bool, bytes, type(None))


def small_files() -> list[bytes]:
    """Small files that together cover every supported feature."""
    array = np.arange(6, dtype=np.float32)
    value = {
        "model": Call("collections.OrderedDict", (), {"_metadata": {}}),
        "weights": [
            tensor(storage(6), 0, (2, 3), (3, 1)),
            Call("torch._utils._rebuild_parameter", (tensor(storage(6), 1, (), ()), True, {})),
        ],
        "args": Call("argparse.Namespace", (), {"lr": 0.1, "size": Call("torch.Size", ((1, 2),))}),
        "number": Call(
            "numpy.core.multiarray.scalar",
            (Call("numpy.dtype", ("i1", False, True)), Call("_codecs.encode", ("a", "latin1"))),
        ),
        1: ("text", 2**70, None, True, Type("torch.float32"), Call("torch.device", ("cpu",))),
    }
    window = storage(6, "Float", "0", ("1", 1, 3))
    return [
        zip_file(value, {"0": array.tobytes()}),
        legacy_file(value, {"0": array}),
        legacy_file([tensor(window, 1, (2,), (1,))], {"0": array}),
    ]


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips bits, inserts extreme numbers, and cuts, moves or repeats chunks."""
    result = bytearray(content)
    # Pickles and directories are at the ends; the middle is mostly numbers.
    places = [rng.randrange(len(result)), len(result) - 1 - rng.randrange(min(4000, len(result)))]
    places.append(rng.randrange(min(4000, len(result))))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = min(rng.choice(places) + rng.randrange(16), max(len(result) - 1, 0))
        match rng.randrange(7):
            case 0 if result:
                result[at] ^= 1 << rng.randrange(8)
            case 1 if result:
                result[at] = rng.randrange(256)
            case 2:
                layout = rng.choice(["<B", "<H", "<I", "<Q"])
                number = rng.choice(_EXTREME) % 2 ** (8 * struct.calcsize(layout))
                result[at : at + struct.calcsize(layout)] = struct.pack(layout, number)
            case 3:
                del result[at:]
            case 4:
                del result[at : at + rng.randrange(1, 40)]
            case 5:
                result[at:at] = rng.randbytes(rng.randrange(1, 40))
            case 6:
                source = rng.randrange(len(result) + 1)
                result[at:at] = result[source : source + rng.randrange(1, 200)]
    return bytes(result)


def random_opcode(rng: random.Random) -> bytes:
    """A random opcode with an argument, or the opcodes of a value."""
    names = [*CALLS, *STORAGE_DTYPES, "os.system", "builtins.eval", "torch.float32"]
    match rng.randrange(6):
        case 0 | 1:
            return rng.choice(pickletools.opcodes).code.encode("latin1") + rng.choice(
                [b"", b"\x00", rng.randbytes(1), rng.randbytes(4), b"\xff" * 8]
            )
        case 2:
            return opcodes(Type(rng.choice(names)))
        case 3:
            return rng.choice([b"h", b"q"]) + bytes([rng.randrange(8)])
        case 4:
            number = rng.choice(_EXTREME)
            return opcodes(rng.choice([number, -number, (number,), (0, number), str(number)]))
        case _:
            size = rng.choice([(), (2, 3), (rng.choice(_EXTREME), 0), (6,)])
            return opcodes(
                rng.choice(
                    [
                        storage(rng.choice([6, 0, 7])),
                        tensor(storage(6), rng.choice(_EXTREME), size, size[::-1]),
                        Call(REBUILD, (storage(6), 0, size, size)),
                        Call(rng.choice(names), (size,)),
                        Call(rng.choice(names), (), {"a": 1}),
                    ]
                )
            )


def changed_opcodes(pickle: bytes, rng: random.Random) -> bytes:
    """Removes, repeats, moves and inserts opcodes of a pickle."""
    starts = [position for _, _, position in pickletools.genops(pickle)] + [len(pickle)]
    parts = [pickle[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        at = rng.randrange(1, len(parts))
        match rng.randrange(5):
            case 0:
                parts[at : at + rng.choice([1, 1, 3])] = []
                parts = parts if len(parts) > 1 else [*parts, b"."]
            case 1:
                parts.insert(at, rng.choice(parts))
            case 2:
                other = rng.randrange(1, len(parts))
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts.insert(at, random_opcode(rng))
            case 4:
                parts[at] = random_opcode(rng)
    return b"".join(parts)


def changed(content: bytes, rng: random.Random) -> bytes:
    """A file with changed bytes, with changed bytes and valid checksums, or changed opcodes."""
    way = rng.randrange(4)
    if way == 0:
        return changed_bytes(content, rng)
    if content.startswith(LEGACY_MAGIC):
        body = content[len(LEGACY_MAGIC) :]
        if way == 1:
            return LEGACY_MAGIC + changed_bytes(body, rng)
        ends = []  # of the pickles of version, machine and object
        for _ in range(3):
            start = ends[-1] if ends else 0
            *_, (_, _, last) = pickletools.genops(body[start:])
            ends.append(start + last + 1)
        pickle = changed_opcodes(body[ends[1] : ends[2]], rng)
        return LEGACY_MAGIC + body[: ends[1]] + pickle + body[ends[2] :]
    if way == 1:
        try:
            return with_checksums(changed_bytes(content, rng))
        except (struct.error, IndexError):  # the change broke the directory
            return changed_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    pickle = next(name for name in members if name.endswith("/data.pkl"))
    return archive({**members, pickle: changed_opcodes(members[pickle], rng)})


def main() -> None:
    """Fuzzes for some time and prints the number of files and the slowest time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = Path(__file__).parents[1] / "goldens" / "pth"
    seeds = small_files() * 4 + [path.read_bytes() for path in sorted(folder.glob("*.pth"))]
    seeds = [content for content in seeds if reads_or_refuses(content)]
    number = readable = 0
    slowest = 0.0
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        content = changed(rng.choice(seeds), rng)
        start = time.monotonic()
        try:
            readable += reads_or_refuses(content)
        except BaseException:
            Path(f"fuzz_{options.seed}_{number}.pth").write_bytes(content)  # for inspection
            raise
        slowest = max(slowest, time.monotonic() - start)
        number += 1
    print(f"seed {options.seed}: {number} files, {readable} readable, slowest {slowest:.3f} s")


if __name__ == "__main__":
    main()

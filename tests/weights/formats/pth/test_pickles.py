"""Pickles that are damaged, oversized or hostile."""

import struct
import tracemalloc

import numpy as np
import pytest

from dino_jax.weights.formats.pth import allowed, pickles
from tests.support.torch_files import (
    REBUILD,
    Call,
    Opcodes,
    Reference,
    Type,
    expect_error,
    opcodes,
    pickle_of,
    read,
    storage,
    tensor,
    zip_file,
)

FOUR = {"0": np.arange(4, dtype=np.float32).tobytes()}


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


# Accepted


def test_plain_data() -> None:
    namespace = Call("argparse.Namespace", (), {"lr": 0.1, "names": ["a"]})
    ordered = Call("collections.OrderedDict", (), {"_metadata": {"version": 1}})
    of_python_2 = Call("collections.OrderedDict", ([["b", 1], ["a", 2]],))
    dtype = Call("numpy.dtype", ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    number = Call("_codecs.encode", (struct.pack("<d", 0.5).decode("latin1"), "latin1"))
    value = {
        "namespace": namespace,
        "ordered": [ordered, of_python_2],
        "numpy": Call("numpy.core.multiarray.scalar", (dtype, number)),
        "bytes": [Call("__builtin__.bytes"), Call("_codecs.encode", ("\xff", "latin1"))],
        "torch": [Call("torch.Size", ((2, 3),)), Call("torch.device", ("cuda", 1))],
        "dtype": Type("torch.bfloat16"),
        "python 2": [Opcodes(b"U\x02ab"), Opcodes(b"T\x02\x00\x00\x00cd")],
        "numbers": [Opcodes(b"K\x07"), Opcodes(b"M\x01\x02"), -5, 2**100, 1.5, True, None],
        "tuples": (Opcodes(b")"), Opcodes(b"N\x85"), Opcodes(b"NN\x86"), Opcodes(b"NNN\x87")),
        "one by one": [Opcodes(b"]Na"), Opcodes(b"}K\x01Ns")],
        7: Opcodes(b"]q\x05h\x05\x86"),
    }
    expected = {
        "namespace": {"lr": 0.1, "names": ["a"]},
        "ordered": [{}, {"b": 1, "a": 2}],
        "numpy": 0.5,
        "bytes": [b"", b"\xff"],
        "torch": [(2, 3), "cuda:1"],
        "dtype": "torch.bfloat16",
        "python 2": ["ab", "cd"],
        "numbers": [7, 513, -5, 2**100, 1.5, True, None],
        "tuples": ((), (None,), (None, None), (None, None, None)),
        "one by one": [[None], {1: None}],
        7: ([], []),
    }
    result = read(zip_file(value))
    assert result == expected
    assert list(result) == list(expected)
    assert type(result["namespace"]) is type(result["ordered"][0]) is dict
    assert result[7][0] is result[7][1]


def test_every_rebuild_function() -> None:
    four = np.arange(4, dtype=np.float32)
    whole = tensor(storage(4), 0, (4,), (1,))
    for value in (
        Call("torch._utils._rebuild_tensor", (storage(4), 0, (4,), (1,))),
        Call(REBUILD, (storage(4), 0, (4,), (1,), True, {}, {})),
        Call(
            "torch._utils._rebuild_tensor_v3",
            (
                Reference(("storage", Type("torch.storage.UntypedStorage"), "0", "cpu", 16)),
                *(0, (4,), (1,), False, {}, Type("torch.float32")),
            ),
        ),
        Call("torch._utils._rebuild_parameter", (whole, True, {})),
        Call("torch._utils._rebuild_parameter_with_state", (whole, True, {}, {"note": "x"})),
        Call("torch.nn.parameter.Parameter", (whole, True), (True, False, {})),
        Opcodes(opcodes(Type("torch.nn.parameter.Parameter")) + opcodes((whole,)) + b"\x81"),
    ):
        np.testing.assert_array_equal(read(zip_file(value, FOUR)), four, strict=True)


# Rejected


def test_allow_list_is_closed() -> None:
    assert {f.__module__ for f in allowed.CALLS.values()} == {allowed.__name__}
    for module in (pickles, allowed):
        assert not {"pickle", "importlib", "builtins", "eval", "exec"} & set(vars(module))


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "builtins.getattr",
        "__builtin__.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "torch.serialization.load",
        "torch.storage._load_from_bytes",
        "pickle.loads",
        "numpy.core.multiarray._reconstruct",
        "numpy.load",
        "collections.OrderedDict.__init__",
        "argparse.Namespace.__class__",
        "argparse.ArgumentParser",
        "torch.QInt8Storage",
        "torch.ComplexFloatStorage",
        "dino_jax.weights.formats.pth.allowed._tensor",
    ],
)
def test_rejects_other_globals(name: str) -> None:
    message = name.replace(".", r"\.").replace("[", r"\[")
    for value in (Type(name), Call(name, ("echo",)), {"a": [Call(name, (), {"x": 1})]}):
        expect_error(zip_file(value, FOUR), message)


@pytest.mark.parametrize(
    "code",
    [
        *(b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"),  # registered extensions
        *(b"\x93", b"\x92", b"io\nsystem\n", b"(o"),  # STACK_GLOBAL, NEWOBJ_EX, INST, OBJ
        *(b"Pid\n", b"\x8b\xff\xff\xff\x7f", b"\x95" + b"\xff" * 8),  # PERSID, LONG4, FRAME
        *(b"\x8d" + b"\xff" * 8, b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 8, b"\x97", b"\x98"),
        *(b"\x8f", b"\x90", b"\x91", b"\x94", b"0", b"1", b"2"),  # sets, MEMOIZE, POP, DUP
        *(b"I1\n", b"L1L\n", b"F1\n", b"S'a'\n", b"Va\n", b"g0\n", b"p0\n"),  # protocol 0
        *(b"\xff", b"\x00"),
    ],
)
def test_rejects_other_opcodes(code: bytes) -> None:
    expect_error(zip_file(Opcodes(b"N" + code)), "has the opcode [A-Z]|damaged or incomplete")


def test_rejects_damaged_pickles() -> None:
    for code in (
        *(b"", b"NN", b"N(", b"(N", b"t", b"a", b"]a", b"u", b"}(Nu", b"s", b"R", b"b", b"Q"),
        *(b"h\x00", b"q\x00", b"j\xff\xff\xff\xff", b"\x85", b"N\x86", b"NN\x87", b"NR", b"N)R"),
        *(b"]N\x81", b"N}b", b"[a", b"N(e", b"](NNu", b"}(NNe", b"NQ", b")Q", b"](u", b"\x80\x02N"),
        *(b"X\xff\xff\xff\xffab", b"X\x01\x00\x00\x00\xff", b"U\xffab", b"T\xff\xff\xff\xffa"),
        *(b"\x8a\xffab", b"G\x00", b"J\x00", b"M\x00", b"K"),
        *(b"ctorch", b"ctorch\nSize", b"c\xff\n\xff\n"),
        opcodes(Call("argparse.Namespace", (), [1])),
        opcodes(Call("argparse.Namespace", (1,))),
        opcodes(Call("torch.Size", ([1],))),
        opcodes(Call("torch.Size", ((True,),))),
        opcodes(Call("torch.device", (1,))),
        opcodes(Call("torch.device", ("cpu", 1.0))),
        opcodes(Call("collections.OrderedDict", ("ab",))),
        opcodes(Call("collections.OrderedDict", ([[1]],))),
        opcodes(Call("_codecs.encode", ("a", "rot13"))),
        opcodes(Call("_codecs.encode", ("€", "latin1"))),
        opcodes(Call("numpy.dtype", ("f8",), (3,))),
        opcodes(Call("numpy.core.multiarray.scalar", ("f8", "x"))),
        opcodes(Call("torch._utils._rebuild_parameter", ({}, False, {}))),
        opcodes(Call("torch.FloatStorage", (1,))),
        opcodes(Call(REBUILD, (1, 0, (), (), False, {}))),
        opcodes(Call(REBUILD, (storage(4), 0))),
    ):
        expect_error(zip_file(b"\x80\x02" + code + b"."), "damaged or incomplete|opcode")


def test_rejects_unsupported_values() -> None:
    big = Call("numpy.dtype", ("f8", False, True), (3, ">", None, None, None, -1, -1, 0))
    for value, message in (
        (Call("numpy.dtype", ("O8", False, True)), "not a number"),
        (big, "big-endian"),
        (Call("numpy.dtype", ("f8", False, True)), "bare float64"),
        ({"a": Type("torch.FloatStorage")}, "bare global"),
        ([storage(4)], "bare storage"),
        (Reference(("module", Type("torch.Size"), "a", "b", "c")), "other than a storage"),
        (Opcodes(b"}" + opcodes((1,)) + b"Ns"), "key of type tuple"),
        (Opcodes(b"}G" + bytes(8) + b"Ns"), "key of type float"),
        (Opcodes(b"}" + opcodes(2**63) + b"Ns"), "key of type int"),
    ):
        expect_error(zip_file(value, FOUR), message)
    expect_error(zip_file(b"\x80\x04N."), "protocol 2")
    expect_error(zip_file(b"N."), "protocol 2")
    expect_error(zip_file(b""), "damaged or incomplete")
    expect_error(zip_file(pickle_of(1)[:-1]), "damaged or incomplete")


# Pickles that would use too much memory or time


def test_rejects_a_second_pickle() -> None:
    evil = pickle_of(Call("posix.system", ("touch x",)))
    expect_error(zip_file(pickle_of(1) + evil), "bytes after its pickle")
    within = Call("torch.storage._load_from_bytes", (Call("_codecs.encode", ("x", "latin1")),))
    expect_error(zip_file({"a": within}), "files within the file")


def test_rejects_deep_and_endless_data() -> None:
    deepest = pickles.MAX_DEPTH
    assert read(zip_file(Opcodes(b"]" * deepest + b"a" * (deepest - 1))))
    for code in (
        b"]" * (deepest + 1) + b"a" * deepest,
        b")" + b"\x85" * 10**5,  # deep enough for hash, repr or == to overflow the stack
        b"]q\x00h\x00a",  # a list that contains itself
        b"}q\x00K\x00h\x00s",
        b"]" + b"q\x00h\x00\x86" * 60,  # 2**60 values, each pair shared
        b"]" + b"q\x00h\x00h\x00\x87" * 90,
    ):
        expect_error(zip_file(Opcodes(code)), "nested deeper than 100 levels or has")
    deep_key = b"})" + b"\x85" * 10**5 + b"Ns"
    expect_error(zip_file(Opcodes(deep_key)), "key of type tuple")
    deep = b")" + b"\x85" * 10**5
    for code in (  # deep values wherever arguments are compared, hashed or traversed
        deep + b"Q",
        b"(" + opcodes("storage") + deep + opcodes("0") + opcodes("cpu") + deep + b"tQ",
        opcodes(Type("numpy.dtype")) + b"(" + deep + b"tR",
        opcodes(Type("torch.device")) + b"(" + deep + b"tR",
        opcodes(Type("torch.Size")) + b"(" + deep + b"tR",
        opcodes(Type("_codecs.encode")) + b"(" + deep + deep + b"tR",
        opcodes(Type(f"{REBUILD[:-1]}3"))
        + b"("
        + opcodes(storage(4))
        + b"K\x00))NN"
        + deep
        + b"tR",
        opcodes(Call("numpy.dtype", ("f8",))) + b"(N" + deep + b"tb",
    ):
        expect_error(zip_file(Opcodes(code)), "damaged or inc|not a number|other than a")


def test_rejects_calls_that_copy_an_argument_many_times() -> None:
    text, encode = "x" * 2**20, opcodes(Type("_codecs.encode"))
    shared = opcodes((text, "latin1")) + put(0)
    bomb = b"(" + shared + (encode + get(0) + b"R") * 1000 + b"t"
    expect_error(zip_file(Opcodes(bomb)), "expands to far more")
    items = [[i, None] for i in range(10**4)]
    shared = opcodes((items,)) + put(0)
    bomb = b"(" + shared + (opcodes(Type("collections.OrderedDict")) + get(0) + b"R") * 1000 + b"t"
    expect_error(zip_file(Opcodes(bomb)), "expands to far more")
    shared = opcodes(dict(items)) + put(0)
    bomb = b"(" + shared + (opcodes(Call("argparse.Namespace")) + get(0) + b"b") * 1000 + b"t"
    expect_error(zip_file(Opcodes(bomb)), "expands to far more")


@pytest.mark.parametrize(
    ("code", "layout"),
    [
        *((b"X", "<I"), (b"T", "<I"), (b"B", "<I"), (b"\x8b", "<i")),  # BINUNICODE to LONG4
        *((b"\x8d", "<Q"), (b"\x8e", "<Q"), (b"\x96", "<Q")),  # text, bytes and bytearray
    ],
)
def test_declared_length_is_not_allocated(code: bytes, layout: str) -> None:
    length = 2**62 if layout == "<Q" else 2**31 - 1
    file = zip_file(Opcodes(code + struct.pack(layout, length) + b"x"))
    tracemalloc.start()
    try:
        expect_error(file, "damaged or incomplete near byte 0")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_rejects_a_long_pickle() -> None:
    expect_error(zip_file(b"\x80\x02" + b"N" * pickles.MAX_PICKLE_BYTES), "besides its tensors")

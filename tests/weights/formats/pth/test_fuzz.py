"""A few seconds of deterministic fuzzing; run `tests.support.fuzz_torch_file` for longer."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import fuzz_torch_file as fuzz
from tests.support.torch_files import Opcodes, zip_file

QUICK = settings(max_examples=1000, derandomize=True, database=None, deadline=None)
FILES = fuzz.small_files()


@pytest.mark.parametrize("number", range(len(FILES)), ids=["zip", "legacy", "window"])
def test_changed_files(number: int) -> None:
    rng = random.Random(number)
    assert fuzz.reads_or_refuses(FILES[number])
    results = [fuzz.reads_or_refuses(fuzz.changed(FILES[number], rng)) for _ in range(3000)]
    assert True in results  # some changes pass the first checks
    assert False in results


def test_audit_detects_code() -> None:
    with pytest.raises(AssertionError, match="audit event"), fuzz.nothing_runs():
        exec("1")  # files must not do this


@QUICK
@given(st.binary(max_size=300))
def test_any_bytes(content: bytes) -> None:
    fuzz.reads_or_refuses(content)
    fuzz.reads_or_refuses(FILES[0][:4] + content)
    fuzz.reads_or_refuses(fuzz.LEGACY_MAGIC + content)


@QUICK
@given(st.lists(st.randoms(use_true_random=False).map(fuzz.random_opcode), max_size=30))
def test_any_opcodes(parts: list[bytes]) -> None:
    fuzz.reads_or_refuses(zip_file(Opcodes(b"".join(parts)), {"0": bytes(24)}))

"""Consoles that fail."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_jax.run.log import RunLog
from dino_jax.streams import UnfailingStream
from tests.support import runs


class Broken(io.StringIO):
    """A stream that fails after some writes."""

    def __init__(self, code: int, writes: int = 0) -> None:
        super().__init__()
        self.code, self.left = code, writes

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)

    def isatty(self) -> bool:
        return True


def test_writes_and_remembers_the_failure() -> None:
    stream = UnfailingStream(broken := Broken(errno.EIO, writes=1))
    assert (stream.write("one"), stream.failure) == (3, None)
    assert stream.write("more") == 4
    assert stream.failure.errno == errno.EIO
    assert broken.getvalue() == "one"
    closed = io.StringIO()
    closed.close()
    for stream in (UnfailingStream(closed), absent := UnfailingStream(None)):
        print("text", file=stream)
        stream.flush()
    assert absent.failure is None


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    stream = UnfailingStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("caf\xe9 \udce9\n")
    stream.flush()
    assert raw.getvalue() == b"caf\\xe9 \\udce9\n"


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("writes", [0, 3])
def test_a_run_continues_without_its_console(
    code: int, writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(code, writes))
    sizes = {"steps_per_epoch": 2, "total_steps": 4, "batch_size": 8}
    with RunLog(tmp_path, resume_step=0, **sizes) as log:
        log.message("text")
        log.interval(2, {"loss": 1.0, "lr": 0.1}, seconds=1.0, data_seconds=0.0)
        log.epoch(0, {"loss": 1.0})
    assert (tmp_path / "log.txt").read_text().count("\n") == 1


def inspect(redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    file = runs.ROOT / "tests/goldens/pth/linear.pth"
    return subprocess.run(
        ["sh", "-c", f'"$0" -m dino_jax inspect "$1" {redirection}', sys.executable, file],
        cwd=runs.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">&- 2>&- <&-", 0, ""),
        (">/dev/full", 1, "error: the output cannot be written (No space left on device)"),
        ("2>/dev/full >/dev/full", 1, ""),
    ],
)  # fmt: skip
def test_jobs_without_a_console(redirection: str, code: int, error: str) -> None:
    done = inspect(redirection)
    assert (done.returncode, done.stderr.strip()) == (code, error)

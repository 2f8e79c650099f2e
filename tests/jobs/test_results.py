"""The file that a job leaves."""

import errno
import json
from pathlib import Path

import jax
import pytest

from dino_jax.jobs.results import report, table, write_results


def test_a_full_disk_leaves_the_earlier_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_results(path, "knn", {"top1": 1.5}, {"k": 3}, None)
    before = path.read_bytes()
    assert json.loads(before)["metrics"] == {"top1": 1.5}

    def full(self: Path, text: str) -> None:
        self.write_bytes(text.encode()[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_results(path, "knn", {"top1": 2.5}, {"k": 3}, None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "null"
    path.symlink_to("/dev/null")
    write_results(path, "knn", {}, {}, None)
    assert path.is_char_device()


def test_report_prints_in_order_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    arguments = {"header": ["k", "top-1 %"], "rows": [[10, "1.50"]], "notes": ["a note"]}
    arguments |= {"unreadable": {"shapes:5": 2, "shapes:9": 0}}
    report(path, "knn", {"top1": 1.5}, {"k": 10}, None, **arguments)
    assert capsys.readouterr().out.splitlines() == [
        " k  top-1 %",
        "10     1.50",
        "a note",
        "unreadable images of shapes:5, skipped: 2",
    ]
    assert json.loads(path.read_text())["job"] == "knn"
    path.unlink()
    monkeypatch.setattr(jax, "process_index", lambda: 1)  # another process of the same job
    report(path, "knn", {"top1": 1.5}, {"k": 10}, None, **arguments)
    assert capsys.readouterr().out == ""
    assert not path.exists()


def test_names_with_control_characters_stay_on_their_line() -> None:
    assert table(["class"], [["two\nlines"], ["caf\udce9"]]) == (
        "     class\ntwo\\nlines\n   caf\\xe9"
    )

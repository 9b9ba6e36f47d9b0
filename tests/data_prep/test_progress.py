"""Lines of progress: their content, and when they are printed."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from data_prep import progress
from data_prep.progress import Progress, watched, working


def test_progress_tells_the_share_the_rate_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr(progress, "time", clock)
    rows = Progress("pairs", "rows", 8_000)
    clock.monotonic = lambda: 104.0
    assert not rows.add(1_000)  # too early for a line
    clock.monotonic = lambda: 106.0
    assert rows.add(2_000, "2,900 good")
    clock.monotonic = lambda: 120.0
    rows.add(5_000)
    rows.close("7,500 good")
    first, last = capsys.readouterr().out.splitlines()
    assert first == "pairs: 3,000 of 8,000 rows (38%), 500.0 rows/s, 00:10 left, 2,900 good"
    assert last == "pairs: 8,000 rows in 00:20, 400.0 rows/s, 7,500 good"


def test_only_long_work_is_watched_aloud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = SimpleNamespace(monotonic=lambda: 100.0)
    monkeypatch.setattr(progress, "time", clock)
    assert list(watched([3, 4], "boxes", "pictures")) == [3, 4]
    assert list(watched([], "boxes", "pictures")) == []
    assert capsys.readouterr().out == ""
    for number in watched(iter(range(4)), "boxes", "pictures", 4):
        clock.monotonic = lambda number=number: 104.0 + 4 * number
    first, last = capsys.readouterr().out.splitlines()
    assert first == "boxes: 2 of 4 pictures (50%), 0.2 pictures/s, 00:08 left"
    assert last == "boxes: 4 pictures in 00:16, 0.2 pictures/s"


def test_units_are_counted_in_threads() -> None:
    rows = Progress("pairs", "rows", 8_000)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(rows.add, [1] * 8_000))
    assert rows.done == 8_000


def test_a_step_without_units_tells_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with working("pairs: comparing"):
        time.sleep(0.1)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with pytest.raises(ValueError, match="broken"), working("pairs: comparing"):
        time.sleep(0.15)
        raise ValueError("broken")
    assert set(capsys.readouterr().out.splitlines()) == {"pairs: comparing: 00:00"}
    with working("pairs: comparing"):
        time.sleep(0.15)
    assert capsys.readouterr().out.splitlines()[-1] == "pairs: comparing: done in 00:00"

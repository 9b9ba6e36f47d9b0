import json
import sys
from pathlib import Path
from typing import Any

import pytest
from eval_data import lvis_like, predictions_for, write_results
from serving import save_detector, save_segmenter

from ovd_models.errors import InputError
from workflows import compare
from workflows.common import cli

TRUTH = lvis_like(25, 8, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An annotation file, results, the same results, and much worse ones."""
    (tmp_path / "gt.json").write_text(json.dumps(TRUTH))
    rows = list(predictions_for(TRUTH, 40))
    write_results(iter(rows), tmp_path / "a.json")
    write_results(iter(rows), tmp_path / "same.json")
    worse = [{**row, "bbox": [row["bbox"][0] + 40, *row["bbox"][1:]]} if n % 3 else row for n, row in enumerate(rows)]
    write_results(iter(worse), tmp_path / "worse.json")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> int:
    base = ["compare.py", "--storage", str(folder / "store"), "--ground-truth", str(folder / "gt.json")]
    monkeypatch.setattr(sys, "argv", [*base, *flags])
    return cli.outcome(compare.main)


def test_files_are_compared_with_the_first_one_by_paired_draws(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(folder / f"{name}.json") for name in ("a", "same", "worse")]
    output = folder / "out.json"
    assert run(monkeypatch, folder, "--runs", *files, "--output", str(output), "--name", "x") == 0
    found: dict[str, Any] = json.loads(output.read_text())
    assert found["first"] == "a.json"
    # Equal results differ by nothing in any draw, whatever the spread of each: the draws are paired.
    assert set(found["others"]) == {"same.json", "worse.json"}
    for row in found["others"]["same.json"].values():
        assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
    lost = found["others"]["worse.json"]["AP50 all"]
    assert lost["low"] <= lost["difference"] <= lost["high"] < 0
    assert lost["difference"] == pytest.approx(lost["own"] - lost["first"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["AP50", "all"] and line.endswith("worse") for line in lines)
    page = (folder / "store/reports/compare-x.html").read_text()
    assert "Names that lost" in page
    assert "name_1" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a.json"], "--runs: 1 given, expected two or more"),
        (["a.json", "none.json"], "none.json: no such file, expected one of predictions"),
        (["a.json", "model"], "model: a checkpoint needs pictures, expected --boxes instead of --ground-truth"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(monkeypatch, folder, "--runs", *(str(folder / flag) for flag in flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_every_run_is_there_before_the_first_predicts(tmp_path: Path) -> None:
    given = {"storage": str(tmp_path), "runs": (str(save_detector(tmp_path / "one")), str(tmp_path / "gone"))}
    with pytest.raises(InputError, match=r"gone: no detector checkpoint, expected config\.json"):
        compare.check_runs(compare.Run(**given))  # type: ignore[arg-type]
    other = str(save_segmenter(tmp_path / "ovsam"))
    with pytest.raises(InputError, match=r"--runs .*ovsam: checkpoint of method 'ovsam', expected 'codet' or 'vild'"):
        compare.check_runs(compare.Run(**{**given, "runs": (given["runs"][0], other)}))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"--iou-type segm: .* predicts boxes only"):
        compare.check_runs(compare.Run(**given, iou_type="segm"))  # type: ignore[arg-type]


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert compare.short_names(("a/x.json", "b/y.json")) == ["x.json", "y.json"]
    assert compare.short_names(("s/runs/codet/one/model", "s/runs/codet/two/model")) == ["one/model", "two/model"]
    options = "?endpoint_override=http://a.b:1"
    assert compare.short_names((f"s3://a/x{options}", f"s3://a/y{options}")) == ["x", "y"]
    assert compare.short_names(("a", "a")) == ["1: a", "2: a"]
    assert compare.page_title(["v1.0/model", "v1.2", "x.json"]) == "v1.0-model-v1.2-x"  # else v1.1's page would be lost

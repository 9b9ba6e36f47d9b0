import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import tables
from data_prep.pictograms.world import GLYPHS, SCENES, World
from ovd_models.errors import InputError
from workflows import claims, prepare_boxes
from workflows.common import cli
from workflows.configs import boxes as boxes_configs
from workflows.studies.claims import page, parts
from workflows.studies.claims.catalogue import CHEAP_FIRST, PARTS
from workflows.studies.claims.parts import Part
from workflows.studies.claims.sampled import ratio
from workflows.studies.claims.transfer_parts import MERGED, publish_coloured, publish_merged
from workflows.studies.claims.vild_parts import VildRun
from workflows.studies.study import Claim, Metrics, StudyRun

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Settings(StudyRun):
    """Settings of a part that needs no training."""

    value: float = 0.5
    gap: float = 0.1


def measured(run: Settings, seed: int) -> dict[str, Metrics]:
    """A better and a worse variant, whose difference depends a little on the seed."""
    return {"better": {"ap": run.value + run.gap + 0.01 * seed}, "worse": {"ap": run.value}}


PART = Part(
    number=1,
    statement="Better is better.",
    paper=("+0.1 (a paper)",),
    schedule="None.",
    settings=Settings(),
    measure=measured,
    claims=(Claim("AP: better above worse", "ap", "better", ("worse",)),),
    columns={"AP": "ap"},
)


@pytest.fixture
def one_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> claims.Run:
    """The script with one claim that takes no time, and its folders."""
    monkeypatch.setattr(claims, "PARTS", {1: PART, 2: replace(PART, number=2)})
    monkeypatch.setattr(claims, "CHEAP_FIRST", (1,))
    monkeypatch.setattr(claims, "CHECKED", (1,))
    return claims.Run(storage=str(tmp_path / "runs"), results=str(tmp_path / "claims"), demo=str(tmp_path / "demo"))


def run_script(monkeypatch: pytest.MonkeyPatch, run: claims.Run, *flags: str) -> int:
    """The exit code of the script."""
    paths = ["--storage", run.storage, "--results", run.results, "--demo", run.demo]
    monkeypatch.setattr("sys.argv", ["claims.py", *paths, *flags])
    return cli.outcome(claims.main)


def test_claims_are_measured_once_and_rendered(
    one_part: claims.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(monkeypatch, one_part) == 0
    assert "remaining: 3 results, about 0.00 h and 3 not measured before" in capsys.readouterr().out
    content = json.loads(Path(f"{one_part.results}.json").read_text())
    first, second = content["claims"]
    assert (first["id"], first["seeds"], first["holds"]) == (1, [0, 1, 2], True)
    assert first["ours"] == pytest.approx(0.11)
    # Differences 0.10, 0.11, 0.12: standard error 0.01 / sqrt(3), Student's t 4.303.
    assert first["interval"] == pytest.approx([0.11 - 4.303 * 0.01 / 3**0.5, 0.11 + 4.303 * 0.01 / 3**0.5], abs=1e-5)
    assert (second["ours"], second["seeds"], second["holds"]) == (None, [], None)
    text = Path(f"{one_part.results}.md").read_text()
    assert "Claim 1: holds" in text and "Claim 2: not measured" in text
    assert Path(one_part.results, "01.png").exists()

    def never(*_: object) -> dict[str, Metrics]:
        raise AssertionError("recorded already")

    monkeypatch.setattr(claims, "PARTS", {1: replace(PART, measure=never), 2: replace(PART, number=2)})
    assert run_script(monkeypatch, one_part) == 0
    assert "remaining: 0 results" in capsys.readouterr().out


def test_each_claim_has_its_own_number_of_seeds(
    one_part: claims.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims, "PARTS", {1: replace(PART, seeds=1), 2: replace(PART, number=2, seeds=2)})
    monkeypatch.setattr(claims, "CHEAP_FIRST", (1, 2))
    assert run_script(monkeypatch, one_part) == 0
    assert "remaining: 3 results" in capsys.readouterr().out
    assert run_script(monkeypatch, one_part, "--seeds", "1") == 0
    assert "remaining: 1 results" in capsys.readouterr().out


def test_a_claim_is_decided_when_all_its_seeds_are_measured(
    one_part: claims.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_script(monkeypatch, one_part, "--seeds", "0")
    (record,) = claims.read_records(one_part)[1]
    assert parts.judge(PART, [record]).holds is None
    assert page.verdict_word(parts.judge(PART, [record])) == "undecided"
    two = [record, replace(record, seed=1, results={"better": {"ap": 0.611}, "worse": {"ap": 0.5}})]
    assert parts.judge(PART, two).holds is None
    assert parts.judge(replace(PART, seeds=2), two).holds is True
    apart = [record, replace(record, seed=1, results={"better": {"ap": 0.8}, "worse": {"ap": 0.5}})]
    # 0.1 and 0.3: the interval of two seeds contains 0
    assert parts.judge(replace(PART, seeds=2), apart).holds is False
    no_rule_yet = replace(PART, seeds=2, claims=(*PART.claims, Claim("AP of another", "ap", "another")))
    assert parts.judge(no_rule_yet, two).holds is None


def test_an_interval_over_images_pairs_the_variants_by_draw() -> None:
    def drawn(run: Settings, seed: int) -> dict[str, Metrics]:
        values = np.linspace(0, 1, 50)
        return {"better": {"ap": ratio(values)}, "worse": {"ap": ratio(values - 0.1)}}

    record = parts.measure(replace(PART, measure=drawn), 0, "", "")
    assert record.results["better"] == {"ap": pytest.approx(0.5)}
    verdict = parts.judge(PART, [record, replace(record, seed=1, draws={})])
    (judged,) = verdict.judged
    assert verdict.interval_over_images(judged) == pytest.approx((0.1, 0.1), abs=1e-4)  # the same in every draw
    alone = replace(judged, baseline="", mean=0.5)
    interval = verdict.interval_over_images(replace(alone, ours={0: 0.5}))
    assert interval and interval[0] < 0.45 and interval[1] > 0.55
    without = parts.judge(PART, [replace(record, draws={})])
    assert without.interval_over_images(without.judged[0]) is None
    same = "+0.100 to +0.100"
    assert f"| AP: better above worse (interval at least 0) | +0.100 | {same} | {same} | yes |" in page.section(verdict)


def test_a_metric_that_is_not_measured_is_blank() -> None:
    part = replace(PART, columns={"AP": "ap", "IoU": "iou"})
    record = replace(
        parts.measure(part, 0, "", ""),
        results={
            "better": {"ap": 0.5},
            "worse": {"iou": 0.25, "ap": 0.4},
            "sam": {"iou": 0.75},
            "cost": {"flops": 1.0},
        },
    )
    rows = page.result_table(parts.judge(part, [record]))
    assert rows[2:5] == ["| better | 0.500 |  | 0.500 |", "| worse | 0.400 | 0.250 | 0.400 |", "| sam |  | 0.750 |  |"]
    assert not any("cost" in row for row in rows)
    page.draw(parts.judge(part, [record]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--claims", "33"], "--claims 33: unknown, expected 1 to 2"),
        (["--check"], "--check: no result of claims (1,)"),
    ],
)
def test_bad_input_is_one_line(
    one_part: claims.Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert run_script(monkeypatch, one_part, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_results_with_other_settings_are_refused(
    one_part: claims.Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(monkeypatch, one_part, "--seeds", "0")
    monkeypatch.setattr(claims, "PARTS", {1: replace(PART, settings=Settings(gap=0.3))})
    capsys.readouterr()
    assert run_script(monkeypatch, one_part, "--render") == 2
    assert "01-0.json: measured with gap 0.1, expected 0.3" in capsys.readouterr().err
    path = parts.record_path(one_part.results, 1, 0)
    for broken, message in (("{", "expected a result"), ('{"claim": 1}', "expected a result")):
        path.write_text(broken)
        with pytest.raises(InputError, match=message):
            parts.read_record(one_part.results, PART, 0)


def test_a_place_is_no_setting_and_new_fields_keep_results(one_part: claims.Run) -> None:
    record = parts.measure(PART, 0, "anywhere", "some CLIP")
    assert not {"storage", "teacher"} & record.settings.keys()
    parts.write_record(one_part.results, replace(record, settings={"value": 0.5}))
    read = parts.read_record(one_part.results, PART, 0)
    assert read and read.results["better"]["ap"] == pytest.approx(0.6)
    parts.write_record(one_part.results, replace(record, seed=5))
    parts.record_path(one_part.results, 1, 5).rename(parts.record_path(one_part.results, 1, 6))
    with pytest.raises(InputError, match="claim 1, seed 5, expected 1 and 6"):
        parts.read_record(one_part.results, PART, 6)


@pytest.mark.parametrize(("drift", "code"), [(0.01, 0), (0.2, 1)])
def test_a_check_compares_with_what_is_recorded(
    one_part: claims.Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    drift: float,
    code: int,
) -> None:
    run_script(monkeypatch, one_part, "--seeds", "1")

    def drifted(run: Settings, seed: int) -> dict[str, Metrics]:
        return measured(replace(run, value=run.value + drift), seed)

    monkeypatch.setattr(claims, "PARTS", {1: replace(PART, measure=drifted)})
    exit_code: Callable[[], int] = lambda: run_script(monkeypatch, one_part, "--check")  # noqa: E731
    if code:
        with pytest.raises(SystemExit) as end:
            exit_code()
        assert end.value.code == code
    else:
        assert exit_code() == 0
    assert f"seed 1: largest difference {drift:.3f}, allowed 0.05" in capsys.readouterr().out


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    records = claims.read_records(claims.Run(results=str(REPOSITORY / "docs/claims")))
    verdicts = [parts.judge(part, records[number]) for number, part in PARTS.items()]
    assert (REPOSITORY / "docs/claims.md").read_text() == page.render_markdown(verdicts)
    content = json.loads(json.dumps(page.render_json(verdicts)))
    assert json.loads((REPOSITORY / "docs/claims.json").read_text()) == content
    drawn = {verdict.part.number for verdict in verdicts if verdict.records}
    assert {int(path.stem) for path in (REPOSITORY / "docs/claims").glob("*.png")} == drawn
    pictures = {verdict.part.number for verdict in verdicts if verdict.records and verdict.part.picture}
    assert {int(path.stem) for path in (REPOSITORY / "docs/claims").glob("*.jpg")} == pictures


def test_the_catalogue_is_complete() -> None:
    assert list(PARTS) == list(range(1, 21))
    assert sorted(CHEAP_FIRST) == list(PARTS)
    for part in PARTS.values():
        assert part.statement and part.paper and part.schedule and part.claims and part.columns


def test_other_vocabularies_name_the_same_boxes(tmp_path: Path) -> None:
    boxes = replace(boxes_configs.pictograms(), storage=str(tmp_path), train_images=2, eval_images=8)
    prepare_boxes.prepare(boxes)
    run = VildRun(storage=str(tmp_path), boxes=boxes)

    def names_of(table: str, categories: str) -> list[list[str]]:
        rows = tables.read_table(str(tmp_path), "categories", categories).to_pylist()
        name_of = {row["category_id"]: row["name"] for row in rows}
        keys = tables.read_table(str(tmp_path), "boxes", table)["category_ids"].to_pylist()
        return [[name_of[key] for key in of] for of in keys]

    own = names_of("pictograms-eval", "pictograms")
    word_of = {name: word for word, members in MERGED.items() for name in members}
    assert set(word_of) <= set(GLYPHS) and not set(MERGED) & set(GLYPHS)
    merged = names_of(publish_merged(run), "pictograms-merged")
    assert merged == [[word_of.get(name, name) for name in of] for of in own]
    assert merged != own
    coloured = names_of(publish_coloured(run), "pictograms-coloured")
    assert [[name.split(" ", 1)[1] for name in of] for of in coloured] == own
    first = World.create(boxes.seed).scene(np.random.default_rng([boxes.seed + 2, 0]), SCENES, None)
    assert [name.split(" ", 1)[0] for name in coloured[0]] == list(first.colours)
    table = tables.read_table(str(tmp_path), "categories", "pictograms-merged").to_pylist()
    assert {row["name"]: tuple(row["synonyms"]) for row in table if row["synonyms"]} == MERGED

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from ovd_models.errors import InputError
from workflows.common import cli
from workflows.configs import clip as clip_configs
from workflows.configs import codet as codet_configs
from workflows.configs import ovsam as ovsam_configs
from workflows.configs import vild as vild_configs


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Run:
    storage: str = "store"
    steps: int
    flag: bool = False
    mode: Literal["quick", "exact"] = "quick"
    inner: Inner = field(default_factory=Inner)
    options: dict[str, Any] = field(default_factory=lambda: {"width": 8})


CONFIGS = {"small": lambda: Run(steps=5), "large": lambda: Run(steps=500, inner=Inner(rate=0.2))}


def parse(*arguments: str) -> Run:
    return cli.parse(CONFIGS, "A test.", list(arguments))


def test_a_named_config_with_changed_fields() -> None:
    assert parse("--config", "large", "--inner.rate", "3", "--flag", "--inner.sizes", "4", "5", "6") == Run(
        steps=500, flag=True, inner=Inner(rate=3.0, sizes=(4, 5, 6))
    )


def test_the_first_config_is_the_default_and_flags_stand_in_any_order() -> None:
    assert parse() == CONFIGS["small"]()
    assert parse("--steps", "7", "--config=large") == dataclasses.replace(CONFIGS["large"](), steps=7)


def test_a_job_writes_nothing_below_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    cli.check_places(SimpleNamespace(out="onnx"))
    monkeypatch.setenv(cli.JOB, "{}")
    with pytest.raises(InputError, match=r"^--out onnx: relative, expected a URI or an absolute path"):
        cli.check_places(SimpleNamespace(out="onnx"))
    with pytest.raises(InputError, match=r"^--storage store: relative, expected"):
        parse()
    cli.check_places(SimpleNamespace(out="/tmp/onnx", output="", page="s3://bucket/page.html"))


def test_an_unknown_config_is_refused() -> None:
    with pytest.raises(InputError, match=r"^--config huge: unknown, expected one of small, large$"):
        parse("--config", "huge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unheard", "1"], "unknown flags: --unheard, 1"),
        (["--steps", "many"], "--steps: invalid literal for int() with base 10: 'many'"),
        (["--inner.rate"], "--inner.rate: missing value"),
        (["--mode", "slow"], "--mode: 'slow', expected one of quick, exact"),
        (["--config"], "--config: expected one argument"),
        (["x"], "unknown flags: x"),
        (["--stpes", "7"], "unknown flags: --stpes, 7; did you mean --steps?"),
        (["--inner.rates=7"], "unknown flags: --inner.rates=7; did you mean --inner.rate?"),
        (["--config", "smal"], "--config smal: unknown, expected one of small, large; did you mean small?"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    assert str(caught.value) == message
    assert capsys.readouterr() == ("", "")


def test_the_config_and_what_differs_from_it_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", "large", "--storage", "my store", "--steps", "7", "--flag", "--inner.sizes", "4", "5"]
    run = parse(*given)
    printed = capsys.readouterr().out
    assert printed == "config: large --storage 'my store' --steps 7 --flag --inner.sizes 4 5\n"
    assert parse("--config", *shlex.split(printed)[1:]) == run


@pytest.mark.parametrize("factors", [{"detector.backbone.": 0.0, "detector.rpn.": 0.5}, {"detector.": 1e-3}, {}])
def test_rate_factors_are_one_flag_that_is_printed_as_it_is_read(
    factors: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"{start}={factor}" for start, factor in factors.items()]
    given = ["--config", "finetune", "--storage", str(tmp_path), "--joint-stage.rate-factors", *flags]
    run = cli.parse(codet_configs.CONFIGS, "", given)
    assert run.joint_stage.rate_factors == factors
    assert run.box_stage.rate_factors == codet_configs.finetune().box_stage.rate_factors
    printed = capsys.readouterr().out.removeprefix("config: ")
    assert cli.parse(codet_configs.CONFIGS, "", ["--config", *shlex.split(printed)]) == run
    for wrong in ("backbone", "backbone=-1", "backbone=fast", "=1", "backbone=nan"):
        with pytest.raises(InputError, match=r"--joint-stage\.rate-factors: "):
            cli.parse(codet_configs.CONFIGS, "", [*given[: -len(flags) or None], wrong])


def test_full_help_names_the_configs_and_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(CONFIGS, "A test.\n\nscript --config a\nscript --config b", ["--help-all"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("A test.\n\nscript --config a\nscript --config b\n")
    assert "one of small, large (default small)" in shown
    assert all(flag in shown for flag in ("--storage", "--steps", "--inner.rate", "--inner.sizes"))


def test_a_run_is_json_and_flat_names() -> None:
    run = CONFIGS["large"]()
    assert json.loads(cli.to_json(run))["inner"] == {"rate": 0.2, "sizes": [1, 2]}
    assert cli.flatten(run) == {
        "storage": "store",
        "steps": 500,
        "flag": False,
        "mode": "quick",
        "inner.rate": 0.2,
        "inner.sizes": (1, 2),
        "options.width": 8,
    }


def test_the_hash_changes_with_any_field() -> None:
    run = CONFIGS["large"]()
    changed = [
        dataclasses.replace(run, steps=501),
        dataclasses.replace(run, inner=Inner(rate=0.2, sizes=(1, 3))),
        dataclasses.replace(run, options={"width": 9}),
    ]
    hashes = [cli.config_hash(entry) for entry in (run, *changed)]
    assert len(set(hashes)) == 4
    assert cli.config_hash(CONFIGS["large"]()) == hashes[0]
    assert all(len(entry) == 16 for entry in hashes)


def ends_with(job: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def run() -> None:
        if job == "input":
            raise InputError("a.json: bad, expected good")
        if job == "stop":
            raise KeyboardInterrupt
        if job == "waited":
            raise cli.WaitedError("the cluster has not grown")
        if job == "failure":
            raise RuntimeError("it broke")

    before = signal.getsignal(signal.SIGTERM)
    try:
        return cli.outcome(run), capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("job", "code", "line"),
    [
        ("done", 0, ""),
        ("input", 2, "error: a.json: bad, expected good\n"),
        ("stop", 130, "interrupted\n"),
        ("waited", 1, "error: the cluster has not grown\n"),
    ],
)
def test_exit_codes(job: str, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(job, capsys) == (code, line)


def script(body: str) -> list[str]:
    # A test run in the background ignores Ctrl-C, and so would its children.
    listens = "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return [sys.executable, "-c", f"{listens}from workflows.common import cli\ndef job():\n{body}\ncli.execute(job)"]


def test_a_finished_job_prints_everything_and_runs_its_exit_handlers() -> None:
    body = "    import atexit\n    atexit.register(print, 'end')\n    print('done', end=' ')"
    found = subprocess.run(script(body), capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (0, "done end\n", "")


def test_a_failed_job_exits_with_1_and_its_reason_comes_last() -> None:
    found = subprocess.run(script("    raise RuntimeError('it broke')"), capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1] == "RuntimeError: it broke"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_runs_its_finally_blocks(tmp_path: Path, number: signal.Signals) -> None:
    done = str(tmp_path / "done")
    waiting = "        print('begun', flush=True)\n        time.sleep(60)\n"
    body = f"    try:\n{waiting}    finally:\n        open({done!r}, 'w')"
    with subprocess.Popen(script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "begun\n"
        os.kill(job.pid, number)
        _, errors = job.communicate(timeout=30)
    assert job.returncode == 130
    assert errors == "interrupted\n"
    assert (tmp_path / "done").exists()


def test_workers_of_all_stages_are_one_flag_which_a_stage_may_replace() -> None:
    def workers(*flags: str) -> tuple[int, int]:
        run = cli.parse(codet_configs.CONFIGS, "", ["--config", "pictograms", *flags])
        return run.box_stage.workers, run.joint_stage.workers

    assert workers() == (2, 2)
    assert workers("--workers", "1") == (1, 1)
    assert workers("--workers=0", "--joint-stage.workers", "1") == (0, 1)
    with pytest.raises(InputError, match="detection_batch: 8, expected a multiple of the 3 workers"):
        workers("--workers", "3")
    with pytest.raises(InputError, match="--workers: invalid int value: 'many'"):
        workers("--workers", "many")
    with pytest.raises(InputError, match="unknown flags: --workers"):
        parse("--workers", "2")


def test_precision_parts_and_devices_of_all_stages_are_one_flag_each() -> None:
    flags = ["--precision", "bf16", "--accumulate", "2", "--compile", "--no-use-gpu", "--joint-stage.precision", "fp16"]
    run = cli.parse(codet_configs.CONFIGS, "A test.", ["--config", "lvis_r50", *flags])
    for stage, precision in ((run.box_stage, "bf16"), (run.joint_stage, "fp16")):
        assert (stage.precision, stage.accumulate, stage.compile, stage.use_gpu) == (precision, 2, True, False)
    with pytest.raises(InputError, match="precision: 'half', expected one of auto, fast, bf16, fp16, fp32"):
        cli.parse(codet_configs.CONFIGS, "A test.", ["--precision", "half"])


@pytest.mark.parametrize(
    ("configs", "line"),
    [
        (codet_configs.CONFIGS, "--config finetune --workers 8 --detection-batch 16"),
        (codet_configs.CONFIGS, "--config finetune --box-stage.workers 8 --joint-stage.workers 8 --detection-batch 16"),
        (vild_configs.CONFIGS, "--config photos_gpu --workers 2 --accumulate 8 --detection-batch 16"),
        (clip_configs.CONFIGS, "--config pictograms --workers 5 --batch-size 100"),
        (ovsam_configs.CONFIGS, "--config photos_laptop --workers 8 --batch-size 16"),
    ],
)
def test_workers_are_checked_with_the_batch_that_is_given_beside_them(
    configs: Mapping[str, Callable[[], Any]], line: str
) -> None:
    run = cli.parse(configs, "A test.", line.split())
    for name in cli.stages_of(run):
        assert f"workers {getattr(run, name).workers}" in line


def test_the_printed_flags_of_a_run_give_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "lvis_r50", "--workers", "4", "--no-use-gpu", "--compile", "--precision", "fp32"]
    run = cli.parse(codet_configs.CONFIGS, "A test.", flags)
    printed = capsys.readouterr().out.splitlines()[-1].removeprefix("config: ")
    assert "--box-stage.use-gpu False" in printed
    assert cli.parse(codet_configs.CONFIGS, "A test.", ["--config", *shlex.split(printed)]) == run


def test_learning_rates_follow_the_batch_and_a_given_one_stays(capsys: pytest.CaptureFixture[str]) -> None:
    def rates(*flags: str) -> tuple[float, float]:
        run = cli.parse(codet_configs.CONFIGS, "A test.", ["--config", "lvis_r50", *flags])
        return run.box_stage.learning_rate, run.joint_stage.learning_rate

    published = codet_configs.lvis_r50()
    boxes, joint = published.box_stage.learning_rate, published.joint_stage.learning_rate
    assert rates() == (boxes, joint)
    assert "learning rates follow" not in capsys.readouterr().out
    half = str(published.detection_batch // 2)
    assert rates("--detection-batch", half) == (boxes / 2, joint / 2)
    assert capsys.readouterr().out.startswith(
        f"learning rates follow the batch of {half}, 0.5 times the config's {published.detection_batch}: "
        f"box_stage {boxes / 2:g}, joint_stage {joint / 2:g}\n"
    )
    assert rates("--detection-batch", half, "--box_stage.learning_rate=0.125") == (0.125, joint / 2)


def test_a_storage_failure_is_found_behind_the_errors_that_it_causes() -> None:
    def fail() -> None:
        try:
            raise OSError(28, "No space left on device", "store/a")
        except OSError:
            try:
                raise RuntimeError("the database is gone\nsecond line")
            except RuntimeError as error:
                raise ValueError("cannot set the status") from error

    with pytest.raises(ValueError, match="status") as caught:
        fail()
    assert cli.storage_failure(caught.value) == "[Errno 28] No space left on device: 'store/a'"
    assert cli.storage_failure(ValueError("no space in a name")) is None
    with pytest.raises(ValueError, match="else"):  # other errors keep their traceback
        cli.outcome(lambda: (_ for _ in ()).throw(ValueError("something else")))

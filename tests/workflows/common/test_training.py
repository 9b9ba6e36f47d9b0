import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import ray.data
import ray.train
import timm.optim.muon
import torch
from pretend_device import DEVICE, pretended
from pyarrow import parquet
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from data_prep.streams.plans import Integers
from ovd_models.batches import PairBatch
from ovd_models.errors import InputError
from ovd_models.vocabulary import Vocabulary
from workflows.common import optimisation, runs, training
from workflows.common.acceleration import autocast_dtype, compile_backbones
from workflows.common.cli import WaitedError
from workflows.common.optimisation import Optimisation, Precision
from workflows.common.session import Meter, Session, convert_sync_batchnorm
from workflows.common.teacher import CodetNames
from workflows.common.tracking import MetricLogger
from workflows.common.training import Stage
from workflows.configs import boxes as boxes_configs
from workflows.configs import clip as clip_configs
from workflows.configs import codet as codet_configs
from workflows.reports.validation import validation_set

CPU = torch.device("cpu")
QUICK = Optimisation(steps=10, learning_rate=0.05, checkpoint_every=5, workers=0)
NOWHERE = MetricLogger("", "")
"""Never flushed."""


def stage_of(settings: Optimisation, folder: Path) -> Stage:
    return Stage(job="test", name="test", settings=settings, folder=str(folder))


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: 0, expected at least 1"),
        ({"steps": -3}, "steps: -3"),
        ({"checkpoint_every": 0}, "checkpoint_every: 0, expected a multiple of 5"),
        ({"checkpoint_every": 7}, "checkpoint_every: 7, expected a multiple of 5"),
        *(
            (changes, message)
            for changes, message in [
                ({"log_every": 0}, "log_every"),  # ZeroDivisionError in the loop
                ({"warmup": 1.0}, "warmup"),  # ZeroDivisionError of OneCycleLR
                ({"warmup": 1.5}, "warmup"),  # its ValueError
                ({"workers": -1}, "workers"),
                ({"seed": -1}, "seed: -1, expected 0 or more"),  # numpy's ValueError in a data task
                ({"learning_rate": -1.0}, "learning_rate"),
            ]
        ),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(QUICK, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("run", "field"),
    [(boxes_configs.smoke(), "seed"), (clip_configs.smoke(), "world_seed")],
)
def test_seeds_below_zero_are_refused(run: Any, field: str) -> None:
    with pytest.raises(InputError, match=f"{field}:? -1.* expected 0 or more"):
        dataclasses.replace(run, **{field: -1})


# ---------------------------------------------------------------------------------------------------- schedule


def test_steps_warm_up_and_fall_to_tenths() -> None:
    stage = dataclasses.replace(QUICK, steps=1000, optimiser="sgd", warmup=0.1, decay_at=(0.5, 0.9), learning_rate=2.0)
    parameter = nn.Parameter(torch.ones(2, 2))
    optimiser = optimisation.build_optimiser(nn.ParameterList([parameter, nn.Parameter(torch.ones(2))]), stage)
    schedule = optimisation.build_schedule(optimiser, stage)
    rates = []
    for _ in range(1000):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    # A hundredth at first, half way through the warm-up (0.01 + 1) / 2 of the rate, then tenths.
    assert [rates[step] for step in (0, 50, 100, 499)] == pytest.approx([0.02, 1.01, 2.0, 2.0])
    assert [rates[step] for step in (500, 899, 900, 999)] == pytest.approx([0.2, 0.2, 0.02, 0.02])
    assert [group["weight_decay"] for group in optimiser.param_groups] == [stage.weight_decay, 0.0]
    with pytest.raises(InputError, match="decay_at"):
        dataclasses.replace(stage, decay_at=(0.9, 0.5))


class Alone:
    """What Ray Train tells a loop that runs inside the driver."""

    def get_world_size(self) -> int:
        return 1

    def get_world_rank(self) -> int:
        return 0

    def get_local_world_size(self) -> int:
        return 1


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.train, "get_context", Alone)


def session(settings: Optimisation, folder: Path, seed: int = 0) -> Session:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    return Session(model, stage_of(settings, folder), torch.device("cpu"), NOWHERE)


def step(running: Session, number: int) -> float:
    inputs = torch.randn(16, 3, generator=torch.Generator().manual_seed(number))
    loss = (running.model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
    running.update({"error": loss})
    return loss.item()


def rates(steps: int, folder: Path, warmup: float = 0.1) -> list[float]:
    running = session(dataclasses.replace(QUICK, steps=steps, warmup=warmup), folder)
    found = []
    for number in range(steps):
        found.append(float(running.optimiser.param_groups[0]["lr"]))
        step(running, number)
    return found


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 11, 13, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.95])
def test_any_number_of_steps_has_a_schedule(alone: None, tmp_path: Path, steps: int, warmup: float) -> None:
    found = rates(steps, tmp_path, warmup)
    assert all(0 < rate <= 0.05 + 1e-9 for rate in found)
    assert found[0] == pytest.approx(0.05 / 25)  # OneCycleLR's start


def test_the_rate_rises_to_its_peak_and_falls_to_almost_zero(alone: None, tmp_path: Path) -> None:
    found = rates(100, tmp_path)
    peak = int(np.argmax(found))
    assert peak == 9  # a tenth of the steps
    assert found[peak] == pytest.approx(0.05)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert len(set(found)) == 100
    assert found[-1] < 0.05 / 1000


# ------------------------------------------------------------------------------------------------------ session


def test_a_checkpoint_is_due_at_its_multiples_and_at_the_end(alone: None, tmp_path: Path) -> None:
    running = session(dataclasses.replace(QUICK, steps=12), tmp_path)
    due = []
    for number in range(12):
        step(running, number)
        due.append(running.due)
    assert [number + 1 for number, flag in enumerate(due) if flag] == [5, 10, 12]


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "muon"])
def test_a_resumed_session_continues_as_if_undisturbed(
    alone: None, tmp_path: Path, optimiser: Literal["adamw", "sgd", "muon"]
) -> None:
    settings = dataclasses.replace(QUICK, optimiser=optimiser)
    whole = session(settings, tmp_path / "whole")
    losses = [step(whole, number) for number in range(10)]

    first = session(settings, tmp_path / "halves")
    for number in range(5):
        step(first, number)
    first.checkpoint()
    assert training.committed_step(str(tmp_path / "halves")) == 5
    step(first, 5)  # lost with the crash
    second = session(settings, tmp_path / "halves", seed=9)
    assert second.step == 5
    assert [step(second, number) for number in range(5, 10)] == losses[5:]
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name]), name
    assert second.optimiser.param_groups[0]["lr"] == whole.optimiser.param_groups[0]["lr"]


def test_muon_steps_equally_in_all_directions_and_decays_only_matrices(alone: None, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, optimiser="muon", weight_decay=0.0, clip_norm=None)
    torch.manual_seed(0)
    layer = nn.Linear(8, 16)
    running = Session(layer, stage_of(settings, tmp_path), torch.device("cpu"), NOWHERE)
    matrix, before = layer.weight, layer.weight.detach().clone()
    running.update({"size": running.model(torch.randn(64, 8) * torch.logspace(0.5, -0.5, 8)).square().mean()})
    assert matrix.grad is not None
    of_gradient, of_step = torch.linalg.svdvals(matrix.grad), torch.linalg.svdvals(matrix.detach() - before)
    assert of_gradient.max() / of_gradient.min() > 30
    assert of_step.max() / of_step.min() < 1.5
    decayed = dataclasses.replace(settings, weight_decay=0.05)
    for group in optimisation.build_optimiser(layer, decayed).param_groups:
        assert {value.ndim > 1 for value in group["params"]} == {group["weight_decay"] > 0}


def test_muon_updates_tables_as_timm_does() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4))]
    models.append(copy.deepcopy(models[0]))
    settings = dataclasses.replace(QUICK, optimiser="muon")
    ours = optimisation.build_optimiser(models[0], settings)
    theirs = timm.optim.muon.Muon(optimisation.parameter_groups(models[1], settings), **ours.defaults)
    for optimiser, model in zip((ours, theirs), models, strict=True):
        for number in range(5):
            optimiser.zero_grad()
            model(torch.arange(number, number + 20)).square().mean().backward()
            optimiser.step()
    for found, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    ours_state, theirs_state = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert {key: set(value) - {"use_muon"} for key, value in ours_state.items()} == {
        key: set(value) - {"use_muon"} for key, value in theirs_state.items()
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(alone: None, tmp_path: Path, value: float) -> None:
    running = session(dataclasses.replace(QUICK, log_every=1000), tmp_path)
    for number in range(5):
        step(running, number)
    running.end_step({}, 16)
    saved = training.final_weights(str(tmp_path))
    for number in range(5, 10):
        loss = running.model(torch.ones(4, 3)).sum()
        running.update({"broken": loss * value if number == 7 else loss})
        if not running.due:
            running.end_step({}, 4)
    for end in (running.checkpoint, lambda: running.end_step({}, 4)):
        with pytest.raises(FloatingPointError, match="test: broken not finite at step 7"):
            end()
    assert training.committed_step(str(tmp_path)) == 5
    assert all(torch.equal(weight, saved[name]) for name, weight in training.final_weights(str(tmp_path)).items())


def test_a_loss_that_is_not_finite_ends_the_run_at_the_next_log_line(alone: None, tmp_path: Path) -> None:
    running = session(dataclasses.replace(QUICK, log_every=2, checkpoint_every=10), tmp_path)
    losses = {"broken": running.model(torch.ones(4, 3)).sum() * math.nan}
    running.update(losses)
    running.end_step(losses, 4)
    running.update({"fine": running.model(torch.ones(4, 3)).sum()})
    with pytest.raises(FloatingPointError, match="at step 0"):
        running.end_step(losses, 4)


def test_weights_of_a_gradient_that_is_not_finite_are_not_saved(alone: None, tmp_path: Path) -> None:
    running = session(dataclasses.replace(QUICK, clip_norm=None), tmp_path)
    for number in range(5):
        step(running, number)
    running.checkpoint()
    for number in range(5, 9):
        step(running, number)
    losses = {"fine": (running.model(torch.ones(4, 3)) * 0).square().sum().sqrt()}  # 0, with the slope 0 / 0
    running.update(losses)
    with pytest.raises(FloatingPointError, match="test: gradient not finite at step 9"):
        running.end_step(losses, 4)
    assert training.committed_step(str(tmp_path)) == 5
    assert all(torch.isfinite(weight).all() for weight in training.final_weights(str(tmp_path)).values())


def test_slow_steps_tell_the_time_between_log_lines(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds, expected in ((10.0, []), (0.0, [f"test {step}/10  00:00, 00:00 left" for step in range(1, 10)])):
        monkeypatch.setattr("workflows.common.session.QUIET_SECONDS", seconds)
        running = session(dataclasses.replace(QUICK, log_every=10), tmp_path / str(seconds))
        for _ in range(9):
            losses = {"one": running.model(torch.ones(4, 3)).sum()}
            running.update(losses)
            running.end_step(losses, 4)
        assert capsys.readouterr().out.splitlines() == expected


def test_the_host_waits_for_the_metrics_of_a_step_once_a_log_line(alone: None, tmp_path: Path) -> None:
    with pretended() as waits:
        settings = dataclasses.replace(QUICK, log_every=10, steps=20, checkpoint_every=20)
        running = Session(nn.Linear(3, 1), stage_of(settings, tmp_path), DEVICE, NOWHERE)
        for _ in range(10):
            losses = {name: running.model(torch.ones(4, 3, device=DEVICE)).sum() for name in ("one", "two")}
            running.update(losses)
            running.end_step(losses, 4)
    assert len(waits) == 2  # whether the losses are finite, and the metrics


@pytest.mark.parametrize("limit", [0.5, None])
def test_gradients_are_clipped_to_a_norm_or_left_unclipped(alone: None, tmp_path: Path, limit: float | None) -> None:
    running = session(dataclasses.replace(QUICK, clip_norm=limit), tmp_path)
    running.update({"large": running.model(torch.ones(4, 3)).sum() * 100})
    squares = sum(float(value.grad.square().sum()) for value in running.module.parameters() if value.grad is not None)
    if limit is None:
        assert math.sqrt(squares) > 100
    else:
        assert math.sqrt(squares) == pytest.approx(limit, rel=1e-3)


def test_gradients_are_clipped_to_a_value(alone: None, tmp_path: Path) -> None:
    running = session(dataclasses.replace(QUICK, clip_norm=None, clip_value=0.25), tmp_path)
    weights = list(running.module.parameters())
    running.update({"large": 100 * weights[0].sum() - 100 * weights[1].sum()})
    assert weights[0].grad is not None
    assert weights[1].grad is not None
    assert bool((weights[0].grad == 0.25).all())
    assert bool((weights[1].grad == -0.25).all())


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_parameters_may_have_learning_rates_of_their_own(schedule: Literal["one_cycle", "cosine"]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    settings = dataclasses.replace(QUICK, schedule=schedule, rate_factors={"0.": 0.1}, decay_norms=False)
    optimiser = optimisation.build_optimiser(model, settings)
    schedule_ = optimisation.build_schedule(optimiser, settings)
    for _ in range(5):
        rates = {id(value): group["lr"] for group in optimiser.param_groups for value in group["params"]}
        decay = {id(value): group["weight_decay"] for group in optimiser.param_groups for value in group["params"]}
        assert rates[id(model[0].weight)] == rates[id(model[0].bias)] == pytest.approx(0.1 * rates[id(model[1].bias)])
        assert [decay[id(value)] for value in model.parameters()] == [settings.weight_decay, 0, 0, 0]
        optimiser.step()
        schedule_.step()
    with pytest.raises(InputError, match=r"rate_factors: no parameter's name starts with 2\."):
        optimisation.build_optimiser(model, dataclasses.replace(settings, rate_factors={"2.": 0.1}))


# ------------------------------------------------------------------------------------- parts of a batch, precision


def halves(running: Session, inputs: Tensor) -> None:
    for part in inputs.chunk(running.settings.accumulate):
        loss = (running.model(part) - part.sum(1, keepdim=True)).square().mean()
        running.update({"error": loss})
        running.end_step({"error": loss}, len(inputs))


def test_a_batch_in_parts_takes_the_step_of_the_whole_batch(alone: None, tmp_path: Path) -> None:
    settings = [dataclasses.replace(QUICK, accumulate=count, checkpoint_every=10) for count in (1, 4)]
    stages = [stage_of(each, tmp_path / str(each.accumulate)) for each in settings]
    whole, parts = (Session(nn.Linear(3, 1), stage, CPU, NOWHERE) for stage in stages)
    parts.module.load_state_dict(whole.module.state_dict())
    for number in range(5):
        inputs = torch.randn(16, 3, generator=torch.Generator().manual_seed(number))
        halves(whole, inputs)
        halves(parts, inputs)
        assert parts.step == whole.step == number + 1
    for name, value in whole.module.state_dict().items():
        assert torch.allclose(parts.module.state_dict()[name], value, atol=1e-6), name
    one, four = whole.meter.collect(), parts.meter.collect()
    assert four["train/loss_error"] == pytest.approx(one["train/loss_error"], rel=1e-5)


def test_every_part_of_a_step_has_a_seed_of_its_own(alone: None, tmp_path: Path) -> None:
    running = Session(nn.Linear(3, 1), stage_of(dataclasses.replace(QUICK, accumulate=3), tmp_path), CPU, NOWHERE)
    draws, due = [], []
    for _ in range(6):
        due.append(running.due)
        draws.append(int(torch.randint(1 << 40, (1,), generator=running.generator())))
        running.update({"error": running.model(torch.ones(2, 3)).mean()})
    assert (running.step, len(set(draws))) == (2, 6)
    assert due[1:3] == due[4:] == [False, False]  # a checkpoint follows a whole step


def test_a_batch_that_the_parts_do_not_divide_is_refused() -> None:
    stage = dataclasses.replace(QUICK, workers=2, accumulate=4)
    optimisation.check_shared("batch", 16, stage)
    for size in (4, 12):
        with pytest.raises(InputError, match=f"^batch: {size}, expected a multiple of the 2 workers times 4 parts$"):
            optimisation.check_shared("batch", size, stage)


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_fast_is_bf16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, has: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    assert autocast_dtype("fast", torch.device("cpu")) == dtype
    assert autocast_dtype("fast", torch.device("cuda")) == torch.bfloat16
    assert autocast_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("auto", None)])
def test_the_forward_pass_runs_in_the_stages_precision(
    alone: None, tmp_path: Path, precision: Precision, dtype: torch.dtype | None
) -> None:
    running = session(dataclasses.replace(QUICK, precision=precision), tmp_path)
    with running.autocast():
        assert running.model(torch.randn(4, 3)).dtype == (dtype or torch.float32)  # auto: fp32 on a CPU
    assert running.scaler.is_enabled() == (precision == "fp16")


def test_fp16_scales_the_loss_and_skips_steps_whose_gradient_overflows(alone: None, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, precision="fp16", steps=20)
    running = Session(nn.Linear(3, 1), stage_of(settings, tmp_path), CPU, NOWHERE)
    before = running.module.weight.detach().clone()
    running.update({"error": running.model(torch.full((4, 3), 1e36)).sum()})  # finite, but not once it is scaled
    assert torch.equal(running.module.weight, before)
    scale = running.scaler.get_scale()
    assert scale == 2.0**15  # halved
    running.update({"error": running.model(torch.ones(4, 3)).sum()})
    assert not torch.equal(running.module.weight, before)
    running.checkpoint()
    assert Session(nn.Linear(3, 1), stage_of(settings, tmp_path), CPU, NOWHERE).scaler.get_scale() == scale


def test_only_the_outermost_backbones_are_compiled() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)

    model = nn.ModuleDict({"detector": Model(), "visual": Model()})
    names = set(model.state_dict())
    compile_backbones(model)
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"detector.backbone", "visual"}
    assert set(model.state_dict()) == names


def test_norms_of_timm_keep_their_activation_when_workers_share_statistics() -> None:
    (norm,) = convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(4)))
    assert isinstance(norm, nn.SyncBatchNorm)
    assert isinstance(norm.act, nn.ReLU)


def test_a_run_without_a_checkpoint_has_no_step_and_no_weights(tmp_path: Path) -> None:
    assert training.committed_step(str(tmp_path)) == 0
    assert training.last_checkpoint(str(tmp_path / "none")) is None
    with pytest.raises(InputError, match="no checkpoint, expected a finished training run"):
        training.final_weights(str(tmp_path))


# -------------------------------------------------------------------------------------------------------- meter


def test_a_meter_averages_losses_since_the_last_call() -> None:
    meter = Meter()
    for value in (1.0, 3.0):
        meter.add({"a": torch.tensor(value), "b": torch.tensor(1.0)}, 4)
    found = meter.collect()
    assert (found["train/loss_a"], found["train/loss_b"]) == (2.0, 1.0)
    assert found["train/images_per_second"] > 0
    assert "train/loss_a" not in meter.collect()


def test_a_meter_averages_each_loss_over_the_parts_that_have_it() -> None:
    meter = Meter()
    for _ in range(5):
        meter.add({"classes": torch.tensor(1.0)}, 4)
        meter.add({"concept": torch.tensor(3.0)}, 4)
    found = meter.collect()
    assert (found["train/loss_classes"], found["train/loss_concept"]) == (1.0, 3.0)
    assert found["train/total_loss"] == 2.0  # of a step


def test_a_meter_measures_the_fraction_of_time_in_checkpoints() -> None:
    meter = Meter()
    with meter.timing("checkpoint"):
        time.sleep(0.05)
    found = meter.collect()
    assert 0.5 < found["train/checkpoint_fraction"] <= 1
    assert found["train/data_wait_fraction"] == meter.collect()["train/checkpoint_fraction"] == 0


# ----------------------------------------------------------------------------------------------------- Ray Train


def first_column(rows: dict[str, np.ndarray]) -> PairBatch:
    return PairBatch(torch.as_tensor(rows["position"], dtype=torch.float32)[:, None] / 40, ())


def loop(stage: Stage, stop_after: int) -> Callable[[], None]:
    """A small loop of the form that every workflow has; it crashes after `stop_after` steps."""

    def worker() -> None:
        training.prepare_worker(stage.settings)
        running = Session(nn.Linear(1, 1), stage, torch.device("cpu"), NOWHERE)
        for batch in running.batches("rows", 4, first_column):
            values = batch.images
            running.update({"error": (running.model(values) - 2 * values).square().mean()})
            if running.due:
                running.checkpoint()
            if running.step == stop_after:
                raise RuntimeError("a crash in the middle")

    return worker


def run_loop(settings: Optimisation, folder: Path, stop_after: int = 0) -> dict[str, Tensor]:
    def load(positions: Integers) -> pa.Table:
        return pa.table({"position": positions})

    stage = stage_of(settings, folder)
    return training.fit(loop(stage, stop_after), stage, {"rows": training.feed(load, 4, settings)})


@pytest.mark.ray
@pytest.mark.parametrize(
    ("workers", "step", "rows"),
    [(0, 7, [28, 29, 30, 31]), pytest.param(2, 9, [28, 29, 38, 39], marks=pytest.mark.slow)],
)
def test_the_rows_of_a_loss_that_is_not_finite_are_saved_and_the_loop_is_not_tried_again(
    ray_cluster: None, tmp_path: Path, workers: int, step: int, rows: list[int]
) -> None:
    settings = dataclasses.replace(QUICK, workers=workers, log_every=5)
    stage = stage_of(settings, tmp_path / "run")
    attempts = tmp_path / "attempts"

    def worker() -> None:
        training.prepare_worker(settings)
        with attempts.open("a") as lines:
            lines.write("began\n")
        running = Session(nn.Linear(1, 1), stage, torch.device("cpu"), NOWHERE)
        for batch in running.batches("rows", 4, first_column):
            fine = running.model(batch.images).square().mean()
            infinite = fine / (batch.images != 29 / 40).all()
            running.update({"fine": fine, "broken": infinite})
            if running.due:
                running.checkpoint()

    def load(positions: Integers) -> pa.Table:
        return pa.table({"position": positions})

    with pytest.raises(
        FloatingPointError, match=rf"^test: broken not finite at step {step}; its rows are in"
    ) as caught:
        training.fit(worker, stage, {"rows": training.feed(load, 4, settings)})
    saved = str(caught.value).rpartition(" ")[2]
    assert parquet.read_table(saved)["position"].to_pylist() == rows
    assert attempts.read_text().count("began") == max(1, workers)
    assert training.committed_step(stage.folder) == 5


@pytest.mark.ray
def test_workers_of_a_busy_cluster_are_not_waited_for_longer_than_told(ray_cluster: None, tmp_path: Path) -> None:
    @ray.remote
    class Other:
        def is_here(self) -> bool:
            return True

    other = Other.options(num_cpus=ray.available_resources()["CPU"]).remote()
    assert ray.get(other.is_here.remote())
    settings = dataclasses.replace(QUICK, workers=1, max_failures=1)
    stage = dataclasses.replace(stage_of(settings, tmp_path / "run"), wait_minutes=0.05)
    try:
        with pytest.raises(WaitedError, match=r"^test: the cluster had no room for the 1 workers in 0\.05 minutes$"):
            training.fit(lambda: None, stage, {})
    finally:
        ray.kill(other)


@pytest.mark.ray
def test_a_record_of_a_killed_run_does_not_end_the_next(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / training.NOT_FINITE).write_text('{"step": 3, "losses": ["error"]}')
    run_loop(QUICK, tmp_path)
    assert training.committed_step(str(tmp_path)) == 10


@pytest.mark.ray
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_input_of_a_worker_is_its_line_and_not_met_again(ray_cluster: None, tmp_path: Path, workers: int) -> None:
    settings = dataclasses.replace(QUICK, workers=workers)
    stage = stage_of(settings, tmp_path / "run")
    attempts = tmp_path / "attempts"

    def worker() -> None:
        training.prepare_worker(settings)
        with attempts.open("a") as lines:
            lines.write("began\n")
        if ray.train.get_context().get_world_rank() != 0:
            time.sleep(600)  # until it is ended, as one that waits for the gradients of the other
        while attempts.read_text().count("began") % max(1, workers):
            time.sleep(0.1)
        raise InputError("a.jpg: bad, expected good")

    def load(positions: Integers) -> pa.Table:
        return pa.table({"position": positions})

    for times in (1,) if workers else (1, 2):  # what was recorded does not outlive the run
        with pytest.raises(InputError, match=r"^a\.jpg: bad, expected good$"):
            training.fit(worker, stage, {"rows": training.feed(load, 4, settings)})
        assert attempts.read_text().count("began") == times * max(1, workers)


def test_a_stream_that_comes_every_second_step_has_rows_in_those_steps_alone() -> None:
    even, odd = (training.feed(lambda positions: positions, 3, QUICK, 2, first) for first in (0, 1))
    assert [even.positions(step).tolist() for step in range(3)] == [[0, 1, 2], [], [3, 4, 5]]
    assert [odd.positions(step).tolist() for step in range(3)] == [[], [0, 1, 2], []]


def test_a_run_is_held_to_its_tables_and_not_to_the_number_of_held_out_images(tmp_path: Path) -> None:
    runs.hold_to_settings(str(tmp_path), {"held_out": 20, "group_size": 2})
    runs.hold_to_settings(str(tmp_path), {"held_out": 0, "group_size": 2})
    with pytest.raises(InputError, match="--group-size is 3, the run began with 2"):
        runs.hold_to_settings(str(tmp_path), {"held_out": 0, "group_size": 3})


@pytest.mark.parametrize(("before", "now"), [({}, {"text": 0.1}), ({"text": 0.1}, {}), ({"text": 0.1}, {"text": 0.2})])
def test_a_run_is_held_to_its_rate_factors(tmp_path: Path, before: dict[str, float], now: dict[str, float]) -> None:
    flat = [{f"stage.rate_factors.{name}": value for name, value in each.items()} for each in (before, now)]
    runs.hold_to_settings(str(tmp_path), flat[0])
    runs.hold_to_settings(str(tmp_path), flat[0])
    with pytest.raises(InputError, match=r"--stage\.rate-factors is "):
        runs.hold_to_settings(str(tmp_path), flat[1])


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    folders = [runs.run_folder(str(tmp_path), "clip", "smoke", "") for _ in range(5)]
    assert len(set(folders)) == 5
    for folder in folders:
        Path(folder).mkdir(parents=True)
    assert runs.find_run(str(tmp_path), "clip", "smoke") == Path(folders[-1]).name


@pytest.mark.ray
def test_a_run_inside_the_driver_resumes_exactly(ray_cluster: None, tmp_path: Path) -> None:
    whole = run_loop(QUICK, tmp_path / "whole")
    with pytest.raises(Exception, match="a crash in the middle"):
        run_loop(QUICK, tmp_path / "halves", stop_after=7)
    assert training.committed_step(str(tmp_path / "halves")) == 5
    again = run_loop(QUICK, tmp_path / "halves")
    assert training.committed_step(str(tmp_path / "halves")) == 10
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.ray
def test_a_finished_run_is_not_run_again(ray_cluster: None, tmp_path: Path) -> None:
    first = run_loop(QUICK, tmp_path / "run")
    second = run_loop(QUICK, tmp_path / "run", stop_after=1)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_resume_exactly_after_a_crash(ray_cluster: None, tmp_path: Path) -> None:
    two = dataclasses.replace(QUICK, workers=2, max_failures=0)
    whole = run_loop(two, tmp_path / "whole")
    with pytest.raises(Exception, match="a crash in the middle"):
        run_loop(two, tmp_path / "halves", stop_after=7)
    assert training.committed_step(str(tmp_path / "halves")) in (0, 5)  # an upload ends with its process
    again = run_loop(two, tmp_path / "halves")
    assert training.committed_step(str(tmp_path / "halves")) == 10
    assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in whole.items())


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_moves_between_the_driver_and_a_worker(ray_cluster: None, tmp_path: Path) -> None:
    driver = dataclasses.replace(QUICK, steps=20)
    whole = run_loop(driver, tmp_path / "whole")
    for workers, stop in ((0, 7), (1, 12), (0, 17)):
        with pytest.raises(Exception, match="a crash in the middle"):
            run_loop(dataclasses.replace(driver, workers=workers, max_failures=0), tmp_path / "parts", stop_after=stop)
    assert training.committed_step(str(tmp_path / "parts")) == 15  # the driver's; the worker's last one is of step 10
    again = run_loop(dataclasses.replace(driver, workers=1), tmp_path / "parts")
    assert training.committed_step(str(tmp_path / "parts")) == 20
    assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in whole.items())


# ------------------------------------------------------------------------------------------ schedule and average


def test_the_cosine_schedule_by_hand() -> None:
    # 10 steps, 2 of them rising: 1/2, 1, then cosines over 8 steps
    factors = [optimisation.warmup_cosine(step, 2, 10) for step in range(11)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert factors[4] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factors[10] == pytest.approx(0)
    assert optimisation.warmup_cosine(0, 0, 1) == 1.0


def test_a_moving_average_by_hand() -> None:
    average = optimisation.moving_average(0.9)
    old, new = torch.zeros(2), torch.ones(2)
    assert torch.allclose(average(old, new, 0), torch.full((2,), 0.9))  # forgets 9/10 at first
    assert torch.allclose(average(old, new, 10_000), torch.full((2,), 0.1))
    assert average(torch.tensor(3), torch.tensor(7), 5).item() == 7


def test_a_run_with_cosine_and_average_resumes_exactly(alone: None, tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, schedule="cosine", ema_decay=0.5)

    def steps(running: Session, count: int) -> None:
        for _ in range(count):
            step(running, running.step)

    whole = session(settings, tmp_path / "whole")
    steps(whole, 10)
    first = session(settings, tmp_path / "halves")
    steps(first, 5)
    first.checkpoint()
    second = session(settings, tmp_path / "halves")
    assert second.step == 5
    steps(second, 5)
    second.checkpoint()
    assert whole.average is not None
    weights = training.final_weights(str(tmp_path / "halves"))
    for name, value in whole.average.module.state_dict().items():
        assert torch.equal(value, weights[name]), name
        if name.endswith("0.weight"):
            assert not torch.equal(value, second.module.state_dict()[name]), name
    assert whole.optimiser.param_groups[0]["lr"] == second.optimiser.param_groups[0]["lr"] == pytest.approx(0)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(alone: None, tmp_path: Path) -> None:
    running = session(QUICK, tmp_path)
    for _ in range(3):
        step(running, running.step)
        running.checkpoint()
    assert {path.name for path in (tmp_path / "driver_checkpoint").iterdir()} == {"a", "b"}
    third = {name: value.clone() for name, value in running.module.state_dict().items()}
    # The fourth goes where the second was; the kill comes before its last file.
    (tmp_path / "driver_checkpoint/b/model.pt").write_bytes(b"half")
    again = session(QUICK, tmp_path)
    assert again.step == 3
    assert all(torch.equal(value, third[name]) for name, value in again.module.state_dict().items())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match=r"ema_decay: .*, expected 0 to less than 1"):
        dataclasses.replace(QUICK, ema_decay=decay)


def test_validation_reads_the_storage_of_the_drivers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray Train's workers have folders of their own.
    vocabulary = Vocabulary(("cat",), torch.eye(4)[:1], torch.tensor([True]))
    names = CodetNames({1: "cat"}, {"cat": "base"}, vocabulary, torch.eye(4)[:1], ("cat",), (1,))
    monkeypatch.chdir(tmp_path)
    assert validation_set(codet_configs.smoke(), names).storage == str(tmp_path / "store")

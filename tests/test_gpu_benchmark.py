"""`benchmarks/gpu.py` at tiny sizes, without a GPU."""

import gc
import json
import math
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_trials
import measure
import pytest
import torch
from gpu import TINY, Measured, Row, Step
from gpu_trials import PUBLISHED, Trial, build_trial, peer_trial, random_scene
from pretend_device import DEVICE, DeviceTensor, pretended
from torch import Tensor, nn
from torch.nn import functional as F

from workflows.common.optimisation import Optimisation

CPU = torch.device("cpu")
SETTINGS = Optimisation(steps=20, learning_rate=0.1, clip_norm=0.5, clip_value=0.1, workers=0)
FIGURES = {
    "images_per_second",
    "step_seconds",
    "peak_gb",
    "tflop_per_step",
    "share_of_peak",
    "host_waits",
    "torchvision_step_ratio",
}


def linear_trial(*, scale: float = 1.0) -> Trial:
    """Two layers on five rows."""
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * scale
    return Trial(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)),
        lambda model: {"one": model(inputs).square().mean(), "two": model(inputs).abs().mean()},
        SETTINGS,
        random_scene(1, (8, 8), 2),
        classes=2,
        sides=(8, 8),
    )


@pytest.mark.parametrize(
    "name",
    [
        "vild/lvis_r50",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("codet/lvis_swin_b", "ovsam/lvis_convnext_l")),
    ],
)
def test_a_config_is_measured(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    for module in (gpu, measure):
        monkeypatch.setattr(module, "BENCH", tmp_path)
    rows = gpu.measure_all([name], TINY, 0, CPU)
    gpu.report(rows, "CPU test", TINY)
    start = name.replace("/", "_")
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written.keys() == {f"{start}_{each}" for each in FIGURES} | {"device", "sizes", "commit", "machine"}
    assert (written["device"], written["sizes"]) == ("CPU test", "tiny")
    on_a_gpu = {f"{start}_{each}" for each in ("peak_gb", "share_of_peak", "host_waits")}
    assert all(written[each] is None for each in on_a_gpu)
    values = [value for key, value in written.items() if key.startswith(start) and key not in on_a_gpu]
    assert all(math.isfinite(value) and value > 0 for value in values)
    printed = capsys.readouterr().out
    assert "tiny sizes, not the published ones" in printed
    assert f"| {name.replace('/', ' ')} | 2" in printed
    assert printed.strip().splitlines()[1:] == (tmp_path / "gpu.md").read_text().strip().splitlines()[1:]


def test_every_published_config_is_measured_or_has_an_equal() -> None:
    for method, configs in gpu_trials.CONFIGS.items():
        small = {name for name in configs if name.startswith(("smoke", "pictograms", "finetune"))}
        equal = {"lvis_rn50x16", "photos_8gpu", *(name for name in configs if name.endswith("_short"))}
        expected = configs.keys() - small - equal - {"photos", "photos_laptop"}
        assert set(PUBLISHED[method]) == expected


@pytest.mark.parametrize(
    ("name", "batch", "images", "captioned", "side"),
    [
        ("vild/lvis_r50", 0, 8, 0, 1024),  # 256 on 32 GPUs
        ("vild/coco_48_17", 3, 3, 0, 1024),
        ("codet/coco_r50", 0, 2, 8, 480),  # 16 and 32 groups of 2 on 8
        ("codet/lvis_r50", 0, 8, 32, 800),  # 64 and 32 groups of 8 on 8
        ("codet/lvis_r50", 2, 2, 8, 800),
        ("codet/lvis_swin_b", 0, 4, 16, 896),  # 32 and 16 groups of 8 on 8
        ("codet/lvis_eva", 0, 2, 16, 1280),  # 32 and 32 groups of 8 on 16
        ("codet/lvis_eva", 1, 1, 8, 1280),
        ("ovsam/lvis_convnext_l", 0, 2, 0, 1024),  # 16 on 8
    ],
)
def test_a_gpu_gets_its_part_of_the_published_batch(
    name: str, batch: int, images: int, captioned: int, side: int
) -> None:
    trial = build_trial(name, batch, CPU, tiny=False)
    assert (trial.scene.num_images, trial.captioned) == (images, captioned)
    assert trial.scene.images[0].shape[1] == side


def test_the_scene_has_masks_of_its_boxes() -> None:
    torch.manual_seed(0)
    scene = random_scene(2, (40, 60), 3)
    assert scene.masks is not None
    for box_N4, mask_NHW, label_N in zip(scene.boxes, scene.masks, scene.labels, strict=True):
        assert mask_NHW.shape == (gpu_trials.OBJECTS, 40, 60)
        assert (box_N4[:, 2] <= 60).all() and (box_N4[:, 3] <= 40).all() and (box_N4 >= 0).all()
        for (x0, y0, x1, y1), mask in zip(box_N4.int().tolist(), mask_NHW, strict=True):
            assert mask.sum() == (x1 - x0) * (y1 - y0) > 0
        assert label_N.shape == (gpu_trials.OBJECTS,) and label_N.max() < 3


# -------------------------------------------------------------------------------------------------------- measurement


def test_flops_of_two_layers_are_those_counted_by_hand() -> None:
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    # Forward 2 x 5 x 3 x 4 = 120 and 2 x 5 x 4 x 2 = 80; weights' gradients the same; inputs' of the second layer: 80.
    assert gpu.count_flops(lambda: torch.autograd.backward(model(inputs).sum()), CPU) == 480
    assert gpu.count_flops(lambda: None, CPU) == 0


def test_flops_of_attention_are_counted() -> None:
    query, key, value = (torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3))

    def job() -> None:
        torch.autograd.backward(F.scaled_dot_product_attention(query, key, value).sum())

    assert gpu.count_flops(job, CPU) == 6 * 2 * 5 * 5 * 4  # two products forward, four backward


def test_steps_train() -> None:
    step = Step(linear_trial(), CPU)
    before = sum(map(float, step().values()))
    for _ in range(3):
        step()
    assert sum(map(float, step().values())) < before


@pytest.mark.parametrize("name", ["vild/lvis_r50", "codet/coco_r50", "codet/lvis_eva", "ovsam/coco_rn50x16", "peer"])
def test_a_step_runs_by_the_rules_of_a_gpu(name: str) -> None:
    with pretended():
        trial = build_trial("vild/lvis_r50" if name == "peer" else name, 0, DEVICE, tiny=True)
        step = Step(peer_trial(trial, DEVICE, tiny=True) if name == "peer" else trial, DEVICE)
        assert all(math.isfinite(float(value)) for value in step().values())
        gradients = [value.grad for value in step.session.module.parameters() if value.grad is not None]
        assert gradients and all(isinstance(value, DeviceTensor) for value in gradients)


def test_only_synchronisations_are_counted_as_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def job() -> None:
        assert modes == ["warn"]
        for message in (f"{gpu.SYNCHRONISES} (Triggered internally)", "another", gpu.SYNCHRONISES, gpu.SYNCHRONISES):
            warnings.warn(message, stacklevel=1)

    assert gpu.count_waits(job) == 3
    assert modes == ["warn", "default"]


@pytest.mark.parametrize(
    ("error", "note"),
    [(torch.OutOfMemoryError("all full"), "out of memory"), (ValueError("no such\nkernel"), "failed: no such")],
)
def test_a_config_that_fails_does_not_end_the_others(
    error: Exception, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[nn.Module]] = []
    peers: list[Trial] = []

    def losses(model: nn.Module) -> dict[str, Tensor]:
        models.append(weakref.ref(model))
        raise type(error)(*error.args)  # a new one, whose traceback the test does not hold

    def make_peer(trial: Trial, *_: Any, **__: Any) -> Trial:
        gc.collect()
        assert models[0]() is None  # nothing holds the failed model
        peers.append(trial)
        return linear_trial()

    broken = replace(linear_trial(), losses=losses)
    trials = {"codet/lvis_eva": broken, "vild/lvis_r50": linear_trial(), "vild/lvis_r152": linear_trial()}
    monkeypatch.setattr(gpu, "build_trial", lambda name, *_, **__: trials[name])
    monkeypatch.setattr(gpu, "peer_trial", make_peer)
    rows = gpu.measure_all(list(trials), TINY, 0, CPU)
    assert [row.note for row in rows] == [note, "", ""]
    assert [row.ours is None for row in rows] == [True, False, False]
    assert rows[0].figures(None) == {} and f"| {note} |" in gpu.table(rows, None)
    assert len(peers) == 1 and rows[0].peer is rows[1].peer is rows[2].peer  # equal sizes are measured once


def test_a_loss_that_is_not_finite_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "build_trial", lambda *_, **__: linear_trial(scale=float("inf")))
    monkeypatch.setattr(gpu, "peer_trial", lambda *_, **__: linear_trial())
    assert gpu.measure_all(["vild/lvis_r50"], TINY, 0, CPU)[0].note == "the loss is not finite"


def test_no_config_is_begun_after_the_time_is_over() -> None:
    rows = gpu.measure_all(["vild/lvis_r50", "codet/lvis_r50"], TINY, 0, CPU, minutes=-1)
    assert [row.ours for row in rows] == [None, None]
    assert all("not run" in row.note for row in rows)


# ------------------------------------------------------------------------------------------------------------- report


def test_figures_of_a_step_are_those_worked_by_hand() -> None:
    ours = Measured(seconds=0.5, flops=100 * 10**12, peak_gb=20.0, waits=7, loss=1.0)
    row = Row("codet/lvis_r50", 8, 32, ours, replace(ours, seconds=0.25))
    assert row.figures(400.0) == {
        "images_per_second": 80.0,
        "step_seconds": 0.5,
        "peak_gb": 20.0,
        "tflop_per_step": 100.0,
        "share_of_peak": 0.5,
        "host_waits": 7,
        "torchvision_step_ratio": 2.0,
    }
    assert gpu.line(row, 400.0) == "| codet lvis_r50 | 8 + 32 captioned | 80.0 | 20.0 | 100 | 50.0% | 7 | 2.00 |  |"
    assert gpu.line(row, None) == "| codet lvis_r50 | 8 + 32 captioned | 80.0 | 20.0 | 100 |  | 7 | 2.00 |  |"


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GH200 480GB", None),
        ("CPU x86_64", None),
    ],
)
def test_the_peak_of_a_card_is_known_by_its_full_name(card: str, peak: float | None) -> None:
    assert gpu.peak_of(card) == peak

"""Every published config, with sizes alone made small, on sets in LVIS's and COCO's form.

Each trains on two gloo workers. A second run is killed in its last stage by SIGKILL of its workers after a checkpoint,
resumed, and must end with the weights of the undisturbed one.
"""

import dataclasses
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import descendants, kill
from published import NAMED, prepare_world, small_run
from trainings import LAST, TRAIN, largest_difference, weights_of

from ovd_models.codet.model import CoDet
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import OvSam, published
from ovd_models.vild.model import ViLD
from workflows import clip
from workflows.common import cli, tracking, training

SIZES = {
    *("side", "min_size", "max_size", "image_size", "patch_size", "caption_sizes", "batch_size", "detection_batch"),
    *("groups_per_step", "layers", "depths", "depth", "channels", "stem_width", "width", "embed_dim", "hidden"),
    *("heads", "num_heads", "window", "global_blocks", "head_width", "pyramid_channels", "prompt_width"),
    *("mask_channels", "decoder_heads", "decoder_mlp", "iou_width", "adapter_depth", "pyramid_width", "label_hidden"),
    *("rpn_batch_size", "pre_nms", "post_nms", "rois_per_image", "max_proposals", "num_proposals", "regions_per_step"),
    *("num_points", "prompts_per_image", "rows_per_shard", "eval_images"),
}
LENGTHS = {"steps", "learning_rate", "checkpoint_every", "log_every", "workers", "use_gpu", "max_failures"}
"""The learning rate follows the batch."""
PLACES = {"storage", "pairs", "teacher", "sam", "from_scratch", "actors", "gpus"}
EVERY = [(method, name) for method, configs in NAMED.items() for name in configs]


@pytest.fixture(scope="module")
def world(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    prepare_world(root)
    return root


def curves_of(storage: str, run_id: str, part: str) -> dict[str, list[tuple[int, float]]]:
    """Metrics by step whose names contain `part`; none may be infinite or undefined."""
    history = tracking.metric_history(tracking.tracking_uri(storage), run_id, "")
    found = {name: points for name, points in history.items() if part in name}
    assert found, part
    for name, points in found.items():
        assert all(math.isfinite(value) for _, value in points), name
    return found


class Killer:
    """Kills the workers of a run's last stage once it has a checkpoint."""

    def __init__(self, folder: Callable[[], str]) -> None:
        self.folder, self.killed = folder, False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            folder = self.folder()
            if folder and 0 < training.committed_step(folder) < 20:
                kill(found := workers())
                self.killed = bool(found)
                if found:
                    return


def workers() -> list[int]:
    """Process ids of the training workers that this process started."""
    return [pid for pid in descendants() if b"RayTrainWorker" in command_line(pid)]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("method", "name"), EVERY)
def test_a_published_config_trains_resumes_and_is_evaluated(method: str, name: str, world: Path) -> None:
    run = small_run(method, name, world)
    storage = run.storage
    whole = TRAIN[method](run)
    curves = curves_of(storage, whole.run_id, "train/loss_")
    before = set((Path(storage) / "runs" / method).glob(f"{run.config}-*"))

    def last_stage() -> str:
        new = set((Path(storage) / "runs" / method).glob(f"{run.config}-*")) - before
        return str(next(iter(new)) / LAST[method]) if new else ""

    with Killer(last_stage) as killer, pytest.raises(Exception, match=r"(?i)worker|died|failed"):
        TRAIN[method](run)
    assert killer.killed
    resumed = TRAIN[method](dataclasses.replace(run, resume=Path(last_stage()).parent.name))
    assert largest_difference(weights_of(resumed.model), weights_of(whole.model)) <= 1e-5
    curves_of(storage, resumed.run_id, "eval/")
    for stage, points in curves_of(storage, resumed.run_id, "train/loss_").items():  # from the checkpoint on
        expected = dict(curves[stage])
        assert dict(points) == pytest.approx({step: expected[step] for step, _ in points}, abs=1e-5), stage


# ------------------------------------------------------------------------------------------------ without training


@pytest.mark.parametrize(("method", "name"), EVERY)
def test_a_published_config_builds_its_model_at_full_size(method: str, name: str, tmp_path: Path) -> None:
    run: Any = NAMED[method][name]()
    with torch.device("meta"):
        if method == "vild":
            model: torch.nn.Module = ViLD(run.model)
        elif method == "codet":
            model = CoDet(run.model)
        elif method == "ovsam":
            model = OvSam(published(TowerConfig(), run.sam_model))
        else:
            model = clip.Clip(run.model)
    assert sum(value.numel() for value in model.parameters()) > 1e6
    full, small = cli.flatten(run), cli.flatten(small_run(method, name, tmp_path))
    changed = {key for key in {**full, **small} if full.get(key) != small.get(key)}
    assert {key.rpartition(".")[2] for key in changed} <= SIZES | LENGTHS | PLACES

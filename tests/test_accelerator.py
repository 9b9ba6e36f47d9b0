"""Every model on a pretended accelerator: a training step, and what it answers."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import host_waits
import numpy as np
import pytest
import torch
from host_waits import C4, CASCADE, CENTERNET2, FPN, OVSAM, RCNN, SAM, Trial, learned, unit
from PIL import Image
from pretend_device import DEVICE, DeviceTensor, pretended
from torch import nn

from data_prep.embeddings.teachers import EmbedConfig, Teacher
from ovd_models.batches import Detections
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, save_clip, zero_shot_logits
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.region_query import RegionQuery
from ovd_models.evaluation import evaluate_detections
from ovd_models.ovsam.baselines import BaselineConfig, SamClip
from ovd_models.ovsam.clip_pyramid import ClipPyramid, build_tower
from ovd_models.ovsam.metrics import PointingMetrics, centre_points
from ovd_models.ovsam.model import OvSam
from ovd_models.ovsam.text_to_mask import WINDOWS, TextToMask, TextToMaskConfig, TextToMaskModelConfig
from ovd_models.sam.model import EverythingConfig, SamModel
from ovd_models.sam.training import mask_ious
from ovd_models.segments import Prompts, Segments
from ovd_models.vild.model import Variant, ViLD, ViLDConfig
from ovd_models.vocabulary import Vocabulary
from workflows.common.optimisation import Precision

NAMES = Vocabulary(("red", "blue"), unit(2, 16), torch.tensor([True, False]))
PHOTO = host_waits.boxes().images[0]

TRIALS: dict[str, Callable[[], Trial]] = {
    **{f"vild-{variant}": lambda variant=variant: host_waits.vild_trial(variant) for variant in get_args(Variant)},
    "vild-convolutions": lambda: Trial(
        ViLD(ViLDConfig(detector=replace(RCNN, head_convs=1))), host_waits.vild_trial().losses
    ),
    "codet-fpn": lambda: host_waits.codet_trial(FPN),
    "codet-fpn-learned": lambda: host_waits.codet_trial(learned(FPN)),
    "codet-fpn-top_k": lambda: host_waits.codet_trial(replace(FPN, aggregation="top_k")),
    "codet-fpn-attention": lambda: host_waits.codet_trial(replace(FPN, aggregation="attention")),
    "codet-fpn-region_text": lambda: host_waits.codet_trial(replace(FPN, supervision="region_text")),
    "codet-fpn-max_size": lambda: host_waits.codet_trial(replace(FPN, supervision="max_size")),
    "codet-fpn-sizes": lambda: host_waits.codet_trial(replace(FPN, caption_sizes=(32, 64))),
    "codet-c4": lambda: host_waits.codet_trial(CoDetConfig(architecture="c4", detector=C4, num_proposals=6)),
    "codet-c4-learned": lambda: host_waits.codet_trial(
        learned(CoDetConfig(architecture="c4", detector=C4, num_proposals=6))
    ),
    "codet-centernet2": lambda: host_waits.codet_trial(
        CoDetConfig(architecture="centernet2", centernet2=CENTERNET2, num_proposals=6)
    ),
    "codet-centernet2-learned": lambda: host_waits.codet_trial(CASCADE),
    "clip": lambda: host_waits.clip_trial(1),
    "clip-chunks": lambda: host_waits.clip_trial(2),
    "sam": host_waits.sam_trial,
    "ovsam-adapter": host_waits.adapter_trial,
    "ovsam-head": host_waits.ovsam_trial,
    "ovsam-head-released": lambda: host_waits.ovsam_trial(
        replace(OVSAM, label_hidden=0, label_token=True, iou_head=False)
    ),
    "text-to-mask": host_waits.text_trial,
}


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
@pytest.mark.parametrize("name", ["vild-ensemble", "codet-centernet2", "clip", "sam", "ovsam-head", "text-to-mask"])
def test_a_model_trains_in_reduced_precision(name: str, precision: Precision) -> None:
    torch.manual_seed(0)
    trial = TRIALS[name]()
    settings = replace(host_waits.SETTINGS, precision=precision)
    # On a CPU, oneDNN's bfloat16 gradient of a convolution whose output is one pixel is NaN now and then.
    with torch.backends.mkldnn.flags(enabled=False):
        session = host_waits.train(trial, 2, torch.device("cpu"), settings)
    losses = {name: value for name, value in session.meter.collect().items() if "/loss_" in name}
    assert losses
    assert all(math.isfinite(value) for value in losses.values())
    assert all(value.dtype == torch.float32 for value in session.module.parameters())


@pytest.mark.parametrize("name", TRIALS)
def test_a_model_trains_on_an_accelerator(name: str) -> None:
    torch.manual_seed(0)
    trial = TRIALS[name]()
    before = [value.detach().clone() for value in trial.model.parameters() if value.requires_grad]
    with pretended():
        session = host_waits.train(trial, 1)
        trained = [value for value in session.module.parameters() if value.requires_grad]
        assert all(isinstance(value, DeviceTensor) and isinstance(value.grad, DeviceTensor) for value in trained)
        assert all(math.isfinite(value) for value in session.meter.collect().values())
        assert any(not torch.equal(value.cpu(), old) for value, old in zip(trained, before, strict=True))


# ----------------------------------------------------------------------------------------------------------- answers


def moved(model: nn.Module) -> Any:
    return model.to(DEVICE).eval()


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"vild-{variant}": lambda variant=variant: ViLD(
            ViLDConfig(detector=replace(RCNN, masks=True), variant=variant, supervised_names=("red",))
        )
        for variant in get_args(Variant)
    },
    "codet-fpn": lambda: CoDet(FPN),
    "codet-c4": lambda: CoDet(CoDetConfig(architecture="c4", detector=C4)),
    "codet-centernet2": lambda: CoDet(CASCADE),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_answers_on_an_accelerator(name: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model = DETECTORS[name]()
    with pretended(autocast=autocast):
        found = moved(model).detect([PHOTO.to(DEVICE)], NAMES.to(DEVICE), score_threshold=0.0, max_detections=5)[0]
        assert found.boxes.device == found.scores.device == found.labels.device == DEVICE
        assert len(found.to_list()) == len(found) > 0
        assert len(found.filter(min_score=0.0).distinct().with_area()) <= len(found)
        found.draw(image=host_picture())


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_within_autocast_are_whole_pixels_and_more(name: str) -> None:
    torch.manual_seed(0)
    model = DETECTORS[name]().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as in a validation between two steps
        found = model.detect([PHOTO], NAMES, score_threshold=0.0, max_detections=5)[0]  # type: ignore[operator]
    assert found.boxes.numpy().dtype == found.scores.numpy().dtype == np.float32  # bfloat16 has no numpy type


def host_picture() -> Image.Image:
    return Image.fromarray(PHOTO.permute(1, 2, 0).numpy())


def test_detections_of_an_accelerator_are_measured() -> None:
    with pretended():
        box = torch.tensor([[6.0, 8, 26, 28]], device=DEVICE)
        label = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        found = Detections(box, torch.tensor([0.9], device=DEVICE), label, ("red",), 64, 64)
        row = {"width": 64, "height": 64, "boxes": [[6.0, 8, 26, 28]], "category_ids": [1], "iscrowd": [False]}
        metrics = evaluate_detections([row], [found], {1: "red"}, {"red": "base"})
    assert metrics.summary()["ap50_all"] == 1.0


def test_regions_of_an_accelerator_are_queried() -> None:
    torch.manual_seed(0)
    with pretended():
        model = moved(ViLD(ViLDConfig(detector=RCNN)))
        query = RegionQuery(NAMES, NAMES, NAMES, torch.tensor([0, 0])).to(DEVICE)
        found = model.find_in_records(model.record_regions([PHOTO.to(DEVICE)]), query, score_threshold=0.0)[0]
        assert found.boxes.device == DEVICE


def test_groups_are_explained_on_an_accelerator() -> None:
    torch.manual_seed(0)
    with pretended():
        explained = moved(CoDet(FPN)).explain(host_waits.groups().to(DEVICE), unit(3, 16).to(DEVICE))
        assert all(entry.device == DEVICE for group in explained for entry in group.attention)


WORDS = Vocabulary(("red", "blue"), unit(2, 128), torch.tensor([True, False]))
ASKED = [Prompts.create(points=[[16, 18]]), Prompts.create(boxes=[[4, 4, 30, 40], [10, 0, 64, 48]])]
EVERYTHING = EverythingConfig(points_per_side=2, min_iou=-1e9, min_stability=-1.0)


def check(found: Segments) -> None:
    assert found.masks.device == found.scores.device == DEVICE
    metrics = PointingMetrics()
    truth = torch.zeros_like(found.masks)
    metrics.add(mask_ious(found.masks.flatten(1), truth.flatten(1)), found.labels.tolist(), [0] * len(found), [])
    assert len(centre_points(found.masks)) == len(found.to_list()) == len(found)
    found.draw(image=host_picture())


@pytest.mark.parametrize("prompts", ASKED)
def test_sam_answers_on_an_accelerator(prompts: Prompts) -> None:
    torch.manual_seed(0)
    with pretended():
        sam = moved(SamModel(SAM))
        first = sam.segment(PHOTO.to(DEVICE), prompts)
        check(first)
        check(sam.segment(PHOTO.to(DEVICE), replace(prompts, masks=first.low_res)))


@pytest.mark.parametrize("view", ["features", "cut_out"])
@pytest.mark.parametrize("prompts", ASKED)
def test_ovsam_answers_on_an_accelerator(prompts: Prompts, view: Any) -> None:
    torch.manual_seed(0)
    with pretended():
        model = moved(OvSam(replace(OVSAM, clip_view=view)))
        check(model.segment(PHOTO.to(DEVICE), prompts, WORDS.to(DEVICE)))
        assert model.everything(PHOTO.to(DEVICE), WORDS.to(DEVICE), EVERYTHING).masks.device == DEVICE


@pytest.mark.parametrize(
    ("crop", "background"), [("image", "keep"), ("image", "mean"), ("mask_features", "keep"), ("roi_features", "keep")]
)
def test_a_baseline_answers_on_an_accelerator(crop: Any, background: Any) -> None:
    torch.manual_seed(0)
    with pretended():
        clip = ClipPyramid(build_tower(OVSAM.tower, SAM.image_size), OVSAM.tower)
        model = moved(SamClip(SamModel(SAM), clip, BaselineConfig(crop=crop, background=background)))
        check(model.segment(PHOTO.to(DEVICE), ASKED[1], WORDS.to(DEVICE)))


def test_names_prompt_masks_on_an_accelerator() -> None:
    torch.manual_seed(0)
    with pretended():
        model = moved(TextToMask(TextToMaskModelConfig(sam=SAM, text=TextToMaskConfig(windows=WINDOWS))))
        model.set_text_centre(WORDS.embeddings.to(DEVICE))
        check(model.segment_text(PHOTO.to(DEVICE), WORDS.embeddings.to(DEVICE)))


def test_a_teacher_embeds_on_an_accelerator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), tmp_path)
    teacher = Teacher(str(tmp_path), EmbedConfig())
    pixels = np.stack([PHOTO.permute(1, 2, 0).numpy()] * 2)
    expected = teacher.embed_squares([lambda: pixels]), teacher.embed_texts(["a cat", "a dog"])
    with pretended():
        teacher.device, teacher.half = DEVICE, True
        moved(teacher.clip)
        for found, value in zip(
            (teacher.embed_squares([lambda: pixels]), teacher.embed_texts(["a cat", "a dog"])), expected, strict=True
        ):
            np.testing.assert_allclose(found, value, atol=0.05)


def test_names_are_embedded_and_pictures_classified_on_an_accelerator() -> None:
    torch.manual_seed(0)
    clip = Clip(ClipConfig())
    with pretended(autocast=True):
        moved(clip)
        names = ClipTextEncoder(clip.config, clip.model.text, "clip:test").embed_names(["cat", "dog"])
        assert names.device.type == "cpu"
        assert zero_shot_logits(clip, PHOTO[None].to(DEVICE), names.to(DEVICE)).shape == (1, 2)


@pytest.mark.parametrize(
    ("method", "limit"), [("codet", 20), ("centernet2", 43), ("vild", 15), ("clip", 3), ("sam", 2), ("ovsam", 3)]
)
def test_a_step_rarely_waits_for_the_device(waits: dict[str, float], method: str, limit: float) -> None:
    assert waits[f"host_waits_{method}"] <= limit


@pytest.fixture(scope="module")
def waits() -> dict[str, float]:
    return host_waits.measure_waits()

"""Exported files compute what the models' own inference computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from distinct_regions import spread_out
from tiny_centernet2 import TINY_CENTERNET2
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms

from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.c4 import coco_r50_c4
from ovd_models.detectors.eva import EvaConfig
from ovd_models.detectors.rcnn import RCNN, RCNNConfig
from ovd_models.detectors.resizing import Selection, build_transform, select_detections
from ovd_models.errors import InputError
from ovd_models.export.files import in_order_of, open_session, run_session, write_part
from ovd_models.export.parts import (
    SIZES,
    detect,
    detector_part,
    example_images,
    export_detector,
    image_tower_part,
    name_weights,
    ovsam_parts,
    sam_parts,
    text_tower_part,
)
from ovd_models.export.programs import write_program
from ovd_models.export.quantise import quantise
from ovd_models.export.tracing import resize_traced, select_traced
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import OvSam, OvSamConfig, published
from ovd_models.sam.model import SamConfig, SamModel
from ovd_models.segments import Prompts
from ovd_models.vild.model import ViLD, ViLDConfig
from ovd_models.vocabulary import Vocabulary

C4 = replace(coco_r50_c4(), backbone="resnet18", head_width=512, min_size=96, max_size=160, pre_nms=200, post_nms=50)
CENTRES = replace(
    TINY_CENTERNET2,
    embed_dim=16,
    min_size=128,
    max_size=200,
)
SWIN = {"patch_size": [4, 4], "window_size": [7, 7], "embed_dim": 8, "depths": [2] * 4, "num_heads": [1, 2, 2, 4]}
MASKS = RCNNConfig(masks=True)


def centernet2(**changes: Any) -> CoDet:
    return CoDet(CoDetConfig(architecture="centernet2", centernet2=replace(CENTRES, **changes)))


TOWERS = {
    "flat": TowerConfig(),
    "resnet": TowerConfig(
        embed_dim=16,
        vision={"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None},
    ),
    "transformer": TowerConfig(embed_dim=16, vision={"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}),
}
MODELS = {
    "centernet2": centernet2,
    "centernet2_without_masks": lambda: centernet2(mask_convs=0),
    "swin": lambda: centernet2(backbone="swin", backbone_options=SWIN),
    "vild_masks": lambda: ViLD(ViLDConfig(detector=MASKS)),
    "fpn": lambda: CoDet(CoDetConfig()),
    "c4": lambda: CoDet(CoDetConfig(architecture="c4", detector=C4)),
    "ensemble": lambda: ViLD(ViLDConfig()),
    "text": lambda: ViLD(ViLDConfig(variant="text")),
    "image": lambda: ViLD(ViLDConfig(variant="image")),
}


def names(width: int, count: int = 7) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(1)), dim=1)


@pytest.mark.parametrize("kind", MODELS)
def test_a_detector_finds_the_same_on_any_size_and_with_any_names(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = spread_out(MODELS[kind]())
    threshold = 0.05 if isinstance(model, ViLD) else 0.5 if isinstance(model.detector, RCNN) else 0.2
    part = detector_part(model, example_images(SIZES), names(model.detector.config.embed_dim), threshold)
    counts = [len(part.eager(*example)[1]) for example in part.examples]
    assert min(counts) > 0
    assert write_part(part, tmp_path) <= 1e-4
    # A size and a number of names that were not traced, and no name above the threshold.
    session = open_session(tmp_path / "detector.onnx", threads=1)
    (image,) = example_images([(150, 90)])
    rows = names(model.detector.config.embed_dim, 3)
    weights = () if len(part.inputs) == 3 else (part.examples[0][3][:3],)
    assert ("masks" in part.outputs) == (kind in ("centernet2", "swin", "vild_masks"))
    for limit in (threshold / 2, 1.0):
        inputs = (image, rows, torch.tensor(limit), *weights)
        boxes, scores, labels, *masks = run_session(session, part, inputs)
        expected = detect(model, *inputs)
        assert boxes.shape == (len(expected[1]), 4)
        assert np.allclose(scores, expected[1], atol=1e-4)
        assert np.allclose(boxes, expected[0], atol=1e-2)
        assert labels.tolist() == expected[2].tolist()
        assert (len(scores) > 0) == (limit < 1)
        for mask in masks:
            assert mask.shape == (len(scores), 28, 28)
            assert np.allclose(mask, expected[3], atol=1e-4)


def test_of_many_candidates_the_best_are_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(600, 2, generator=generator) * 10
    boxes, scores = torch.cat((corner, corner + 40), 1), torch.rand(600, 20, generator=generator)
    expected = select_detections(boxes, scores, Selection(nms=0.5, score_threshold=0.1, max_detections=30))
    region, label = torch.where(scores > 0.1)
    every = batched_nms(boxes[region], scores[region, label], label, 0.5)[:30]
    assert torch.equal(expected[0], boxes[region[every]])
    found = select_traced(boxes, scores, torch.tensor(0.1), 0.5, 30)
    assert 0 < len(found[0]) < len(every)  # a graph stops at 20 candidates for each
    assert all(torch.equal(ours, theirs[: len(ours)]) for ours, theirs in zip(found, expected, strict=True))


def test_clips_towers_take_batches_of_any_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Clip(ClipConfig()).eval()
    transformer = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}
    encoder = ClipTextEncoder(model.config, model.model.text, "any")
    for part in (
        image_tower_part(model),
        image_tower_part(Clip(ClipConfig(vision=transformer)).eval()),
        text_tower_part(encoder),
    ):
        assert write_part(part, tmp_path) <= 1e-4
    session = open_session(tmp_path / "text_tower.onnx")
    tokens = encoder.tokenizer(["a cat"] * 5)
    (rows,) = run_session(session, text_tower_part(encoder), (tokens,))
    assert np.allclose(rows, encoder.embed_captions(["a cat"] * 5), atol=1e-5)


def test_sams_parts_equal_its_predictor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SamModel(SamConfig(image_size=64, width=32, depth=2, global_blocks=(1,), prompt_width=32)).eval()
    for part in sam_parts(model):
        assert write_part(part, tmp_path) <= 1e-4


@pytest.mark.slow
def test_torch_export_captures_what_it_is_said_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sam = SamConfig(image_size=64, width=32, depth=1, heads=2, global_blocks=(), prompt_width=32)
    clip, ovsam = Clip(ClipConfig()).eval(), OvSam(OvSamConfig(sam=sam)).eval()
    released = OvSam(published(TOWERS["flat"], sam)).eval()
    detector = spread_out(CoDet(CoDetConfig()))
    parts = [
        image_tower_part(clip),
        text_tower_part(ClipTextEncoder(clip.config, clip.model.text, "any")),
        *sam_parts(SamModel(sam).eval()),
        *ovsam_parts(ovsam, names(128), torch.ones(7, dtype=torch.bool)),
        *ovsam_parts(released, names(128), torch.ones(7, dtype=torch.bool)),
        detector_part(detector, example_images(SIZES), names(128), 0.5),
    ]
    for part in parts:
        if part.program:
            assert write_program(part, tmp_path) <= 1e-4
        else:
            with pytest.raises((RuntimeError, AssertionError, torch._dynamo.exc.UserError)):
                write_program(part, tmp_path)
    assert [part.name for part in parts if not part.program] == ["ovsam_decoder", "detector"]


@pytest.mark.parametrize(
    ("tower", "view", "released", "levels"),
    [
        ("flat", "features", False, 4),
        ("flat", "cut_out", True, 3),
        ("resnet", "features", True, 4),
        ("resnet", "cut_out", False, 1),
        ("transformer", "features", True, 4),
        ("transformer", "cut_out", False, 4),
    ],
)
def test_an_ovsam_segments_and_names_as_its_own_inference_does(
    tower: str, view: Literal["features", "cut_out"], released: bool, levels: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sam = SamConfig(image_size=64, width=32, depth=2, heads=2, global_blocks=(1,), prompt_width=32)
    config = (
        replace(published(TOWERS[tower], sam), clip_view=view)
        if released
        else OvSamConfig(sam=sam, tower=TOWERS[tower], clip_view=view, novel_bias=0.5)
    )
    config = replace(config, label_levels=levels)
    model = OvSam(config).eval()
    text = names(config.tower.embed_dim)
    base = torch.arange(len(text)) % 2 == 0
    parts = ovsam_parts(model, text, base)
    assert [part.name for part in parts] == ["ovsam_encoder", "ovsam_decoder", "ovsam_namer"]
    assert ("ious" in parts[1].outputs) == (not released)
    for part in parts:
        assert write_part(part, tmp_path) <= 1e-4
    # The three files, one after the other, on a size and a number of prompts and names that were not traced.
    (image,) = example_images([(40, 64)])
    sessions = [open_session(tmp_path / f"{part.name}.onnx", threads=1) for part in parts]
    embedding, *pyramid, top = map(torch.from_numpy, run_session(sessions[0], parts[0], (image,)))
    size, corners = torch.tensor([40, 64]), torch.tensor([[[3.0, 4.0], [30.0, 28.0]]] * 4)
    boxed = (embedding, corners, torch.tensor([[2, 3]] * 4), size, size)
    masks = torch.from_numpy(run_session(sessions[1], parts[1], boxed)[0])
    seen = image if view == "cut_out" else top
    given = (*pyramid, seen, masks, corners.flatten(1), text[:5], *name_weights(model, base[:5]))
    (scores,) = run_session(sessions[2], parts[2], given)
    prompts = Prompts.create(boxes=corners.flatten(1).tolist())
    expected = model.segment(image.permute(2, 0, 1), prompts, Vocabulary(tuple("abcde"), text[:5], base[:5]))
    assert torch.equal(masks[:, 0] > 0, expected.masks)
    assert np.allclose(scores.max(1), expected.scores, atol=1e-4)
    assert scores.argmax(1).tolist() == expected.labels.tolist()


def test_a_file_that_computes_something_else_is_refused_and_removed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    part = image_tower_part(Clip(ClipConfig()).eval())
    for eager, message in (
        (lambda images: (part.eager(images)[0] + 1e-3,), r"embeddings is 1.0e-03 off, expected PyTorch's"),
        (lambda images: (part.eager(images)[0][:, 1:],), r"shape \[2, 128\], expected PyTorch's \[2, 127\]"),
    ):
        with pytest.raises(InputError, match=message):
            write_part(replace(part, eager=eager), tmp_path)
        assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line() -> None:
    supervised = ViLD(ViLDConfig(variant="supervised", supervised_names=("cat",)))
    with pytest.raises(InputError, match="a ViLD with names of its own"):
        export_detector(supervised)
    eva = EvaConfig(width=32, depth=3, heads=2, hidden=40)
    with pytest.raises(InputError, match="a detector on EVA-02: not exported"):
        export_detector(centernet2(backbone="eva02", eva=eva, strides=(4, 8, 16, 32)))


def test_an_8_bit_detector_is_smaller_and_finds_nearly_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = spread_out(CoDet(CoDetConfig()))
    part = detector_part(model, example_images(SIZES), names(128), 0.5)
    write_part(part, tmp_path)
    whole, small = tmp_path / "detector.onnx", tmp_path / "int8.onnx"
    quantise(part, whole, small, part.examples)
    assert small.stat().st_size < 0.4 * whole.stat().st_size
    ours = run_session(open_session(small), part, part.examples[0])[1]
    theirs = run_session(open_session(whole), part, part.examples[0])[1]
    assert abs(float(ours[:10].mean()) - float(theirs[:10].mean())) < 0.1


def test_a_traced_graph_resizes_pictures_of_all_sizes_as_training_does() -> None:
    transform = build_transform(128, 256, 16)

    def resized(pixels_3HW: Tensor) -> Tensor:
        return resize_traced(transform, pixels_3HW).tensors

    traced = torch.jit.trace(resized, torch.rand(3, 60, 80), check_trace=False)
    for height in range(20, 420):  # of 374 x 500 pixels, float32 makes 127 x 171
        pixels = torch.rand(3, height, 500 if height > 300 else height + 37)
        expected = transform([pixels])[0].tensors
        assert torch.allclose(traced(pixels), expected, atol=1e-5), height


def test_detections_of_almost_equal_scores_may_come_in_any_order() -> None:
    boxes = torch.tensor([[1.0, 2, 30, 40], [50, 2, 90, 40], [1, 2, 30, 40]])
    expected = (boxes, torch.tensor([0.9, 0.5, 0.5]), torch.tensor([3, 4, 5]), torch.rand(3, 2, 2))
    swapped = [value[torch.tensor([0, 2, 1])] for value in expected]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(in_order_of(expected, swapped), expected, strict=True))
    other = [swapped[0] + 7, *swapped[1:]]
    assert not torch.allclose(in_order_of(expected, other)[0], boxes)
    fewer = [value[:2] for value in expected]
    assert [len(value) for value in in_order_of(expected, fewer)] == [2] * 4
    twice = [value[torch.tensor([0, 1, 1])] for value in expected]
    assert torch.equal(in_order_of(expected, twice)[2], twice[2])

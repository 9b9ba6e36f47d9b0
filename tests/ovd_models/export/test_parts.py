"""Exported files compute what the models' own inference computes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distinct_regions import spread_out
from torch.nn import functional as F

from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.c4 import coco_r50_c4
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.errors import InputError
from ovd_models.export.detector import ExportedDetector
from ovd_models.export.files import open_session, run_session, write_part
from ovd_models.export.parts import (
    SIZES,
    detect,
    detector_part,
    example_images,
    image_tower_part,
    sam_parts,
    text_tower_part,
)
from ovd_models.export.quantise import quantise
from ovd_models.sam.model import SamConfig, SamModel
from ovd_models.vild.model import ViLD, ViLDConfig

C4 = replace(coco_r50_c4(), backbone="resnet18", head_width=512, min_size=96, max_size=160, pre_nms=200, post_nms=50)
MODELS = {
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
    threshold = 0.5 if isinstance(model, CoDet) else 0.05
    part = detector_part(model, example_images(SIZES), names(model.detector.config.embed_dim), threshold)
    counts = [len(part.eager(*example)[1]) for example in part.examples]
    assert min(counts) > 0
    assert write_part(part, tmp_path) <= 1e-4
    # A size and a number of names that were not traced, and no name above the threshold.
    session = open_session(tmp_path / "detector.onnx", threads=1)
    (image,) = example_images([(150, 90)])
    rows = names(model.detector.config.embed_dim, 3)
    weights = () if len(part.inputs) == 3 else (part.examples[0][3][:3],)
    for limit in (threshold / 2, 1.0):
        inputs = (image, rows, torch.tensor(limit), *weights)
        boxes, scores, labels = run_session(session, part, inputs)
        expected = detect(model, *inputs)
        assert boxes.shape == (len(expected[1]), 4)
        assert np.allclose(scores, expected[1], atol=1e-4)
        assert np.allclose(boxes, expected[0], atol=1e-2)
        assert labels.tolist() == expected[2].tolist()
        assert (len(scores) > 0) == (limit < 1)


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
    encoder, decoder = sam_parts(model)
    assert write_part(encoder, tmp_path) <= 1e-4
    assert write_part(decoder, tmp_path) <= 1e-4


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
        ExportedDetector(supervised)
    tiny = RCNNConfig()
    assert isinstance(ExportedDetector(CoDet(CoDetConfig(detector=tiny))), torch.nn.Module)


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

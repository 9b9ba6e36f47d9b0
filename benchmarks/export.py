"""Exported files beside PyTorch: largest difference, time of an image, and the AP that 8 bits cost.

python benchmarks/export.py --storage runs/demo

Exports the demo's CoDet and CLIP, and freshly drawn models of the other kinds (SAM, OV-SAM, CenterNet2 and ViLD with
masks), compares each file with the library's own
inference on images of several sizes, times the detector on the evaluation scenes with one thread, one image at a time,
and evaluates the exported detector, in float32 and in 8 bits, on the same scenes. Writes runs/bench/export.json:
`onnx_max_abs_diff` over all files (coordinates and logits relative to the largest), `onnx_speed_ratio`, eager time
divided by the file's, and AP50 of each version.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measure import write_figures
from torch import Tensor
from torch.nn import functional as F

import ovd_models
from data_prep import storage, tables
from ovd_models.batches import Detections
from ovd_models.clip.model import load_clip
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.centernet2 import CenterNet2Config
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.evaluation import evaluate_detections
from ovd_models.export.files import Part, open_session, run_session, write_part
from ovd_models.export.parts import (
    SIZES,
    detector_part,
    example_images,
    image_tower_part,
    ovsam_parts,
    sam_parts,
    text_tower_part,
)
from ovd_models.export.quantise import quantise
from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.preprocess import to_tensor
from ovd_models.sam.model import SamConfig, SamModel
from ovd_models.vild.model import ViLD, ViLDConfig
from workflows.common.teacher import read_categories

THRESHOLD = 0.05
HEADS = ("rpn.head", "roi.box_head", "projection", "box_deltas", "proposals.heat")
WIDTH = 128
"""Of the embeddings of drawn models."""
CALIBRATION = 32
"""Training scenes whose activations decide the scales of 8-bit numbers."""


def newest(uri: str, method: str) -> Path:
    """The newest model of a method in a storage."""
    return max(Path(uri, "runs", method).glob("*/model"), key=lambda path: path.stat().st_mtime)


def pictures(uri: str, table: str, count: int) -> tuple[list[dict[str, object]], list[Tensor]]:
    """Rows of a `boxes` table and their pictures [H, W, 3] uint8."""
    rows = tables.read_table(uri, "boxes", table).slice(0, count).to_pylist()
    return rows, [to_tensor(storage.read_bytes(storage.join(uri, row["uri"]))).permute(1, 2, 0) for row in rows]


def drawn_parts() -> list[Part]:
    """Parts of freshly drawn models: a SAM and an OV-SAM of the demo's kind, a CenterNet2 and a ViLD with masks."""
    torch.manual_seed(0)
    ovsam = OvSam(OvSamConfig(clip_view="cut_out")).eval()
    centres = CenterNet2Config(
        backbone="resnet10t", backbone_options={}, freeze_norm=False, embed_dim=WIDTH, min_size=128, max_size=256
    )
    masks = RCNNConfig(masks=True, embed_dim=WIDTH)
    text_KD = F.normalize(torch.randn(20, WIDTH), dim=1)
    detectors: dict[str, CoDet | ViLD] = {
        "centernet2": CoDet(CoDetConfig(architecture="centernet2", centernet2=centres)),
        "masks": ViLD(ViLDConfig(detector=masks)),
    }
    images = example_images(SIZES)
    with torch.no_grad():  # regions of new models score all alike, and ties have no order
        for model in detectors.values():
            for name, value in model.detector.named_parameters():
                if value.ndim > 1 and (name.startswith(HEADS) or ".projection." in name):
                    value.mul_(3)
    return [
        *sam_parts(SamModel(SamConfig()).eval()),
        *ovsam_parts(ovsam, text_KD, torch.arange(20) % 2 == 0),
        *(replace(detector_part(model.eval(), images, text_KD, 0.02), name=name) for name, model in detectors.items()),
    ]


def timed(
    find: Callable[[Tensor], tuple[Tensor, ...]], images: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, ...]], float]:
    """Results of all images, and the median of their seconds."""
    results, seconds = [], []
    for image in images:
        started = time.perf_counter()
        results.append(find(image))
        seconds.append(time.perf_counter() - started)
    return results, float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--storage", default="runs/demo")
    parser.add_argument("--images", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    detector = ovd_models.load(newest(arguments.storage, "codet"))
    clip, _ = load_clip(newest(arguments.storage, "clip"))
    categories, splits = read_categories(arguments.storage, "pictograms")
    names = tuple(categories.values())
    rows, images = pictures(arguments.storage, "pictograms-eval", arguments.images)
    calibration = pictures(arguments.storage, "pictograms-train", CALIBRATION)[1]
    text_KD, threshold = detector.encoder.embed_names(names), torch.tensor(THRESHOLD)
    part = detector_part(detector.model, images[:8], text_KD, THRESHOLD)
    others = [image_tower_part(clip), text_tower_part(detector.encoder), *drawn_parts()]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        differences = {each.name: write_part(each, folder) for each in (part, *others)}
        quantise(
            part, folder / "detector.onnx", folder / "int8.onnx", [(image, text_KD, threshold) for image in calibration]
        )
        versions: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
            "eager": lambda image: part.eager(image, text_KD, threshold)
        }
        for version, file in (("onnx", "detector.onnx"), ("int8", "int8.onnx")):
            versions[version] = session_of(folder / file, part, text_KD, threshold)
        for version, find in versions.items():
            found, seconds = timed(find, images)
            detections = [
                Detections(*result[:3], names, image.shape[1], image.shape[0])
                for result, image in zip(found, images, strict=True)
            ]
            metrics = evaluate_detections(rows, detections, categories, splits).summary()
            figures |= {f"ms_{version}": 1000 * seconds, f"ap50_{version}": metrics["ap50_all"]}
            print(f"{version:6} {1000 * seconds:6.1f} ms an image, AP50 {metrics['ap50_all']:.4f}", flush=True)
        figures["megabytes_onnx"] = (folder / "detector.onnx").stat().st_size / 1e6
        figures["megabytes_int8"] = (folder / "int8.onnx").stat().st_size / 1e6
    for name, value in differences.items():
        print(f"{name:12} differs by at most {value:.1e}")
    figures |= {"onnx_max_abs_diff": max(differences.values())}
    figures |= {
        f"onnx_speed_ratio{suffix}": figures["ms_eager"] / figures[f"ms_{version}"]
        for suffix, version in (("", "onnx"), ("_int8", "int8"))
    }
    write_figures("export", figures)


def session_of(path: Path, part: Part, text_KD: Tensor, threshold: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function of an image [H, W, 3] that runs a file on one thread."""
    session = open_session(path, threads=1)

    def find(image: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, run_session(session, part, (image, text_KD, threshold))))

    return find


if __name__ == "__main__":
    main()

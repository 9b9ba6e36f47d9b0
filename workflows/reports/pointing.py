"""Evaluation of OV-SAM: IoU and accuracy with box and click prompts, beside SAM and the baselines.

boxes/<name>-eval --every object, by its box, its centre, its name--> masks, names --> IoU, accuracy, cost, pictures

P prompts or objects of one image, H x W its size, K names.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from faster_coco_eval import mask as rle
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_prep import tables
from data_prep.progress import watched
from ovd_models.errors import InputError
from ovd_models.metrics.records import Floats
from ovd_models.ovsam.baselines import BaselineConfig, SamClip
from ovd_models.ovsam.metrics import PointingMetrics, centre_points, next_click
from ovd_models.ovsam.model import OvSam
from ovd_models.ovsam.text_to_mask import TextToMask
from ovd_models.preprocess import to_tensor
from ovd_models.sam.model import SamModel
from ovd_models.sam.training import mask_ious
from ovd_models.segments import Prompts, Segments, boxes_of
from ovd_models.vocabulary import Vocabulary
from workflows.common.tracking import TrackedRun
from workflows.reports.detections import read_box_images

PromptKind = Literal["box", "point"]
PROMPT_KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
BASELINES: dict[str, BaselineConfig] = {
    "image crop": BaselineConfig(),
    "image crop x1.5": BaselineConfig(margin=1.5),
    "image crop, mean ground": BaselineConfig(margin=1.5, background="mean"),
    "mask features": BaselineConfig(crop="mask_features"),
    "roi features": BaselineConfig(crop="roi_features"),
    "roi features x1.5": BaselineConfig(crop="roi_features", margin=1.5),
}
"""The paper specifies neither padding nor background, so several settings are compared."""
MetricsByVariant = dict[tuple[str, str], PointingMetrics]
"""Metrics by variant and prompt kind: a `PromptKind`, "text" or "text, a click"."""


@dataclass(frozen=True)
class Cost:
    """Cost of a variant for one image with four boxes."""

    parameters: int
    flops: int
    encode_ms: float
    """Median time to encode an image."""
    prompt_ms: float
    """Median time to segment and name one more prompt on it."""


@dataclass(frozen=True)
class SegmentationReport:
    """Metrics, costs and pictures of an evaluation."""

    rows: Mapping[tuple[str, str], Mapping[str, float]]
    """Variant and prompt kind -> `PointingMetrics.summary`."""
    costs: Mapping[str, Cost]
    pictures: tuple[Image.Image, ...]
    by_image: Mapping[tuple[str, str], Mapping[str, tuple[Floats, Floats]]] = field(default_factory=dict)
    """Variant and prompt kind -> `PointingMetrics.by_image`."""

    def log(self, tracked: TrackedRun, prefix: str, step: int) -> None:
        """Log pictures and finite metrics under `prefix`; OV-SAM's with boxes as prompts also as the headline."""
        metrics = {
            f"{prefix}/{variant}/{kind}/{name}".replace(" ", "_").replace(",", ""): value
            for (variant, kind), values in self.rows.items()
            for name, value in values.items()
        }
        metrics |= {f"{prefix}/{name}": value for name, value in self.rows["ovsam", "box"].items()}
        tracked.log_metrics({name: value for name, value in metrics.items() if np.isfinite(value)}, step)
        tracked.log_pictures(self.pictures, prefix)

    def table(self) -> str:
        """Format metrics and costs for the console."""
        lines = [f"{'':30}{'IoU':>21}{'accuracy':>24}", f"{'':30}" + f"{'base':>8}{'novel':>8}{'all':>8}" * 2]
        for (variant, kind), values in self.rows.items():
            lines.append(f"{variant + ', ' + kind:30}" + "".join(f"{value:8.3f}" for value in values.values()))
        lines.append(f"{'cost':30}{'parameters':>12}{'GFLOP':>8}{'encode':>10}{'prompt':>10}")
        for variant, cost in self.costs.items():
            times = f"{cost.encode_ms:7.1f} ms{cost.prompt_ms:7.1f} ms"
            lines.append(f"{variant:30}{cost.parameters:12,}{cost.flops / 1e9:8.2f}{times}")
        return "\n".join(lines)


def evaluate_ovsam(
    storage_uri: str,
    boxes: str,
    category_ids: Mapping[str, int],
    vocabulary: Vocabulary,
    model: OvSam,
    sam: SamModel | None,
    text: TextToMask | None = None,
    *,
    limit: int = 0,
    num_pictures: int = 6,
    device: str = "cpu",
) -> SegmentationReport:
    """Evaluate OV-SAM on all annotated objects and, if a SAM is given, that SAM and every baseline.

    Args:
        storage_uri: the storage of the tables.
        boxes: name of the `boxes` table.
        category_ids: category id by name.
        vocabulary: all candidate names, with the base ones marked.
        model: the OV-SAM.
        sam: the SAM it was distilled from, or None.
        text: a SAM with names as prompts, or None.
        limit: number of images; 0 means all.
        num_pictures: number of images to draw.
        device: device of the models, where they remain.

    Raises:
        InputError: see `read_mask_rows`.
    """
    vocabulary = vocabulary.to(torch.device(device))
    for part in (model, sam, text):
        if part is not None:
            part.to(device)
    rows = read_mask_rows(storage_uri, boxes, category_ids, limit)
    label_of = {category_ids[name]: label for label, name in enumerate(vocabulary.names) if name in category_ids}

    def read_images() -> Iterator[ImageObjects]:
        return read_objects(storage_uri, watched(rows, "segment", "images"), label_of, device)

    metrics, pictures = segment_objects(read_images(), vocabulary, model, sam, num_pictures=num_pictures)
    if text is not None:
        metrics |= segment_names(read_images(), vocabulary, text)
    read = read_box_images(storage_uri, rows)
    image = next(to_tensor(image).to(device) for _, image in read if image is not None)
    costs = measure_costs(model, sam, vocabulary, image)
    by_image = {key: entry.by_image() for key, entry in metrics.items()}
    return SegmentationReport(summarise(metrics), costs, tuple(pictures), by_image)


def measure_pointing(
    storage_uri: str, boxes: str, category_ids: Mapping[str, int], vocabulary: Vocabulary, model: OvSam, *, limit: int
) -> tuple[dict[str, float], list[Image.Image]]:
    """IoU and accuracy of an OV-SAM in training with boxes as prompts, where finite, and four pictures.

    Args:
        storage_uri: the storage of the tables.
        boxes: name of the `boxes` table.
        category_ids: category id by name.
        vocabulary: all candidate names, with the base ones marked.
        model: on its device.
        limit: number of images.

    Raises:
        InputError: see `read_mask_rows`.
    """
    device = next(model.parameters()).device
    rows = read_mask_rows(storage_uri, boxes, category_ids, limit)
    label_of = {category_ids[name]: label for label, name in enumerate(vocabulary.names) if name in category_ids}
    images = read_objects(storage_uri, rows, label_of, str(device))
    kinds: tuple[PromptKind, ...] = ("box",)
    metrics, pictures = segment_objects(images, vocabulary.to(device), model, None, kinds, num_pictures=4)
    values = metrics["ovsam", "box"].summary()
    return {name: value for name, value in values.items() if np.isfinite(value)}, pictures


# -------------------------------------------------------------------------------------------------- annotated objects


@dataclass(frozen=True)
class ImageObjects:
    """An image and its P annotated objects."""

    image: Tensor
    """[3, H, W] uint8."""
    masks: Tensor
    """[P, H, W] bool."""
    labels: list[int]
    """P rows of the vocabulary."""

    def prompts(self, kind: PromptKind) -> Prompts:
        """The prompt of each mask: its tight box, or a click on the pixel deepest inside."""
        if kind == "box":
            return Prompts(boxes=boxes_of(self.masks))
        ones = torch.ones(len(self.masks), 1, dtype=torch.int64)
        return Prompts(points=centre_points(self.masks)[:, None], point_labels=ones)


def read_mask_rows(storage_uri: str, boxes: str, category_ids: Mapping[str, int], limit: int) -> list[dict[str, Any]]:
    """The first `limit` rows of a `boxes` table; all if 0.

    Raises:
        InputError: the table is missing, or no row has a mask of one of the categories.
    """
    rows: list[dict[str, Any]] = tables.read_table(storage_uri, "boxes", boxes).to_pylist()[: limit or None]
    known = set(category_ids.values())
    if not any(
        mask and key in known and not crowd
        for row in rows
        for mask, key, crowd in zip(row["masks"], row["category_ids"], row["iscrowd"], strict=True)
    ):
        raise InputError(f"boxes/{boxes}: no mask of a category with a split, expected at least one")
    return rows


def read_objects(
    storage_uri: str, rows: Iterable[Mapping[str, Any]], label_of: Mapping[int, int], device: str = "cpu"
) -> Iterator[ImageObjects]:
    """Read the images of `boxes` rows that have objects with masks.

    `label_of` maps category ids to rows of the vocabulary; other categories, crowds, empty masks and images that cannot
    be read are left out.

    Raises:
        InputError: no image can be read.
    """
    for row, picture in read_box_images(storage_uri, rows):
        entries = zip(row["masks"], row["category_ids"], row["iscrowd"], strict=True)
        kept = [(mask, label_of[key]) for mask, key, crowd in entries if mask and key in label_of and not crowd]
        masks = decode_masks([mask for mask, _ in kept], row["height"], row["width"])
        filled = masks.flatten(1).any(1)
        labels = [label for (_, label), full in zip(kept, filled.tolist(), strict=True) if full]
        if labels and picture is not None:
            yield ImageObjects(to_tensor(picture).to(device), masks[filled].to(device), labels)


def decode_masks(counts: Sequence[str], height: int, width: int) -> Tensor:
    """[N, H, W] bool from COCO RLE counts."""
    if not counts:
        return torch.zeros(0, height, width, dtype=torch.bool)
    stacked = rle.decode([{"size": [height, width], "counts": entry} for entry in counts])
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(2, 0, 1))).bool()


# ------------------------------------------------------------------------------------------------------------ metrics


def segment_objects(
    images: Iterable[ImageObjects],
    vocabulary: Vocabulary,
    model: OvSam,
    sam: SamModel | None,
    kinds: Collection[PromptKind] = PROMPT_KINDS,
    num_pictures: int = 0,
) -> tuple[MetricsByVariant, list[Image.Image]]:
    """Segment and name every object of images on the models' device with every model, by box and by point.

    Names without a category are distractors. The baselines name the masks of `sam`, and are left out without it. The
    pictures show OV-SAM's results for the boxes of the first images.
    """
    is_novel, baselines = novel_flags(vocabulary), build_baselines(model, sam)
    metrics: MetricsByVariant = {}
    pictures: list[Image.Image] = []
    for objects in images:
        image = objects.image
        encoded, sam_encoded = model.encode(image), None if sam is None else sam.encode(image)
        for kind in kinds:
            prompts = objects.prompts(kind)
            results = {"ovsam": model.segment(encoded, prompts, vocabulary)}
            if sam is not None and sam_encoded is not None:
                masks = sam.segment(sam_encoded, prompts)
                named = {name: each.name(image, masks, vocabulary, sam_encoded) for name, each in baselines.items()}
                results = {"sam": masks, **results, **named}
            for variant, segments in results.items():
                metrics.setdefault((variant, kind), PointingMetrics()).add(
                    mask_ious(segments.masks.flatten(1), objects.masks.flatten(1)),
                    segments.labels.tolist(),
                    objects.labels,
                    [is_novel[label] for label in objects.labels],
                )
            if kind == "box" and len(pictures) < num_pictures:
                pictures.append(results["ovsam"].draw(image=Image.fromarray(image.permute(1, 2, 0).cpu().numpy())))
    return metrics, pictures


def segment_names(images: Iterable[ImageObjects], vocabulary: Vocabulary, text: TextToMask) -> MetricsByVariant:
    """Segment every object by its name, and by its name with a click if the model was trained with clicks.

    A mask is accurate if it overlaps most with an object of its name. The click is on the deepest pixel of the larger
    error of the name's mask.
    """
    is_novel = novel_flags(vocabulary)
    metrics: MetricsByVariant = {}

    def add(kind: str, segments: Segments, objects: ImageObjects) -> None:
        labels, found_PM, true_PM = objects.labels, segments.masks.flatten(1).float(), objects.masks.flatten(1).float()
        common_PP = found_PM @ true_PM.T
        ious_PP = common_PP / (found_PM.sum(1, keepdim=True) + true_PM.sum(1) - common_PP)
        best_P = torch.where(ious_PP.any(1), ious_PP.argmax(1), -1)
        best = [labels[index] if index >= 0 else -1 for index in best_P.tolist()]
        flags = [is_novel[label] for label in labels]
        metrics.setdefault(("sam", kind), PointingMetrics()).add(ious_PP.diagonal(), best, labels, flags)

    for objects in images:
        name_PD, encoded = vocabulary.embeddings[objects.labels], text.encode(objects.image)
        segments = text.segment_text(encoded, name_PD)
        add("text", segments, objects)
        if text.settings.clicks:
            point_P2, label_P = next_click(segments.masks, objects.masks)
            clicks = Prompts(points=point_P2[:, None], point_labels=label_P[:, None], masks=segments.low_res)
            add("text, a click", text.segment_text(encoded, name_PD, clicks), objects)
    return metrics


def build_baselines(model: OvSam, sam: SamModel | None) -> dict[str, SamClip]:
    """The baselines by name, on the device of `sam`; none without it."""
    if sam is None:
        return {}
    device = next(sam.parameters()).device
    return {name: SamClip(sam, model.clip, config).to(device) for name, config in BASELINES.items()}


def novel_flags(vocabulary: Vocabulary) -> list[bool]:
    """Whether each name is novel; all are if the split is unknown."""
    return [True] * len(vocabulary) if vocabulary.is_base is None else (~vocabulary.is_base).tolist()


def summarise(metrics: MetricsByVariant) -> dict[tuple[str, str], dict[str, float]]:
    """`PointingMetrics.summary` of each variant; SAM names nothing, so its box and point accuracies are NaN."""
    rows = {key: entry.summary() for key, entry in metrics.items()}
    for (variant, kind), values in rows.items():
        if variant == "sam" and kind in PROMPT_KINDS:
            values |= dict.fromkeys(("accuracy_base", "accuracy_novel", "accuracy_all"), float("nan"))
    return rows


# --------------------------------------------------------------------------------------------------------------- cost


def measure_costs(model: OvSam, sam: SamModel | None, vocabulary: Vocabulary, image: Tensor) -> dict[str, Cost]:
    """Parameters, operations and times of all models; their parameters stop requiring gradients."""
    height, width = image.shape[-2:]
    box = [[width * 0.25, height * 0.25, width * 0.75, height * 0.75]]
    one, four = Prompts.create(boxes=box), Prompts.create(boxes=box * 4)
    model.requires_grad_(False)  # else the counter follows gradients through the parameters

    def cost(parts: list[nn.Module], encode: Callable[[], Any], segment: Callable[[Any, Prompts], Segments]) -> Cost:
        weights = {id(weight): weight.numel() for part in parts for weight in part.parameters()}
        flops = count_flops(lambda: segment(encode(), four))
        encoded = encode()
        times = (median_ms(encode), median_ms(lambda: segment(encoded, one)))
        return Cost(sum(weights.values()), flops, *times)

    own = cost([model], lambda: model.encode(image), partial(model.segment, vocabulary=vocabulary))
    if sam is None:
        return {"ovsam": own}
    sam.requires_grad_(False)
    costs = {"sam": cost([sam], lambda: sam.encode(image), sam.segment), "ovsam": own}
    for name, baseline in build_baselines(model, sam).items():

        def segment(encoded: Any, prompts: Prompts, baseline: SamClip = baseline) -> Segments:
            return baseline.segment(image, prompts, vocabulary, encoded)

        costs[name] = cost([sam, model.clip], lambda: sam.encode(image), segment)
    return costs


def count_flops(job: Callable[[], Any]) -> int:
    """Operations of matrix products and convolutions; attention runs unfused, since fused kernels are not counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            job()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def median_ms(job: Callable[[], Any], repeats: int = 15) -> float:
    """Median wall time in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times))

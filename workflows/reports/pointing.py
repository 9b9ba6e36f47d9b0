"""What OV-SAM is measured by: IoU and accuracy with box and click prompts, beside SAM and the simple baselines.

boxes/<name>-eval --every object, by its box, its centre, its name--> masks, names --> IoU, accuracy, cost, pictures
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_prep import storage, tables
from data_prep.streams.collate import decode_masks
from ovd_models.errors import InputError
from ovd_models.images import decode_image
from ovd_models.ovsam.baselines import BaselineConfig, SamClip
from ovd_models.ovsam.metrics import PointingMetrics, centre_points
from ovd_models.ovsam.model import OvSam
from ovd_models.ovsam.text_to_mask import TextToMask
from ovd_models.preprocess import to_tensor
from ovd_models.sam.model import SamModel
from ovd_models.sam.training import mask_ious
from ovd_models.segments import Prompts, Segments, boxes_of
from ovd_models.vocabulary import Vocabulary
from workflows.common.tracking import TrackedRun

BASELINES: dict[str, BaselineConfig] = {
    "image crop": BaselineConfig(),
    "image crop x1.5": BaselineConfig(margin=1.5),
    "image crop, mean ground": BaselineConfig(margin=1.5, background="mean"),
    "mask features": BaselineConfig(crop="mask_features"),
    "roi features": BaselineConfig(crop="roi_features"),
    "roi features x1.5": BaselineConfig(crop="roi_features", margin=1.5),
}
"""The paper leaves padding and background open: several, so that the best can be compared with."""
PROMPT_KINDS = ("box", "point")


@dataclass(frozen=True)
class Cost:
    """What a variant takes for one image with four boxes."""

    parameters: int
    flops: int
    encode_ms: float
    """Median of looking at an image."""
    prompt_ms: float
    """Median of one more prompt on it, named."""


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    rows: Mapping[tuple[str, str], Mapping[str, float]]
    """Variant and prompt kind -> `PointingMetrics.summary`."""
    costs: Mapping[str, Cost]
    pictures: tuple[Image.Image, ...]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat names for tracking; what was not measured is left out."""
        flat = {
            f"{prefix}/{variant.replace(' ', '_').replace(',', '')}/{kind}/{name}": value
            for (variant, kind), values in self.rows.items()
            for name, value in values.items()
        }
        return {name: value for name, value in flat.items() if np.isfinite(value)}

    def log(self, tracked: TrackedRun, prefix: str, step: int) -> None:
        """Metrics and pictures under `prefix`."""
        tracked.log_metrics(self.metrics(prefix), step)
        tracked.log_pictures(self.pictures, prefix)

    def table(self) -> str:
        """Rows for a person."""
        lines = [f"{'':30}{'IoU':>21}{'accuracy':>24}", f"{'':30}" + f"{'base':>8}{'novel':>8}{'all':>8}" * 2]
        for (variant, kind), values in self.rows.items():
            lines.append(f"{variant + ', ' + kind:30}" + "".join(f"{value:8.3f}" for value in values.values()))
        lines.append(f"{'cost':30}{'parameters':>12}{'GFLOP':>8}{'encode':>10}{'prompt':>10}")
        for variant, cost in self.costs.items():
            times = f"{cost.encode_ms:7.1f} ms{cost.prompt_ms:7.1f} ms"
            lines.append(f"{variant:30}{cost.parameters:12,}{cost.flops / 1e9:8.2f}{times}")
        return "\n".join(lines)


def evaluate(
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
) -> Report:
    """Ask OV-SAM and, if its teacher is given, that and every baseline for every object, and tell what they cost.

    Args:
        storage_uri: the storage.
        boxes: name of the `boxes` table.
        category_ids: by name.
        vocabulary: the names that compete, base ones marked.
        model: the OV-SAM.
        sam: its teacher, or None.
        text: a SAM that takes names as prompts, if there is one.
        limit: of images; all if 0.
        num_pictures: images that are drawn.
        device: where the models work; they stay there.

    Raises:
        InputError: see `read_rows`.
    """
    vocabulary = vocabulary.to(torch.device(device))
    for part in (model, sam, text):
        if part is not None:
            part.to(device)
    rows = read_rows(storage_uri, boxes, category_ids, limit)
    label_of = {category_ids[name]: label for label, name in enumerate(vocabulary.names) if name in category_ids}
    baselines = {
        name: SamClip(sam, model.clip, model.config.tower, config).to(device)
        for name, config in BASELINES.items()
        if sam is not None
    }
    collected, pictures = ask(storage_uri, rows, label_of, vocabulary, model, sam, baselines, num_pictures=num_pictures)
    if text is not None:
        collected["sam", "text"] = ask_by_name(storage_uri, rows, label_of, vocabulary, text)
    image = read_row(storage_uri, rows[0], label_of)[0]
    costs = measure_costs(model, sam, baselines, vocabulary, image.to(device))
    return Report(summaries(collected), costs, tuple(pictures))


def read_rows(storage_uri: str, boxes: str, category_ids: Mapping[str, int], limit: int) -> list[dict[str, Any]]:
    """The first rows of a `boxes` table, all if `limit` is 0.

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
        raise InputError(f"boxes/{boxes}: no mask of a category with a split, expected some to measure by")
    return rows


Collected = dict[tuple[str, str], PointingMetrics]
"""Variant and prompt kind -> its instances."""


def ask(
    storage_uri: str,
    rows: list[dict[str, Any]],
    label_of: Mapping[int, int],
    vocabulary: Vocabulary,
    model: OvSam,
    sam: SamModel | None,
    baselines: Mapping[str, SamClip],
    kinds: Collection[str] = PROMPT_KINDS,
    num_pictures: int = 0,
) -> tuple[Collected, list[Image.Image]]:
    """Ask every model for every annotated object of the rows, all names competing; also a few pictures.

    Args:
        storage_uri: the storage.
        rows: of a `boxes` table.
        label_of: row of the vocabulary by category id.
        vocabulary: the names that compete; those that no category bears only distract.
        model: the OV-SAM.
        sam: whose masks the baselines name; None if there are no baselines.
        baselines: by name.
        kinds: `box`, `point` or both.
        num_pictures: images that are drawn with their boxes' answers.
    """
    novel_K = novel_names(vocabulary)
    collected: Collected = {}
    pictures: list[Image.Image] = []
    for row in rows:
        image, masks, labels = read_row(storage_uri, row, label_of)
        if not labels:
            continue
        novel = [novel_K[label] for label in labels]
        image, masks = image.to(vocabulary.embeddings.device), masks.to(vocabulary.embeddings.device)
        encoded, seen = model.encode(image), None if sam is None else sam.encode(image)
        for kind in kinds:
            prompts = prompts_for(masks, kind)
            found = {"ovsam": model.segment(encoded, prompts, vocabulary)}
            if sam is not None and seen is not None:
                by_sam = sam.segment(seen, prompts)
                others = {name: each.name(image, by_sam, vocabulary, seen) for name, each in baselines.items()}
                found = {"sam": by_sam, **found, **others}
            for variant, segments in found.items():
                ious = mask_ious(segments.masks.flatten(1), masks.flatten(1))
                metrics = collected.setdefault((variant, kind), PointingMetrics())
                metrics.add(ious, segments.labels.tolist(), labels, novel)
            if kind == "box" and len(pictures) < num_pictures:
                pictures.append(found["ovsam"].draw(image=Image.fromarray(image.permute(1, 2, 0).cpu().numpy())))
    return collected, pictures


def ask_by_name(
    storage_uri: str, rows: list[dict[str, Any]], label_of: Mapping[int, int], vocabulary: Vocabulary, text: TextToMask
) -> PointingMetrics:
    """The masks that names alone ask for; accurate are those that agree best with an object that is so named."""
    novel_K = novel_names(vocabulary)
    metrics = PointingMetrics()
    for row in rows:
        image, masks, labels = read_row(storage_uri, row, label_of)
        if labels:
            device = vocabulary.embeddings.device
            found = text.segment_text(text.sam.encode(image.to(device)), vocabulary.embeddings[labels])
            asked_PM, objects_PM = found.masks.flatten(1).float(), masks.to(device).flatten(1).float()
            common_PP = asked_PM @ objects_PM.T
            ious_PP = common_PP / (asked_PM.sum(1, keepdim=True) + objects_PM.sum(1) - common_PP)
            best_P = torch.where(ious_PP.any(1), ious_PP.argmax(1), -1)
            best = [labels[index] if index >= 0 else -1 for index in best_P.tolist()]
            metrics.add(ious_PP.diagonal(), best, labels, [novel_K[label] for label in labels])
    return metrics


def novel_names(vocabulary: Vocabulary) -> list[bool]:
    """Whether each name is novel: all of them, where nobody knows."""
    return [True] * len(vocabulary) if vocabulary.is_base is None else (~vocabulary.is_base).tolist()


def summaries(collected: Collected) -> dict[tuple[str, str], dict[str, float]]:
    """`PointingMetrics.summary` of every row; SAM gives no names, so its accuracies with boxes and clicks are NaN."""
    found = {key: metrics.summary() for key, metrics in collected.items()}
    for (variant, kind), values in found.items():
        if variant == "sam" and kind in PROMPT_KINDS:
            values |= dict.fromkeys(("accuracy_base", "accuracy_novel", "accuracy_all"), float("nan"))
    return found


def read_row(storage_uri: str, row: Mapping[str, Any], label_of: Mapping[int, int]) -> tuple[Tensor, Tensor, list[int]]:
    """An image, its objects' masks [N, H, W] and labels: those of known categories, no crowds."""
    uri = storage.join(storage_uri, row["uri"])
    image = to_tensor(decode_image(storage.read_bytes(uri), uri))
    entries = zip(row["masks"], row["category_ids"], row["iscrowd"], strict=True)
    kept = [(mask, label_of[key]) for mask, key, crowd in entries if mask and key in label_of and not crowd]
    masks = decode_masks([mask for mask, _ in kept], row["height"], row["width"])
    filled = masks.flatten(1).any(1)
    return image, masks[filled], [label for (_, label), full in zip(kept, filled.tolist(), strict=True) if full]


def prompts_for(masks: Tensor, kind: str) -> Prompts:
    """The prompt of each mask: its tight box, or a click on the pixel deepest inside."""
    if kind == "box":
        return Prompts(boxes=boxes_of(masks))
    return Prompts(points=centre_points(masks)[:, None], point_labels=torch.ones(len(masks), 1, dtype=torch.int64))


def measure_costs(
    model: OvSam, sam: SamModel | None, baselines: Mapping[str, SamClip], vocabulary: Vocabulary, image: Tensor
) -> dict[str, Cost]:
    """Parameters, operations and times of all models that are given; their weights stop asking for gradients."""
    height, width = image.shape[-2:]
    box = [[width * 0.25, height * 0.25, width * 0.75, height * 0.75]]
    one, four = Prompts.create(boxes=box), Prompts.create(boxes=box * 4)
    model.requires_grad_(False)  # the counter follows gradients through parameters, and there are none

    def cost(parts: list[nn.Module], encode: Callable[[], Any], ask: Callable[[Any, Prompts], Segments]) -> Cost:
        weights = {id(weight): weight.numel() for part in parts for weight in part.parameters()}
        flops = count_flops(lambda: ask(encode(), four))
        encoded = encode()
        times = (median_ms(encode), median_ms(lambda: ask(encoded, one)))
        return Cost(sum(weights.values()), flops, *times)

    own = cost([model], lambda: model.encode(image), lambda seen, prompts: model.segment(seen, prompts, vocabulary))
    if sam is None:
        return {"ovsam": own}
    sam.requires_grad_(False)
    found = {"sam": cost([sam], lambda: sam.encode(image), sam.segment), "ovsam": own}
    for name, baseline in baselines.items():

        def ask(seen: Any, prompts: Prompts, baseline: SamClip = baseline) -> Segments:
            return baseline.segment(image, prompts, vocabulary, seen)

        found[name] = cost([sam, model.clip], lambda: sam.encode(image), ask)
    return found


def count_flops(job: Callable[[], Any]) -> int:
    """Operations of matrix products and convolutions; attention is written out, since fused forms are not counted."""
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

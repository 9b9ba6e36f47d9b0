"""Rows of a training stream to the batches that models take."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from faster_coco_eval import mask as rle
from ray.data.collate_fn import ArrowBatchCollateFn
from torch import Tensor

from ovd_models.batches import ConceptBatch, DetectionBatch, StoredRegions
from ovd_models.ovsam.training import FeatureBatch
from ovd_models.segments import MaskBatch
from ovd_models.vocabulary import TextEncoder


def _pixels(raw: bytes, height: int, width: int) -> Tensor:
    """[3, H, W] uint8 from raw rows of RGB."""
    array = np.frombuffer(raw, np.uint8).reshape(height, width, 3)
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


class PairCollate(ArrowBatchCollateFn):
    """Pairs -> images [B, 3, S, S] uint8 and their captions."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `tuple[Tensor, list[str]]`; Ray's base class knows only tensors."""
        side = self.image_size
        joined = b"".join(batch["image"].to_pylist())
        images = np.frombuffer(bytearray(joined), np.uint8).reshape(-1, side, side, 3)
        return torch.from_numpy(images).permute(0, 3, 1, 2), batch["caption"].to_pylist()


class DetectionCollate(ArrowBatchCollateFn):
    """Rows of `DetectionLoader` -> `DetectionBatch`."""

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `DetectionBatch`."""
        raw, heights, widths, boxes, labels = (
            batch[name].to_pylist() for name in ("image", "height", "width", "boxes", "labels")
        )
        return DetectionBatch(
            tuple(_pixels(*entry) for entry in zip(raw, heights, widths, strict=True)),
            tuple(torch.tensor(entry, dtype=torch.float32).view(-1, 4) for entry in boxes),
            tuple(torch.tensor(entry, dtype=torch.int64) for entry in labels),
            _masks(batch["masks"].to_pylist(), heights, widths) if "masks" in batch.column_names else None,
            _regions(batch) if "region_valid" in batch.column_names else None,
        )


def _masks(counts: list[list[str]], heights: list[int], widths: list[int]) -> tuple[Tensor, ...]:
    """B tensors [N, H, W] bool."""
    masks = []
    for entry, height, width in zip(counts, heights, widths, strict=True):
        decoded = rle.decode([{"size": [height, width], "counts": text} for text in entry]) if entry else None
        stacked = np.zeros((height, width, 0), np.uint8) if decoded is None else decoded
        masks.append(torch.from_numpy(stacked.astype(np.bool_)).permute(2, 0, 1))
    return tuple(masks)


def _regions(batch: pa.Table) -> StoredRegions:
    """The stored regions, of which every image has the same number."""
    valid_BM = torch.tensor(batch["region_valid"].to_pylist(), dtype=torch.bool)
    raw = bytearray(b"".join(batch["region_embeddings"].to_pylist()))
    rows = torch.frombuffer(raw, dtype=torch.float16).view(*valid_BM.shape, -1)
    boxes = torch.tensor(batch["region_boxes"].to_pylist(), dtype=torch.float32)
    return StoredRegions(boxes.view(*valid_BM.shape, 4), rows.float(), valid_BM)


class GroupCollate(ArrowBatchCollateFn):
    """Rows of `GroupLoader` -> `ConceptBatch`, captions embedded by the frozen text encoder."""

    def __init__(self, num_concepts: int, encoder: TextEncoder | None) -> None:
        self.num_concepts, self.encoder = num_concepts, encoder

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `ConceptBatch`."""
        columns = ("images", "heights", "widths", "captions", "mentioned")
        raw, heights, widths, captions, mentioned = (
            [entry for group in batch[name].to_pylist() for entry in group] for name in columns
        )
        hot = torch.zeros(len(raw), self.num_concepts, dtype=torch.bool)
        for row, concepts in enumerate(mentioned):
            hot[row, concepts] = True
        return ConceptBatch(
            tuple(_pixels(*entry) for entry in zip(raw, heights, widths, strict=True)),
            torch.tensor(batch["concept_id"].to_pylist(), dtype=torch.int64),
            hot,
            tuple(captions),
            None if self.encoder is None else self.encoder.embed_captions(captions),
            tuple(reason for group in batch["unreadable"].to_pylist() for reason in group),
        )


class MaskCollate(ArrowBatchCollateFn):
    """Rows of `MaskLoader` -> `MaskBatch`."""

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `MaskBatch`."""
        columns = ("image", "height", "width", "masks", "labels", "flip")
        raw, heights, widths, masks, labels, flips = (batch[name].to_pylist() for name in columns)
        return MaskBatch(
            tuple(_pixels(*entry) for entry in zip(raw, heights, widths, strict=True)),
            tuple(decode_masks(*entry) for entry in zip(masks, heights, widths, flips, strict=True)),
            tuple(torch.tensor(entry, dtype=torch.int64) for entry in labels),
        )


def decode_masks(counts: list[str], height: int, width: int, flip: bool = False) -> Tensor:
    """[N, H, W] bool from COCO RLE counts, mirrored left to right if `flip`."""
    if not counts:
        return torch.zeros(0, height, width, dtype=torch.bool)
    stacked = rle.decode([{"size": [height, width], "counts": entry.encode()} for entry in counts])
    masks = torch.from_numpy(np.ascontiguousarray(stacked.transpose(2, 0, 1))).bool()
    return masks.flip(2) if flip else masks


class FeatureCollate(ArrowBatchCollateFn):
    """Rows of `FeatureLoader` -> `FeatureBatch`."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `FeatureBatch`."""
        raw, heights, widths = (batch[name].to_pylist() for name in ("image", "height", "width"))
        joined = bytearray(b"".join(batch["feature"].to_pylist()))
        features = torch.from_numpy(np.frombuffer(joined, "<f2").reshape(-1, *self.shape))
        images = tuple(_pixels(*entry) for entry in zip(raw, heights, widths, strict=True))
        return FeatureBatch(images, features)

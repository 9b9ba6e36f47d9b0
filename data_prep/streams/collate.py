"""Rows of a training stream to the batches that models take."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray.data.collate_fn import ArrowBatchCollateFn
from torch import Tensor

from ovd_models.batches import ConceptBatch, DetectionBatch, PairBatch, StoredRegions
from ovd_models.ovsam.training import FeatureBatch
from ovd_models.segments import MaskBatch


def _columns(batch: pa.Table, *names: str) -> list[list[Any]]:
    return [batch[name].to_pylist() for name in names]


def _images(raw: Sequence[bytes], heights: Sequence[int], widths: Sequence[int]) -> tuple[Tensor, ...]:
    """B tensors [3, H, W] uint8 from raw rows of RGB."""
    arrays = [
        np.frombuffer(bytearray(pixels), np.uint8).reshape(height, width, 3)
        for pixels, height, width in zip(raw, heights, widths, strict=True)
    ]
    return tuple(torch.from_numpy(array).permute(2, 0, 1) for array in arrays)


def _unreadable(batch: pa.Table) -> tuple[str, ...]:
    return tuple(reason for reasons in batch["unreadable"].to_pylist() for reason in reasons)


def _labels(labels: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(entry, dtype=torch.int64) for entry in labels)


class PairCollate(ArrowBatchCollateFn):
    """Rows of `PairLoader` or `ShardLoader` -> `PairBatch`.

    Args:
        image_size: side of the square images in pixels.
        tokenize: captions -> [B, T] tokens. It runs in the threads that prepare batches ahead of the loop.
    """

    def __init__(self, image_size: int, tokenize: Callable[[Sequence[str]], Tensor]) -> None:
        self.image_size, self.tokenize = image_size, tokenize

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `PairBatch`; Ray's base class knows only tensors."""
        side = self.image_size
        joined = b"".join(batch["image"].to_pylist())
        images = np.frombuffer(bytearray(joined), np.uint8).reshape(-1, side, side, 3)
        captions = tuple(batch["caption"].to_pylist())
        images_B3SS = torch.from_numpy(images).permute(0, 3, 1, 2)
        return PairBatch(images_B3SS, captions, _unreadable(batch), self.tokenize(captions))


class DetectionCollate(ArrowBatchCollateFn):
    """Rows of `DetectionLoader` -> `DetectionBatch`."""

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `DetectionBatch`."""
        raw, heights, widths, boxes, labels = _columns(batch, "image", "height", "width", "boxes", "labels")
        return DetectionBatch(
            _images(raw, heights, widths),
            tuple(torch.tensor(entry, dtype=torch.float32).view(-1, 4) for entry in boxes),
            _labels(labels),
            _masks(batch, zip(heights, widths, strict=True)) if "masks" in batch.column_names else None,
            _regions(batch) if "region_valid" in batch.column_names else None,
            unreadable=_unreadable(batch),
        )


def _regions(batch: pa.Table) -> StoredRegions:
    """The stored regions; every image has the same number of them."""
    boxes, valid, embeddings = _columns(batch, "region_boxes", "region_valid", "region_embeddings")
    valid_BM = torch.tensor(valid, dtype=torch.bool)
    rows = torch.frombuffer(bytearray(b"".join(embeddings)), dtype=torch.float16).view(*valid_BM.shape, -1)
    boxes_BM4 = torch.tensor(boxes, dtype=torch.float32).view(*valid_BM.shape, 4)
    return StoredRegions(boxes_BM4, rows.float(), valid_BM)


def _masks(batch: pa.Table, sizes: Iterable[tuple[int, int]]) -> tuple[Tensor, ...]:
    """B tensors [N, H, W] bool from columns `masks` and `mask_boxes`, and the images' heights and widths."""
    return tuple(map(paste_masks, *_columns(batch, "masks", "mask_boxes"), sizes))


def paste_masks(masks: Sequence[bytes], flat_boxes: Sequence[int], size: tuple[int, int]) -> Tensor:
    """[N, H, W] bool from the raw masks [h, w] of N objects and the flat xyxy of their places."""
    boxes_N4 = np.array(flat_boxes, np.int64).reshape(-1, 4)
    pasted_NHW = np.zeros((len(masks), *size), np.bool_)
    for whole, mask, (x0, y0, x1, y1) in zip(pasted_NHW, masks, boxes_N4.tolist(), strict=True):
        whole[y0:y1, x0:x1] = np.frombuffer(mask, np.bool_).reshape(y1 - y0, x1 - x0)
    return torch.from_numpy(pasted_NHW)


class GroupCollate(ArrowBatchCollateFn):
    """Rows of `GroupLoader` -> `ConceptBatch`.

    Args:
        num_concepts: of the concept table.
        tokenize: captions -> [B, T] tokens; None if captions are not learned.
    """

    def __init__(self, num_concepts: int, tokenize: Callable[[Sequence[str]], Tensor] | None) -> None:
        self.num_concepts, self.tokenize = num_concepts, tokenize

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `ConceptBatch`."""
        columns = _columns(batch, "images", "heights", "widths", "captions", "mentioned")
        flat = [[entry for group in column for entry in group] for column in columns]
        raw, heights, widths, captions, mentioned = flat
        mentioned_BC = torch.zeros(len(raw), self.num_concepts, dtype=torch.bool)
        for row, concepts in enumerate(mentioned):
            mentioned_BC[row, concepts] = True
        return ConceptBatch(
            _images(raw, heights, widths),
            torch.tensor(batch["concept_id"].to_pylist(), dtype=torch.int64),
            mentioned_BC,
            tuple(captions),
            caption_tokens=None if self.tokenize is None else self.tokenize(captions),
            unreadable=_unreadable(batch),
        )


class MaskCollate(ArrowBatchCollateFn):
    """Rows of `MaskLoader` -> `MaskBatch`."""

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `MaskBatch`."""
        return MaskBatch(
            _images(*_columns(batch, "image", "height", "width")),
            _masks(batch, batch["size"].to_pylist()),
            _labels(batch["labels"].to_pylist()),
            unreadable=_unreadable(batch),
        )


class FeatureCollate(ArrowBatchCollateFn):
    """Rows of `FeatureLoader` -> `FeatureBatch`."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __call__(self, batch: pa.Table) -> Any:
        """One step of one worker, a `FeatureBatch`."""
        joined = bytearray(b"".join(batch["feature"].to_pylist()))
        features = torch.from_numpy(np.frombuffer(joined, "<f2").reshape(-1, *self.shape))
        images = _images(*_columns(batch, "image", "height", "width"))
        return FeatureBatch(images, features, unreadable=_unreadable(batch))

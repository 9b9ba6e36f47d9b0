"""Typed records that cross module boundaries: inputs and outputs of models.

B images, N boxes of one image, M stored regions of one image, G groups, g images of a group, C concepts,
D embedding width.
"""

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import mask as rle
from PIL import Image
from torch import Tensor
from torchvision.ops import nms

from ovd_models.drawing import draw_boxes
from ovd_models.images import upright


class TensorRecord:
    """Base of dataclasses that hold tensors."""

    def to(self, device: torch.device) -> Self:
        """The same record on another device, with all tensors in its tuples and records."""
        wait = device.type == "cpu"  # else a copy to the CPU may be read before it is done
        return self.map(lambda tensor: tensor.to(device, non_blocking=not wait))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same record with all tensors changed, also those in its tuples and records."""
        return replace(self, **{name: _mapped(value, change) for name, value in vars(self).items()})  # type: ignore[type-var]


def num_bytes(value: Any) -> int:
    """Bytes of the tensors in a record, a tuple or a tensor."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, TensorRecord):
        return sum(num_bytes(entry) for entry in vars(value).values())
    return sum(map(num_bytes, value)) if isinstance(value, tuple) else 0


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(entry, change) for entry in value)
    return value.map(change) if isinstance(value, TensorRecord) else value


@dataclass(frozen=True)
class ImageBatch(TensorRecord):
    """B images."""

    images: tuple[Tensor, ...]
    """B tensors [3, H, W] uint8 RGB; sizes may differ."""
    unreadable: tuple[str, ...] = field(default=(), kw_only=True)
    """Images that could not be read and were replaced by others, with the reason."""

    @property
    def num_images(self) -> int:
        """Images in the batch, B."""
        return len(self.images)


@dataclass(frozen=True)
class PairBatch(TensorRecord):
    """B images of one size with their captions."""

    images: Tensor
    """[B, 3, S, S] uint8 RGB."""
    captions: tuple[str, ...]
    """B captions."""
    unreadable: tuple[str, ...] = ()
    """Images that could not be read and were replaced by others, with the reason."""
    tokens: Tensor | None = None
    """[B, T] int64, the captions as the text tower takes them."""


@dataclass(frozen=True)
class StoredRegions(TensorRecord):
    """Regions with precomputed teacher embeddings; their boxes went through the image's augmentation."""

    boxes: Tensor
    """[B, M, 4] float32 xyxy, pixels of the image."""
    embeddings: Tensor
    """[B, M, D] unit rows of the region before augmentation."""
    valid: Tensor
    """[B, M] bool: False for padding, and for regions that the augmentation moved out of view."""


@dataclass(frozen=True)
class DetectionBatch(ImageBatch):
    """Images with boxes of base categories."""

    boxes: tuple[Tensor, ...]
    """B tensors [N, 4] float32 xyxy, pixels of the image."""
    labels: tuple[Tensor, ...]
    """B tensors [N] int64, rows of the training vocabulary."""
    masks: tuple[Tensor, ...] | None = None
    """B tensors [N, H, W] bool; None if masks are not learned."""
    regions: StoredRegions | None = None
    """None if embeddings are not distilled."""


@dataclass(frozen=True)
class ConceptBatch(ImageBatch):
    """G groups of g captioned images, B = G * g, group after group; the images of a group share its concept."""

    concept_ids: Tensor
    """[G] int64, rows of the concept table."""
    mentioned: Tensor
    """[B, C] bool: the concepts that the image's caption mentions."""
    captions: tuple[str, ...]
    """B captions."""
    caption_embeddings: Tensor | None = None
    """[B, D] unit rows from the frozen text encoder; None if captions are not learned, or it has no text tower."""
    caption_tokens: Tensor | None = None
    """[B, T] int64, what `caption_embeddings` are made of."""

    @property
    def group_size(self) -> int:
        """Images of one group, g."""
        return len(self.images) // max(1, len(self.concept_ids))


@dataclass(frozen=True)
class Found:
    """One thing found in an image."""

    name: str | None
    """None without a name."""
    score: float | None
    """In [0, 1]; None without a name."""
    box: tuple[float, float, float, float]
    """xyxy, pixels of the original image."""


@dataclass(frozen=True)
class Detections(TensorRecord):
    """Objects found in one image, best first; iterate over them, or index and slice them as a list."""

    boxes: Tensor
    """[N, 4] float32 xyxy, pixels of the original image."""
    scores: Tensor
    """[N] float32 in [0, 1]."""
    labels: Tensor
    """[N] int64, indices into `names`."""
    names: tuple[str, ...]
    """The vocabulary."""
    width: int
    height: int
    image: Image.Image | None = None
    """The picture, if `detect` kept one to draw on."""
    masks: tuple[str, ...] | None = None
    """N COCO RLE counts; None if the detector predicts no masks."""

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Found]:
        rows = zip(self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True)
        return (Found(self.names[label], score, (x0, y0, x1, y1)) for label, score, (x0, y0, x1, y1) in rows)

    @overload
    def __getitem__(self, index: int) -> Found: ...
    @overload
    def __getitem__(self, index: slice) -> "Detections": ...
    def __getitem__(self, index: int | slice) -> "Found | Detections":
        rows = range(len(self))  # unlike a tensor, also backwards
        if isinstance(index, slice):
            return self._select(torch.tensor(rows[index], dtype=torch.int64))
        return next(iter(self._select(torch.tensor([rows[index]]))))

    def filter(self, *, min_score: float = 0.0, names: Collection[str] | None = None) -> "Detections":
        """The detections with at least a score, and of some names; of all names if None.

        Raises:
            ValueError: a name is not in the vocabulary.
        """
        return self._select(rows_to_keep(self.scores, self.labels, self.names, min_score, names))

    def distinct(self, iou: float = 0.5) -> "Detections":
        """The best name of each object: suppression across names, where `detect` suppresses within each name.

        With many names, `detect(..., distinct=True)` finds more objects: its limit then counts those alone.
        """
        return self._select(nms(self.boxes, self.scores, iou))

    def with_area(self) -> "Detections":
        """The detections whose boxes have an area; a box clipped at the image's edge may have none."""
        return self._select(torch.nonzero((self.boxes[:, 2:] > self.boxes[:, :2]).all(1)).squeeze(1))

    def _select(self, rows: Tensor) -> "Detections":
        masks = None if self.masks is None else tuple(self.masks[row] for row in rows.tolist())
        return replace(self, boxes=self.boxes[rows], scores=self.scores[rows], labels=self.labels[rows], masks=masks)

    def to_list(self) -> list[dict[str, Any]]:
        """`[{"box": [x0, y0, x1, y1], "label": name, "score": s}]`, the form of the HTTP endpoint.

        With masks, each entry has also `"mask": {"size": [height, width], "counts": ...}`, COCO's RLE.
        """
        rows = zip(self.boxes.tolist(), self.labels.tolist(), self.scores.tolist(), strict=True)
        found: list[dict[str, Any]] = [
            {"box": box, "label": self.names[label], "score": score} for box, label, score in rows
        ]
        for entry, counts in zip(found, self.masks or (), strict=False):
            entry["mask"] = {"size": [self.height, self.width], "counts": counts}
        return found

    def to_coco(self, file_name: str = "", image_id: int = 1) -> dict[str, Any]:
        """The detections as a COCO file of one image: `images`, `categories` (ids from 1) and `annotations`."""
        entries = [(entry["box"], entry["label"], entry["score"], entry.get("mask")) for entry in self.to_list()]
        return coco_file(entries, self.names, (self.width, self.height), file_name, image_id)

    def to_supervision(self) -> Any:
        """The detections as `supervision.Detections`, with `class_name` among their data.

        Raises:
            ImportError: the package supervision is not installed.
        """
        import supervision

        return supervision.Detections(
            xyxy=self.boxes.cpu().numpy(),
            confidence=self.scores.cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            mask=None if self.masks is None else decode_masks(self.masks, self.height, self.width),
            data={"class_name": np.array([self.names[label] for label in self.labels.tolist()], dtype=object)},
        )

    def _repr_png_(self) -> bytes | None:
        """The picture with its boxes, which a notebook shows for a result in a cell's last line."""
        return png_of(self.draw()) if self.image is not None else None

    def draw(
        self, path: str | Path | None = None, *, image: Image.Image | None = None, distinct: bool = True
    ) -> Image.Image:
        """The picture with its boxes in the colours of their names, saved to `path` if given.

        Args:
            path: of a picture file.
            image: to draw on instead of the detections' own; turned upright, as `detect` does.
            distinct: draw only the best name of each object, see `distinct`.

        Raises:
            ValueError: there is no picture to draw on.
        """
        picture = image if image is not None else self.image
        if picture is None:
            raise ValueError("these detections carry no image: pass image=")
        shown = self.distinct() if distinct else self
        names = [self.names[label] for label in shown.labels.tolist()]
        texts = [f"{name} {score:.2f}" for name, score in zip(names, shown.scores.tolist(), strict=True)]
        drawn = draw_boxes(upright(picture), shown.boxes, texts, names)
        if path is not None:
            drawn.save(path)
        return drawn


def rows_to_keep(
    scores: Tensor, labels: Tensor, vocabulary: Sequence[str], min_score: float, names: Collection[str] | None
) -> Tensor:
    """Rows [M] int64 with at least a score, and of some names; of all if None.

    Raises:
        ValueError: a name is not in the vocabulary.
    """
    keep = scores >= min_score
    if names is not None:
        if unknown := [name for name in names if name not in vocabulary]:
            raise ValueError(f"names: {unknown[0]!r} was not looked for, expected some of {', '.join(vocabulary)}")
        keep &= torch.isin(
            labels, torch.tensor([row for row, name in enumerate(vocabulary) if name in names]).to(labels)
        )
    return torch.nonzero(keep).squeeze(1)


def coco_file(
    entries: Sequence[tuple[Sequence[float], str | None, float | None, Any]],
    names: Sequence[str],
    size: tuple[int, int],
    file_name: str,
    image_id: int,
) -> dict[str, Any]:
    """A COCO file of one image of (width, height), from boxes (xyxy), labels, scores and RLE masks."""
    category_of = {name: index for index, name in enumerate(names, start=1)}
    annotations = []
    for index, (box, label, score, mask) in enumerate(entries, start=1):
        x0, y0, x1, y1 = box
        annotation = {
            "id": index,
            "image_id": image_id,
            "category_id": category_of.get(label or "", 0),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": float(rle.area(mask)) if mask else (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "score": score,
        }
        annotations.append(annotation | ({"segmentation": mask} if mask else {}))
    return {
        "images": [{"id": image_id, "file_name": file_name, "width": size[0], "height": size[1]}],
        "categories": [{"id": index, "name": name} for name, index in category_of.items()],
        "annotations": annotations,
    }


def decode_masks(counts: Sequence[str], height: int, width: int) -> npt.NDArray[np.bool_]:
    """COCO RLE counts -> [N, H, W] bool."""
    masks = [rle.decode({"size": [height, width], "counts": entry.encode()}).astype(bool) for entry in counts]
    return np.stack(masks) if masks else np.zeros((0, height, width), bool)


def png_of(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

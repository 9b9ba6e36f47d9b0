"""Typed records of segmentation: prompts, segments, and the batch of a training step.

P prompts of one image, n points of a prompt, N objects of an image, L side of a mask decoder's map.
"""

import math
from collections.abc import Collection, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from faster_coco_eval import mask as rle
from PIL import Image
from torch import Tensor

from ovd_models.batches import Found, ImageBatch, TensorRecord, coco_file, png_of, rows_to_keep
from ovd_models.drawing import colour_of, draw_boxes
from ovd_models.errors import InputError
from ovd_models.images import upright

PIXELS_AT_A_TIME = 1 << 26
"""Maximum pixels of float32 masks in memory at a time: 256 MB, however large the image is."""
PROMPTS_AT_A_TIME = 64
"""Maximum prompts in a mask decoder or a naming head at a time: the published ones take 10 to 21 MB for each."""
ON, OFF, PADDING = 1, 0, -1
"""Labels of a point: on the object, off it, or padding of a prompt with fewer points."""


@dataclass(frozen=True)
class Prompts(TensorRecord):
    """P prompts of one image, for one mask each."""

    points: Tensor | None = None
    """[P, n, 2] float32 xy, pixels of the original image."""
    point_labels: Tensor | None = None
    """[P, n] int64: `ON`, `OFF` or `PADDING`."""
    boxes: Tensor | None = None
    """[P, 4] float32 xyxy, pixels of the original image; with points, both describe the same object."""
    masks: Tensor | None = None
    """[P, L, L] float32 logits of earlier masks (`Segments.low_res`), to be refined."""

    @classmethod
    def create(
        cls,
        *,
        points: Sequence[Any] | None = None,
        point_labels: Sequence[Any] | None = None,
        boxes: Sequence[Any] | None = None,
        masks: Tensor | None = None,
    ) -> "Prompts":
        """Prompts from plain lists.

        Args:
            points: P lists of points [x, y], or P single points, in pixels of the original image.
            point_labels: labels in the same form, 1 on the object and 0 off it; 1 for every point if None.
            boxes: P boxes [x0, y0, x1, y1], in the same pixels.
            masks: [P, L, L] float32 logits of earlier masks.

        Raises:
            InputError: a list does not have this form.
        """
        for field, values in (("points", points), ("point_labels", point_labels), ("boxes", boxes)):
            if values is not None and not isinstance(values, Sized):
                raise InputError(f"{field}: {values!r}, expected a list")
        has_points, has_boxes = points is not None and len(points) > 0, boxes is not None and len(boxes) > 0
        if not (has_points or has_boxes or masks is not None):
            raise InputError("prompts: empty, expected points or boxes")
        if point_labels is not None and not has_points:
            raise InputError("point_labels: given without points")
        coordinates, labels = _pad_points(points, point_labels) if points is not None and has_points else (None, None)
        return cls(coordinates, labels, _numbers(boxes, "boxes", 4) if has_boxes else None, masks)

    def __len__(self) -> int:
        for value in (self.points, self.boxes, self.masks):
            if value is not None:
                return len(value)
        return 0

    def take(self, rows: Tensor | slice) -> "Prompts":
        """The prompts of these rows."""
        values = (self.points, self.point_labels, self.boxes, self.masks)
        return Prompts(*(None if value is None else value[rows] for value in values))

    def without_padding(self, most: int) -> list[tuple[Tensor, "Prompts"]]:
        """Parts of at most `most` prompts with equally many points each, and their rows [p] int64.

        SAM's decoder attends to padding points too, so a mask would depend on the other prompts of its batch.
        """
        parts = []
        if self.points is None or self.point_labels is None:
            parts.append((torch.arange(len(self)), self))
        else:
            given_Pn = self.point_labels != PADDING
            count_P = given_Pn.sum(1)
            for count in sorted(set(count_P.tolist())):
                rows = torch.nonzero(count_P == count).flatten()
                points = self.points[rows][given_Pn[rows]].view(len(rows), count, 2) if count else None
                labels = self.point_labels[rows][given_Pn[rows]].view(len(rows), count) if count else None
                parts.append((rows, replace(self.take(rows), points=points, point_labels=labels)))
        return [
            (rows[start : start + most], part.take(slice(start, start + most)))
            for rows, part in parts
            for start in range(0, max(1, len(rows)), most)
        ]

    def checked(self, width: int, height: int, mask_side: int) -> "Prompts":
        """The prompts, valid for an image of this size in pixels and masks of side L, their boxes clipped to it.

        Raises:
            InputError: there is no prompt; a point or a whole box lies outside; a box has no area; points contradict
                each other, or none of them is on the object; or masks have another side.
        """
        given = [len(value) for value in (self.points, self.boxes, self.masks) if value is not None]
        if not given:
            raise InputError("prompts: empty, expected points or boxes")
        if len(set(given)) > 1:
            raise InputError(f"prompts: {given[0]} and {given[1]} given, expected as many points as boxes")
        if self.masks is not None and self.masks.shape[1:] != (mask_side, mask_side):
            raise InputError(f"masks: shape {list(self.masks.shape)}, expected logits [P, {mask_side}, {mask_side}]")
        if self.masks is not None and not bool(torch.isfinite(self.masks).all()):
            raise InputError("masks: not all finite, expected logits")
        if self.points is not None:
            self._check_points(self.points, width, height)
        if self.boxes is None:
            return self
        return replace(self, boxes=_clip_boxes(self.boxes, width, height))

    def _check_points(self, points_Pn2: Tensor, width: int, height: int) -> None:
        labels_Pn = self.point_labels
        if labels_Pn is None or labels_Pn.shape != points_Pn2.shape[:2]:
            raise InputError("point_labels: expected one label for each point")
        known = (labels_Pn == ON) | (labels_Pn == OFF) | (labels_Pn == PADDING)
        for row, column in torch.nonzero(~known).tolist():
            raise InputError(f"point_labels[{row}][{column}]: {int(labels_Pn[row, column])}, expected 0 or 1")
        limit = points_Pn2.new_tensor([width, height])
        inside = ((points_Pn2 >= 0) & (points_Pn2 < limit)).all(-1) | (labels_Pn == PADDING)  # NaN is not inside
        for row, column in torch.nonzero(~inside).tolist():
            x, y = points_Pn2[row, column].tolist()
            raise InputError(f"points[{row}][{column}]: ({x:g}, {y:g}) lies outside the image of {width} x {height}")
        same = (points_Pn2[:, :, None] == points_Pn2[:, None]).all(-1)
        opposed = same & (labels_Pn[:, :, None] == ON) & (labels_Pn[:, None] == OFF)
        for row, column, _ in torch.nonzero(opposed).tolist():
            x, y = points_Pn2[row, column].tolist()
            raise InputError(f"points[{row}]: ({x:g}, {y:g}) is labelled both on the object and off it")
        if self.boxes is None and self.masks is None:
            for row in torch.nonzero(~(labels_Pn == ON).any(1)).flatten().tolist():
                raise InputError(f"points[{row}]: none is on the object, expected a point with label 1, or a box")


def _pad_points(points: Sequence[Any], labels: Sequence[Any] | None) -> tuple[Tensor, Tensor]:
    """Points [P, n, 2] and labels [P, n], padded with `PADDING`."""
    rows = [_numbers(entry, f"points[{i}]", 2).view(-1, 2) for i, entry in enumerate(points)]
    if labels is None:
        marks = [torch.full((len(row),), ON) for row in rows]
    else:
        try:
            given = [torch.tensor(np.atleast_1d(np.asarray(entry))).view(-1) for entry in labels]
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError("point_labels: expected 0 or 1 for each point") from error
        marks = [entry.long() for entry in given]
        if not all(torch.equal(mark.to(entry), entry) for mark, entry in zip(marks, given, strict=True)):
            raise InputError("point_labels: expected 0 or 1 for each point")
        if [len(row) for row in rows] != [len(mark) for mark in marks]:
            raise InputError("point_labels: expected one label for each point")
    for index, row in enumerate(rows):
        if not len(row):
            raise InputError(f"points[{index}]: empty, expected at least one point")
    return (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        torch.nn.utils.rnn.pad_sequence(marks, batch_first=True, padding_value=PADDING),
    )


def _numbers(values: Any, field: str, width: int) -> Tensor:
    """[..., width] float32."""
    try:
        if any(isinstance(value, str | bool) for value in np.asarray(values, object).flat):
            raise TypeError("text or a truth value, which NumPy would convert")
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{field}: expected lists of {width} numbers") from error
    if array.ndim not in (1, 2) or array.shape[-1] != width:
        raise InputError(f"{field}: shape {list(array.shape)}, expected lists of {width} numbers")
    return torch.from_numpy(array).view(-1, width)


def _clip_boxes(boxes_P4: Tensor, width: int, height: int) -> Tensor:
    area = (boxes_P4[:, 2:] > boxes_P4[:, :2]).all(1) & torch.isfinite(boxes_P4).all(1)
    for row in torch.nonzero(~area).flatten().tolist():
        raise InputError(f"boxes[{row}]: {boxes_P4[row].tolist()}, expected x0 < x1 and y0 < y1")
    limit = boxes_P4.new_tensor([width, height, width, height])
    clipped = torch.minimum(boxes_P4.clamp(min=0), limit)
    for row in torch.nonzero(~(clipped[:, 2:] > clipped[:, :2]).all(1)).flatten().tolist():
        raise InputError(f"boxes[{row}]: {boxes_P4[row].tolist()} lies outside the image of {width} x {height}")
    return clipped


@dataclass(frozen=True)
class Segments(TensorRecord):
    """One mask for each prompt, in the prompts' order, named if a vocabulary was given; used as a list."""

    masks: Tensor
    """[P, H, W] bool, the original image."""
    ious: Tensor
    """[P] float32, the model's own estimate of the mask's IoU; NaN without one."""
    labels: Tensor
    """[P] int64, indices into `names`; -1 without a name."""
    scores: Tensor
    """[P] float32, the label's probability; NaN without a name."""
    names: tuple[str, ...]
    """The vocabulary."""
    low_res: Tensor
    """[P, L, L] float32 logits, as `Prompts.masks` takes them."""
    image: Image.Image | None = None
    """The image, to draw on."""
    reason: str = ""
    """Why masks of a whole image are none; else empty."""

    def __len__(self) -> int:
        return len(self.masks)

    def __iter__(self) -> Iterator[Found]:
        for label, score, (x0, y0, x1, y1) in zip(
            self.labels.tolist(), self.scores.tolist(), self.boxes.tolist(), strict=True
        ):
            name = self.names[label] if label >= 0 else None
            yield Found(name, None if math.isnan(score) else score, (x0, y0, x1, y1))

    @overload
    def __getitem__(self, index: int) -> Found: ...
    @overload
    def __getitem__(self, index: slice) -> "Segments": ...
    def __getitem__(self, index: int | slice) -> "Found | Segments":
        rows = range(len(self))  # unlike a tensor, also backwards
        if isinstance(index, slice):
            return self._select(torch.tensor(rows[index], dtype=torch.int64))
        return next(iter(self._select(torch.tensor([rows[index]]))))

    def filter(self, *, min_score: float = 0.0, names: Collection[str] | None = None) -> "Segments":
        """The segments with at least a score, and of some names; of all names if None.

        A segment without a name has a score of 0.

        Raises:
            ValueError: a name is not in the vocabulary.
        """
        return self._select(rows_to_keep(self.scores.nan_to_num(0.0), self.labels, self.names, min_score, names))

    def with_area(self) -> "Segments":
        """The segments whose masks are not empty."""
        return self._select(torch.nonzero(self.masks.flatten(1).any(1)).squeeze(1))

    @property
    def note(self) -> str:
        """Why there are no masks, or which names have none but empty ones; else empty."""
        with_area = {entry.name for entry in self.with_area()}
        empty = dict.fromkeys(entry.name or "something" for entry in self if entry.name not in with_area)
        return self.reason or (f"no mask for {', '.join(empty)}" if empty else "")

    def _select(self, rows: Tensor) -> "Segments":
        columns = ("masks", "ious", "labels", "scores", "low_res")
        return replace(self, **{column: getattr(self, column)[rows] for column in columns})

    @property
    def boxes(self) -> Tensor:
        """[P, 4] float32 xyxy, tight around the masks, edges exclusive; zeros for an empty mask."""
        return boxes_of(self.masks)

    def to_list(self) -> list[dict[str, Any]]:
        """`[{"mask": COCO RLE, "box", "label", "score", "iou"}]`, as the HTTP endpoint answers; unknowns are None."""
        encoded = [rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in self.masks.cpu()]
        columns = (values.tolist() for values in (self.boxes, self.labels, self.scores, self.ious))
        return [
            {
                "mask": {"size": [int(side) for side in mask["size"]], "counts": mask["counts"].decode()},
                "box": box,
                "label": self.names[label] if label >= 0 else None,
                "score": None if score != score else score,  # NaN is no JSON
                "iou": None if iou != iou else iou,
            }
            for mask, box, label, score, iou in zip(encoded, *columns, strict=True)
        ]

    def to_coco(self, file_name: str = "", image_id: int = 1) -> dict[str, Any]:
        """The segments as a COCO file of one image; segments without a name have category 0."""
        entries = [(entry["box"], entry["label"], entry["score"], entry["mask"]) for entry in self.to_list()]
        height, width = self.masks.shape[1:]
        return coco_file(entries, self.names, (width, height), file_name, image_id)

    def to_supervision(self) -> Any:
        """The segments as `supervision.Detections`, with `class_name` among their data.

        Raises:
            ImportError: the package supervision is not installed.
        """
        import supervision

        names = [self.names[label] if label >= 0 else "" for label in self.labels.tolist()]
        return supervision.Detections(
            xyxy=self.boxes.cpu().numpy(),
            confidence=self.scores.cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            mask=self.masks.cpu().numpy(),
            data={"class_name": np.array(names, dtype=object)},
        )

    def _repr_png_(self) -> bytes | None:
        """The image with its masks, which a notebook shows for a result in a cell's last line."""
        return png_of(self.draw()) if self.image is not None else None

    def draw(self, path: str | Path | None = None, *, image: Image.Image | None = None) -> Image.Image:
        """The image with its masks that are not empty, in the colours of their names, saved to `path` if given.

        `image` is drawn on instead of the segments' own; it is turned upright, as `segment` does.

        Raises:
            ValueError: there is no image to draw on.
        """
        picture = image if image is not None else self.image
        if picture is None:
            raise ValueError("these segments carry no image: pass image=")
        pixels, shown = np.asarray(upright(picture).convert("RGB"), np.float32).copy(), self.with_area()
        texts = [self.names[k] if k >= 0 else f"{index + 1}" for index, k in enumerate(shown.labels.tolist())]
        for text, mask in zip(texts, shown.masks.cpu().numpy(), strict=True):
            pixels[mask] = 0.5 * pixels[mask] + 0.5 * np.asarray(colour_of(text), np.float32)
        drawn = draw_boxes(Image.fromarray(pixels.astype(np.uint8)), shown.boxes.cpu(), texts, texts)
        if path is not None:
            drawn.save(path)
        return drawn


def boxes_of(masks_PHW: Tensor, *, whole_if_empty: bool = False) -> Tensor:
    """[P, H, W] bool -> [P, 4] float32 tight xyxy boxes, right and bottom edges exclusive.

    Empty masks have zeros, or the whole image.
    """
    height, width = masks_PHW.shape[1:]
    column_PW, row_PH = (masks_PHW.any(axis).to(torch.uint8) for axis in (1, 2))
    first = (column_PW.argmax(1), row_PH.argmax(1))
    last = (width - column_PW.flip(1).argmax(1), height - row_PH.flip(1).argmax(1))
    empty_P1 = row_PH.amax(1, keepdim=True) == 0
    boxes_P4 = torch.stack((*first, *last), dim=1).float()
    if whole_if_empty:  # already so: the first and the last of no pixel are both 0
        return boxes_P4
    return boxes_P4.masked_fill(empty_P1, 0.0)


@dataclass(frozen=True)
class MaskBatch(ImageBatch):
    """B images with the masks of their objects."""

    masks: tuple[Tensor, ...]
    """B tensors [N, H, W] bool, in the image's size or that before the image was resized to the model's."""
    labels: tuple[Tensor, ...]
    """B tensors [N] int64, rows of the training vocabulary; -1 where the category is unknown."""

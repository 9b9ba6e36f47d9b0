"""Ground truth and results in COCO's and LVIS's JSON, checked row by row and read in bounded memory."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
from faster_coco_eval import mask as rle

from ovd_models.errors import InputError, as_input_error
from ovd_models.metrics.records import (
    Category,
    Floats,
    GroundTruth,
    Ints,
    IouType,
    Predictions,
    concatenate,
    no_predictions,
    pair_codes,
)

CHUNK_BYTES = 32 << 20
"""Of a results file, decoded at a time."""
BORDER = 2.0
"""Pixels by which predicted boxes may leave their image before their format is doubted."""
SUSPECT, AS_CORNERS = 0.1, 0.9
"""Shares of boxes from which their format is doubted: outside their image, and inside it if read as corners."""


class RunLengths(msgspec.Struct):
    """A mask in COCO's run-length encoding, compressed or not."""

    size: tuple[int, int]
    counts: str | list[int]


Segmentation = list[list[float]] | RunLengths


class _Image(msgspec.Struct, gc=False):
    id: int
    width: int
    height: int
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None


class _Object(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: bool | int = 0
    segmentation: msgspec.Raw = msgspec.Raw()


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str
    frequency: str | None = None


class _File(msgspec.Struct, gc=False):
    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Category]


class _Result(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: Segmentation | None = None


# -------------------------------------------------------------------------------------------------------- ground truth


def read_truth(content: bytes, origin: str, *, masks: bool) -> GroundTruth:
    """Ground truth from the bytes of an annotation file in COCO's or LVIS's format.

    Args:
        content: of the file.
        origin: its name, for messages.
        masks: whether the masks are needed.

    Raises:
        InputError: a field is missing or wrong, or an object is of no image or category.
    """
    with as_input_error(origin):
        read = msgspec.json.decode(content, type=_File, strict=False)
    images = sorted(read.images, key=lambda image: image.id)
    categories = sorted(read.categories, key=lambda category: category.id)
    for field, entries in (("images", images), ("categories", categories)):
        ids = [entry.id for entry in entries]
        if len(set(ids)) < len(ids):
            repeated = next(one for one, two in itertools.pairwise(ids) if one == two)
            raise InputError(f"{origin}: {field}: id {repeated} is there twice, expected unique ids")
    place_of = {image.id: place for place, image in enumerate(images)}
    label_of = {category.id: label for label, category in enumerate(categories)}
    for number, entry in enumerate(read.annotations):
        for field, known in (("image_id", place_of), ("category_id", label_of)):
            if (value := getattr(entry, field)) not in known:
                kind = "images" if field == "image_id" else "categories"
                raise InputError(f"{origin}: annotations[{number}]: {field} {value} is not in {kind}")
    counts = _truth_masks(read.annotations, images, place_of, origin) if masks else None
    areas = [_area(entry, images[place_of[entry.image_id]], counts, at) for at, entry in enumerate(read.annotations)]
    return GroundTruth(
        origin=origin,
        image_ids=np.array([image.id for image in images], np.int64),
        sizes=np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2),
        categories=tuple(Category(entry.id, entry.name, entry.frequency or "") for entry in categories),
        images=np.array([place_of[entry.image_id] for entry in read.annotations], np.int64),
        labels=np.array([label_of[entry.category_id] for entry in read.annotations], np.int64),
        boxes=np.array([entry.bbox for entry in read.annotations], np.float64).reshape(-1, 4),
        areas=np.array(areas, np.float64),
        crowd=np.array([bool(entry.iscrowd) for entry in read.annotations], np.bool_),
        masks=None if counts is None else pa.array(counts, pa.large_string()),
        negative=_pairs(images, "neg_category_ids", label_of),
        not_exhaustive=_pairs(images, "not_exhaustive_category_ids", label_of),
    )


def _truth_masks(
    entries: Sequence[_Object], images: Sequence[_Image], place_of: dict[int, int], origin: str
) -> list[str]:
    counts = []
    for number, entry in enumerate(entries):
        image = images[place_of[entry.image_id]]
        with as_input_error(f"{origin}: annotations[{number}]: segmentation"):
            if bytes(entry.segmentation) in (b"", b"null", b"[]", b"{}"):
                raise InputError(f"{origin}: annotations[{number}]: no segmentation, expected one for masks")
            shape = msgspec.json.decode(entry.segmentation, type=Segmentation)
            counts.append(rle_counts(shape, image.height, image.width))
    return counts


def _area(entry: _Object, image: _Image, counts: Sequence[str] | None, number: int) -> float:
    if entry.area is not None:
        return entry.area
    if counts is not None:
        return float(rle.area({"size": [image.height, image.width], "counts": counts[number]}))
    return entry.bbox[2] * entry.bbox[3]


def _pairs(images: Sequence[_Image], field: str, label_of: dict[int, int]) -> Ints | None:
    """The pairs of a federated list; None if an image lacks the list."""
    lists: list[list[int] | None] = [getattr(image, field) for image in images]
    if any(entry is None for entry in lists):
        return None
    return pair_codes(
        ((place, label_of[key]) for place, keys in enumerate(lists) for key in keys or () if key in label_of),
        len(label_of),
    )


def rle_counts(shape: Segmentation, height: int, width: int) -> str:
    """Compressed COCO RLE counts of polygons or of an RLE.

    Raises:
        InputError: the mask is of another size than its image.
    """
    if isinstance(shape, list):
        merged = rle.merge(rle.frPyObjects(shape, height, width))
    else:
        if shape.size != (height, width):
            raise InputError(
                f"mask of {shape.size[0]} x {shape.size[1]} (height x width), expected its image's {height} x {width}"
            )
        merged = {"size": list(shape.size), "counts": shape.counts}
        if isinstance(shape.counts, list):
            merged = rle.frPyObjects(merged, height, width)
        else:
            rle.area(merged)
    counts = merged["counts"]
    return counts.decode() if isinstance(counts, bytes) else str(counts)


# ------------------------------------------------------------------------------------------------------------- results


def read_results(file: BinaryIO, origin: str, truth: GroundTruth, kind: IouType) -> Predictions:
    """Predictions from a results file: a list of `image_id`, `category_id`, `score`, `bbox` or `segmentation`.

    The area of a prediction is that of its box, or of its mask if the first row has no box, as in both official
    packages. An empty list is no prediction at all.

    Args:
        file: open for reading.
        origin: its name, for messages.
        truth: the images and categories that results may be of.
        kind: `segm` reads masks.

    Raises:
        InputError: a row is malformed, or of no image or category of the ground truth; the message names it.
    """
    image_of = {image: place for place, image in enumerate(truth.image_ids.tolist())}
    label_of = {category.id: label for label, category in enumerate(truth.categories)}
    parts: list[Predictions] = []
    start, with_boxes = 0, None
    for rows in _result_rows(file, origin):
        if with_boxes is None:
            with_boxes = rows[0].bbox is not None
        parts.append(_checked(rows, start, origin, truth, kind, image_of, label_of, with_boxes))
        start += len(rows)
    found = concatenate(parts) if parts else no_predictions()
    if kind == "bbox" and with_boxes:
        check_format(found, truth, origin)
    return found


def _result_rows(file: BinaryIO, origin: str) -> Iterator[list[_Result]]:
    """The rows of a list of objects, some megabytes at a time."""
    decoder = msgspec.json.Decoder(list[_Result], strict=False)
    start = 0
    for content in _pieces(file, origin):
        try:
            rows = decoder.decode(content)
        except msgspec.MsgspecError as error:
            raise _diagnosis(content, start, origin, error) from error
        if rows:
            yield rows
        start += len(rows)


def _pieces(file: BinaryIO, origin: str) -> Iterator[bytes]:
    """A JSON list of objects as shorter lists. Braces end objects, since RLE counts hold none."""
    rest, first = b"", True
    while chunk := file.read(CHUNK_BYTES):
        content = rest + chunk
        if first:
            content = content.lstrip()
            if not content:
                continue
            if content[:1] != b"[":
                raise InputError(f"{origin}: starts with {content[:1].decode(errors='replace')!r}, expected a list")
            content, first = content[1:], False
        view = np.frombuffer(content, np.uint8)
        marks = np.flatnonzero((view == 123) | (view == 125))
        depth = np.cumsum(np.where(view[marks] == 123, 1, -1))
        ends = marks[depth == 0]
        if not len(ends):
            rest = content
            continue
        cut = int(ends[-1]) + 1
        yield b"[" + content[:cut].lstrip().removeprefix(b",") + b"]"
        rest = content[cut:]
    tail = rest.strip()
    if first or not tail.endswith(b"]") or tail[:-1].strip():
        raise InputError(f"{origin}: ends within its list, expected a JSON list of results")


def _diagnosis(content: bytes, start: int, origin: str, error: Exception) -> InputError:
    """The first row that cannot be decoded, for the message: Python's parser also takes NaN and infinities."""
    try:
        rows = json.loads(content)
    except ValueError:
        return InputError(f"{origin}: after row {start}: {error}, expected a JSON list of results")
    for number, row in enumerate(rows, start):
        place = f"{origin}: row {number}"
        if isinstance(row, dict):
            for field in ("score", "bbox"):
                values = row.get(field) if isinstance(row.get(field), list) else [row.get(field)]
                wrong = [value for value in values or () if isinstance(value, float) and not math.isfinite(value)]
                if wrong:
                    return InputError(f"{place}: {field} {wrong[0]}, expected finite numbers")
        try:
            msgspec.convert(row, _Result, strict=False)
        except msgspec.ValidationError as found:
            return InputError(f"{place}: {found}")
    return InputError(f"{origin}: after row {start}: {error}")


def _checked(
    rows: Sequence[_Result],
    start: int,
    origin: str,
    truth: GroundTruth,
    kind: IouType,
    image_of: dict[int, int],
    label_of: dict[int, int],
    with_boxes: bool,
) -> Predictions:
    images = _indices(rows, "image_id", image_of, start, f"{origin}: row", truth.origin)
    labels = _indices(rows, "category_id", label_of, start, f"{origin}: row", truth.origin)
    need_masks = kind == "segm" or not with_boxes
    lacking = "segmentation" if need_masks else "bbox"
    for number, row in enumerate(rows, start):
        if getattr(row, lacking) is None or (with_boxes and row.bbox is None):
            missing = lacking if getattr(row, lacking) is None else "bbox"
            other = "segm" if missing == "bbox" else "bbox"
            raise InputError(f"{origin}: row {number}: no {missing}, expected one in each row (or --iou-type {other})")
    counts = _result_masks(rows, images, truth, start, origin) if need_masks else None
    sizes = truth.sizes[images].tolist()
    encoded = (
        [] if counts is None else [{"size": size, "counts": mask} for size, mask in zip(sizes, counts, strict=True)]
    )
    if with_boxes:
        boxes = np.array([row.bbox for row in rows], np.float64).reshape(-1, 4)
        areas: Floats = boxes[:, 2] * boxes[:, 3]
    else:
        boxes = np.asarray(rle.toBbox(encoded), np.float64).reshape(-1, 4)
        areas = np.asarray(rle.area(encoded), np.float64)
    scores = np.array([row.score for row in rows], np.float64)
    _check_numbers(boxes, scores, start, origin)
    masks = pa.array(counts, pa.large_string()) if counts is not None and kind == "segm" else None
    return Predictions(images=images, labels=labels, boxes=boxes, scores=scores, areas=areas, masks=masks)


def _indices(rows: Sequence[_Result], field: str, index: dict[int, int], start: int, place: str, known: str) -> Ints:
    try:
        return np.array([index[getattr(row, field)] for row in rows], np.int64)
    except KeyError as error:
        number = next(at for at, row in enumerate(rows, start) if getattr(row, field) not in index)
        raise InputError(f"{place} {number}: {field} {error} is not in {known}") from error


def _result_masks(rows: Sequence[_Result], images: Ints, truth: GroundTruth, start: int, origin: str) -> list[str]:
    counts = []
    for number, (row, (height, width)) in enumerate(zip(rows, truth.sizes[images].tolist(), strict=True), start):
        assert row.segmentation is not None
        try:
            counts.append(rle_counts(row.segmentation, height, width))
        except Exception as error:  # the library raises many kinds
            raise InputError(f"{origin}: row {number}: segmentation: {error}") from error
    return counts


def _check_numbers(boxes: Floats, scores: Floats, start: int, origin: str) -> None:
    """Check a part's boxes [N, 4] and scores [N].

    Raises:
        InputError: one is not finite, or a box has a negative side.
    """
    for field, wrong, expected in (
        ("score", ~np.isfinite(scores), "a finite number"),
        ("bbox", ~np.isfinite(boxes).all(1), "finite numbers"),
        ("bbox", (boxes[:, 2:] < 0).any(1), "x, y, width and height, none of these sides negative"),
    ):
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            value = scores[at] if field == "score" else boxes[at].tolist()
            raise InputError(f"{origin}: row {start + at}: {field} {value}, expected {expected}")


def check_format(predictions: Predictions, truth: GroundTruth, origin: str) -> None:
    """Check that boxes are xywh: many leave their image, and would all fit into it as corners, if they are xyxy.

    Raises:
        InputError: the boxes look like xyxy.
    """
    if not len(predictions):
        return
    edges = truth.sizes[predictions.images][:, ::-1].astype(np.float64) + BORDER
    outside = (predictions.boxes[:, :2] + predictions.boxes[:, 2:] > edges).any(1)
    as_corners = (predictions.boxes[:, 2:] > predictions.boxes[:, :2]).all(1)
    as_corners &= (predictions.boxes[:, 2:] <= edges).all(1)
    if outside.mean() >= SUSPECT and as_corners.mean() >= AS_CORNERS:
        row = int(np.flatnonzero(outside)[0])
        box = [round(value, 2) for value in predictions.boxes[row].tolist()]
        height, width = truth.sizes[predictions.images[row]].tolist()
        raise InputError(
            f"{origin}: row {row}: bbox {box} leaves its image of {width} x {height} pixels, as do "
            f"{outside.mean():.0%} of the boxes; they look like x0, y0, x1, y1, expected x, y, width, height"
        )


def results_json(predictions: Predictions, truth: GroundTruth) -> Iterator[str]:
    """A results file, in chunks of text, in the order of the predictions."""
    ids = truth.image_ids[predictions.images].tolist()
    keys = [truth.categories[label].id for label in predictions.labels.tolist()]
    masks: Iterable[str | None] = (
        [None] * len(predictions) if predictions.masks is None else (value.as_py() for value in predictions.masks)
    )
    columns = zip(
        ids, keys, predictions.boxes.tolist(), predictions.scores.tolist(), predictions.images.tolist(), masks,
        strict=True,
    )  # fmt: skip
    separator = "["
    for image, category, box, score, place, mask in columns:
        row: dict[str, Any] = {"image_id": image, "category_id": category, "bbox": box, "score": score}
        if mask:
            row["segmentation"] = {"size": truth.sizes[place].tolist(), "counts": mask}
        yield separator + json.dumps(row)
        separator = ",\n"
    yield "[]\n" if separator == "[" else "]\n"

"""Ground truth and predictions by their names: files of any tool, or our tables."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import storage, tables
from data_prep.boxes.coco import coco_splits
from ovd_models.errors import InputError, as_input_error
from ovd_models.metrics import files
from ovd_models.metrics.protocols import Protocol
from ovd_models.metrics.records import (
    Category,
    GroundTruth,
    IouType,
    Predictions,
    concatenate,
    predictions_of_rows,
    truth_of_rows,
)

ProtocolChoice = Literal["auto", "lvis", "lvis-fixed", "coco", "coco-ovd", "ovsam"]


def open_file(uri: str, expected: str) -> BinaryIO:
    """A file of any storage, open for reading.

    Raises:
        InputError: it cannot be read.
    """
    try:
        filesystem, path = storage.resolve(uri)
        return filesystem.open_input_stream(path)  # type: ignore[no-any-return]
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(f"{uri}: cannot be read ({reason}), expected {expected}") from error


def read_truth_file(uri: str, kind: IouType, novel: str = "") -> GroundTruth:
    """An annotation file in COCO's or LVIS's format, its categories split into base and novel.

    Args:
        uri: of the file.
        kind: `segm` reads the masks.
        novel: a file with the names of the novel categories, one a line; if empty, LVIS's rare ones are novel, or
            OV-COCO's 17.

    Raises:
        InputError: a file is unreadable, a field is missing or wrong, or a novel name is of no category.
    """
    with open_file(uri, "an annotation file in COCO's or LVIS's format") as file:
        truth = files.read_truth(file.read(), uri, masks=kind == "segm")
    return replace(truth, categories=split_categories(truth, novel))


def split_categories(truth: GroundTruth, novel: str) -> tuple[Category, ...]:
    """The categories with their splits; see `read_truth_file`."""
    if novel:
        names = {line.strip() for line in storage_text(novel).splitlines() if line.strip()}
        unknown = sorted(names - set(truth.names))
        if unknown:
            raise InputError(f"{novel}: {unknown[0]!r} is no category of {truth.origin}, expected its names")
        splits: Mapping[str, str] = {name: "novel" if name in names else "base" for name in truth.names}
    elif all(category.frequency in ("r", "c", "f") for category in truth.categories):
        return tuple(replace(entry, split="novel" if entry.frequency == "r" else "base") for entry in truth.categories)
    else:
        splits = coco_splits(truth.names) or {}
    return tuple(replace(entry, split=splits.get(entry.name, "")) for entry in truth.categories)


def storage_text(uri: str) -> str:
    """A text file.

    Raises:
        InputError: it cannot be read.
    """
    with open_file(uri, "a file of names, one a line") as file, as_input_error(uri):
        return file.read().decode("utf-8-sig")


def read_prediction_file(uri: str, truth: GroundTruth, kind: IouType) -> Predictions:
    """A results file in COCO's or LVIS's format (`.json`), or rows of `predictions` (`.parquet`).

    Raises:
        InputError: it is unreadable, or a row does not fit the ground truth.
    """
    if not storage.base_name(uri).endswith(".parquet"):
        with open_file(uri, "a results file: a JSON list, or a .parquet file of predictions") as file:
            return files.read_results(file, uri, truth, kind)
    number_of = {image: number for number, image in enumerate(truth.image_ids.tolist())}
    filesystem, path = storage.resolve(uri)
    columns = [name for name in tables.SCHEMAS["predictions"].names if kind == "segm" or name != "masks"]
    with as_input_error(uri), pq.ParquetFile(path, filesystem=filesystem) as file:
        missing = [name for name in columns if name not in (*file.schema_arrow.names, "error", "image_id")]
        if missing:
            raise InputError(f"{uri}: no column {missing[0]}, expected the columns of predictions")
        wanted = [name for name in columns if name in file.schema_arrow.names]
        parts = [
            predictions_of_rows(pa.Table.from_batches([batch]), truth, number_of, uri)
            for batch in file.iter_batches(columns=wanted)
        ]
    return _checked(concatenate(parts), kind, uri)


def read_tables(
    storage_uri: str, boxes: str, categories: str, predictions: str, kind: IouType, images: int = 0
) -> tuple[GroundTruth, Predictions]:
    """A `boxes` table as ground truth, and its `predictions`.

    Only categories with a split are evaluated.

    Raises:
        InputError: a table is missing.
    """
    truth, number_of = read_truth_table(storage_uri, boxes, categories, images)
    columns = ["source_id", "boxes", "category_ids", "scores", *(["masks"] if kind == "segm" else [])]
    origin = f"predictions/{predictions}"
    parts = [
        predictions_of_rows(rows, truth, number_of, origin)
        for rows in tables.read_parts(storage_uri, "predictions", predictions, columns)
    ]
    return truth, _checked(concatenate(parts), kind, origin)


def read_truth_table(
    storage_uri: str, boxes: str, categories: str, images: int = 0
) -> tuple[GroundTruth, dict[int, int]]:
    """A `boxes` table as ground truth, and the number of each `source_id`."""
    rows = tables.read_table(storage_uri, "boxes", boxes).slice(0, images or None).to_pylist()
    table = tables.read_table(storage_uri, "categories", categories).to_pylist()
    chosen = [
        Category(row["category_id"], row["name"], row["frequency"], row["split"]) for row in table if row["split"]
    ]
    truth = truth_of_rows(rows, chosen, f"boxes/{boxes}")
    sources = [row["source_id"] for row in rows]
    return replace(truth, image_ids=np.array(sources, np.int64)), {source: n for n, source in enumerate(sources)}


def _checked(predictions: Predictions, kind: IouType, origin: str) -> Predictions:
    if kind == "segm" and len(predictions) and predictions.masks is None:
        raise InputError(f"{origin}: no masks, expected one for each prediction for --iou-type segm")
    wrong = ~np.isfinite(predictions.scores) | ~np.isfinite(predictions.boxes).all(1)
    if wrong.any():
        raise InputError(f"{origin}: prediction {int(np.flatnonzero(wrong)[0])}: not finite, expected finite numbers")
    return predictions


def choose_protocol(truth: GroundTruth, chosen: ProtocolChoice) -> Protocol:
    """The protocol of a data set unless another is named: LVIS's, OV-COCO's if a category is novel, or COCO's.

    LVIS's needs the names that images are known not to show: without any, it would count no false detection of a name
    in images without it.
    """
    if chosen != "auto":
        return chosen
    frequencies = truth.categories and all(entry.frequency in ("r", "c", "f") for entry in truth.categories)
    if frequencies and truth.negative is not None and truth.not_exhaustive is not None:
        return "lvis"
    return "coco-ovd" if any(entry.split == "novel" for entry in truth.categories) else "coco"


def export(predictions: Predictions, truth: GroundTruth, uri: str, table: Iterator[pa.Table]) -> None:
    """Write predictions as a results file in COCO's and LVIS's format, or as one file of `predictions` rows.

    Args:
        predictions: of the ground truth.
        truth: gives ids of images and categories.
        uri: the file, which ends with `.json` or `.parquet`.
        table: the same predictions as rows.

    Raises:
        InputError: the name ends otherwise.
    """
    if storage.base_name(uri).endswith(".json"):
        storage.write_chunks(uri, (text.encode() for text in files.results_json(predictions, truth)))
    elif storage.base_name(uri).endswith(".parquet"):
        storage.write_bytes(uri, tables.parquet_bytes(pa.concat_tables(table)))
    else:
        raise InputError(f"--export {uri}: expected a name that ends with .json or .parquet")


def write_metrics(uri: str, numbers: Mapping[str, float]) -> None:
    """Write metrics as a flat JSON object."""
    storage.write_bytes(uri, (json.dumps(numbers, indent=1) + "\n").encode())

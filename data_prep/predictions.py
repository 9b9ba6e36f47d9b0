"""A detector's predictions for a whole `boxes` table: a job of parts, each a file of `predictions`.

boxes --parts of some images--> actors: read, detect --> part-00000.parquet ... --> manifest

An image's predictions depend on its part alone, so the table's bytes are the same for any number of actors. A part that
is saved is not predicted again.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch

import ovd_models
from data_prep import locks, storage, tables
from data_prep.boxes.cleaning import SkipReport
from data_prep.parts import Pool, run_parts
from data_prep.progress import Progress
from data_prep.streams.images import try_image
from data_prep.tables import FileEntry
from ovd_models.batches import Detections
from ovd_models.checkpoint_info import folder_digest, read_info
from ovd_models.errors import InputError
from ovd_models.prompts import SynonymRule

PRODUCER = "workflows/evaluate.py"
BATCHES_PER_PART = 4
"""A part is lost with its actor, so it is short; its file should not be tiny."""
READERS = 4
"""Images of a batch that are read at a time."""


@dataclass(frozen=True, kw_only=True)
class PredictionJob:
    """All that a prediction depends on."""

    model: str
    """Folder or URI of a detector's checkpoint."""
    boxes: str
    """Name of the `boxes` table."""
    categories: Mapping[int, str]
    """Category id -> name: the vocabulary."""
    images: int = 0
    """Number of images, from the start of the table; 0 means all."""
    batch_size: int = 16
    score_threshold: float = 0.01
    max_detections: int = 100
    synonyms: SynonymRule = "none"
    other_words: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """Synonyms by name, if they are used."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.batch_size < 1:
            raise InputError(f"batch_size: {self.batch_size}, expected at least 1")


@dataclass(frozen=True)
class ImageReference:
    """What a worker needs of a row of `boxes`."""

    image_id: str
    source_id: int
    uri: str


Part = tuple[int, tuple[ImageReference, ...]]
"""Number of a part, and its images."""


class PartPredictor:
    """Reads the images of a part, detects, and saves the part's file."""

    def __init__(self, job: PredictionJob, storage_uri: str, name: str) -> None:
        self.job, self.storage, self.name = job, storage_uri, name
        torch.set_num_threads(1)  # else sums would depend on the number of threads
        self.detector = ovd_models.load(storage.local_folder(job.model), job.device)

    def __call__(self, part: Part) -> FileEntry:
        """Predict a part.

        Raises:
            InputError: a name cannot be embedded.
        """
        torch.set_num_threads(1)  # it is a setting of each thread
        number, references = part
        rows: list[dict[str, Any]] = []
        size = self.job.batch_size
        with ThreadPoolExecutor(READERS) as readers:
            for first in range(0, len(references), size):
                rows += self._predict(references[first : first + size], readers)
        table = pa.Table.from_pylist(rows, schema=tables.SCHEMAS["predictions"])
        return tables.write_part(self.storage, "predictions", self.name, part_path(number), table)

    def _predict(self, references: Sequence[ImageReference], readers: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
        uris = [storage.join(self.storage, reference.uri) for reference in references]
        read = list(readers.map(try_image, uris))
        images = [image for image in read if not isinstance(image, str)]
        job = self.job
        with torch.inference_mode():
            found: Iterator[Detections] = iter(
                self.detector.detect(
                    images,
                    list(job.categories.values()),
                    score_threshold=job.score_threshold,
                    max_detections=job.max_detections,
                    synonyms=job.other_words if job.synonyms != "none" else None,
                    merge="max" if job.synonyms == "max" else "mean",
                )
                if images
                else ()
            )
        for reference, image in zip(references, read, strict=True):
            error = image if isinstance(image, str) else ""
            yield _row(reference, None if error else next(found), list(job.categories), error)


def _row(reference: ImageReference, found: Detections | None, ids: Sequence[int], error: str) -> dict[str, Any]:
    return {
        "image_id": reference.image_id,
        "source_id": reference.source_id,
        "boxes": [] if found is None else found.boxes.tolist(),
        "category_ids": [] if found is None else [ids[label] for label in found.labels.tolist()],
        "scores": [] if found is None else found.scores.tolist(),
        "masks": [] if found is None or found.masks is None else list(found.masks),
        "error": error,
    }


def part_path(number: int) -> str:
    """The file of a part, relative to the table's folder."""
    return f"part-{number:05d}.parquet"


def predict(job: PredictionJob, storage_uri: str, pool: Pool) -> str:
    """Publish a job's `predictions`, or find them; returns the table's name.

    The name holds a digest of the checkpoint, the images and the settings, so a second run of the same job reads what
    the first one made, and continues it if it was stopped.

    Raises:
        InputError: the model or the table is missing, no image can be read, or another process predicts the same.
    """
    storage_uri = storage.absolute(storage_uri)
    digest, name = job_digest(job, storage_uri)
    with locks.hold(storage_uri, f"predictions/{name}"):
        if tables.find_manifest(storage_uri, "predictions", name) is None:
            entries = _predict_parts(job, storage_uri, name, pool)
            details = {"model": job.model, "boxes": job.boxes, "names": list(job.categories.values())}
            tables.publish(
                storage_uri, "predictions", name, entries, producer=PRODUCER, config_hash=digest, details=details
            )
    report_unreadable(storage_uri, name)
    return name


def _predict_parts(job: PredictionJob, storage_uri: str, name: str, pool: Pool) -> list[FileEntry]:
    parts = list_parts(job, storage_uri)
    done = {part[0]: entry for part in parts if (entry := _saved(storage_uri, name, part)) is not None}
    todo = [part for part in parts if part[0] not in done]
    if done:
        print(f"predictions/{name}: {len(done)} of {len(parts)} parts are there already", flush=True)
    progress = Progress("predict", "images", sum(len(part[1]) for part in todo))
    with same_threads():
        for number, entry in run_parts(partial(PartPredictor, job, storage_uri, name), todo, pool):
            done[todo[number][0]] = entry
            progress.add(entry.rows)
    if todo:
        progress.close()
    return [done[part[0]] for part in parts]


@contextmanager
def same_threads() -> Iterator[None]:
    """Keep this process's number of torch threads, which a predictor changes."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def list_parts(job: PredictionJob, storage_uri: str) -> list[Part]:
    """The parts of a job, in the order of the table.

    Raises:
        InputError: the table is missing or empty.
    """
    columns = [field.name for field in dataclasses.fields(ImageReference)]
    rows = tables.read_table(storage_uri, "boxes", job.boxes, columns).slice(0, job.images or None)
    references = [ImageReference(**row) for row in rows.to_pylist()]
    if not references:
        raise InputError(f"boxes/{job.boxes}: no images, expected at least one")
    size = BATCHES_PER_PART * job.batch_size
    return [
        (number, tuple(references[first : first + size]))
        for number, first in enumerate(range(0, len(references), size))
    ]


def _saved(storage_uri: str, name: str, part: Part) -> FileEntry | None:
    """A part's file, if it was saved before."""
    path = part_path(part[0])
    uri = storage.join(tables.table_uri(storage_uri, "predictions", name), path)
    if not storage.exists(uri):
        return None
    content = storage.read_bytes(uri)
    return FileEntry(path, len(content), len(part[1]), storage.sha256(content))


def job_digest(job: PredictionJob, storage_uri: str) -> tuple[str, str]:
    """A digest of all that the predictions depend on, and the name of their table, which holds it."""
    folder = storage.local_folder(job.model)
    read_info(folder)  # refuses what is no checkpoint
    settings = dataclasses.asdict(job) | {
        "model": folder_digest(folder),
        "boxes": tables.read_manifest(storage_uri, "boxes", job.boxes).digest,
        "device": job.device.partition(":")[0],
    }
    digest = storage.sha256(json.dumps(settings, default=str).encode())[:16]
    return digest, f"{job.boxes}-{digest}"


def report_unreadable(storage_uri: str, name: str) -> None:
    """Name the images that could not be read.

    Raises:
        InputError: none of them could be read.
    """
    skipped, count = SkipReport(), 0
    for rows in tables.read_parts(storage_uri, "predictions", name, ["error"]):
        count += rows.num_rows
        for error in filter(None, rows["error"].to_pylist()):
            skipped.add("images that cannot be read", error)
    if count and skipped.counts.total() == count:
        storage.remove_folder(tables.table_uri(storage_uri, "predictions", name))  # the images may come back
        raise InputError(f"no image can be read: {skipped}")
    if skipped:
        print(f"left out: {skipped}", flush=True)


def pool_of(workers: int, device: str) -> Pool:
    """Where a job runs.

    Args:
        workers: number of actors; 0 works inside this process, on the CPU a part a core at a time.
        device: of the model, such as `cuda`.
    """
    gpus = 0 if device == "cpu" else 1
    cores = len(os.sched_getaffinity(0)) if not gpus and not workers else 1
    return Pool(workers=workers, parts_at_a_time=cores, cpus=1, gpus=gpus)

"""The cache of a SAM's image embeddings: float16, in shards, keyed by the model.

boxes --shards of images--> SAM's image encoder --> features/<name>: flat files [rows, C, h, h] and their index
"""

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data_prep import storage, tables
from data_prep.parts import Pool, run_parts
from data_prep.progress import Progress
from data_prep.streams.images import read_image
from data_prep.tables import FileEntry, Manifest
from ovd_models.checkpoints import load_model
from ovd_models.errors import InputError
from ovd_models.preprocess import to_tensor
from ovd_models.sam.model import SamConfig, SamModel

PRODUCER = "workflows/ovsam.py"


def cache_name(storage_uri: str, boxes: str, teacher: str) -> str:
    """The cache's name: the name and digest of the boxes table, and the digest of the model's config and weights.

    Raises:
        InputError: the table is missing.
    """
    digest = tables.read_manifest(storage_uri, "boxes", boxes).digest.rpartition(":")[2]
    return f"{boxes}-{digest[:8]}-{teacher.rpartition(':')[2]}"


def cache_features(
    storage_uri: str,
    boxes: str,
    sam_folder: str,
    teacher: str,
    config: SamConfig,
    *,
    rows_per_shard: int,
    workers: int,
    gpus: float = 0.0,
) -> Manifest:
    """Publish `features/<cache_name>`; complete shards of an interrupted run are kept.

    Images that cannot be read have no row; the first is printed, and the manifest's details list their ids.

    Args:
        storage_uri: the storage.
        boxes: name of the `boxes` table whose images are embedded.
        sam_folder: the SAM's checkpoint, readable on every node.
        teacher: the SAM's id.
        config: the SAM's config.
        rows_per_shard: images in a file.
        workers: processes that embed; 0 embeds inside the driver, for debugging.
        gpus: GPUs of each process; 0 embeds on the CPU.

    Raises:
        InputError: a table or the checkpoint is missing, or no image can be read.
    """
    name = cache_name(storage_uri, boxes, teacher)
    done = tables.find_manifest(storage_uri, "features", name)
    if done is not None:
        return done
    rows = tables.read_table(storage_uri, "boxes", boxes, ["image_id", "uri"])
    uri = storage.absolute(storage_uri)
    shards = -(-rows.num_rows // rows_per_shard)
    parts = [part_name(rows_per_shard, number) for number in range(shards)]
    missing = [number for number, part in enumerate(parts) if not storage.exists(receipt_uri(uri, name, part))]
    if missing:
        make_writer = partial(FeatureWriter, uri, name, rows, sam_folder, rows_per_shard, gpus > 0)
        progress = Progress(
            f"features/{name}",
            "images",
            sum(len(rows.slice(number * rows_per_shard, rows_per_shard)) for number in missing),
        )
        for _, images in run_parts(make_writer, missing, Pool(workers=workers, cpus=1, gpus=gpus)):
            progress.add(images)
        progress.close()
    receipts = [json.loads(storage.read_bytes(receipt_uri(uri, name, part))) for part in parts]
    files = [FileEntry(**entry) for receipt in receipts for entry in receipt["files"]]
    unreadable = {key: reason for receipt in receipts for key, reason in receipt["unreadable"].items()}
    if unreadable:
        message = f"{len(unreadable):,} of {rows.num_rows:,} images cannot be read, such as {min(unreadable.values())}"
        if len(unreadable) == rows.num_rows:
            raise InputError(f"boxes/{boxes}: {message}")
        print(f"features/{name}: {message}", flush=True)
    return tables.publish(
        storage_uri,
        "features",
        name,
        files,
        producer=PRODUCER,
        config_hash=teacher,
        details={
            "teacher": teacher,
            "shape": [config.prompt_width, config.embedding_side, config.embedding_side],
            "unreadable": sorted(unreadable),
            "preprocessing": {"image_size": config.image_size, "resize": "longest side, segment-anything's"},
        },
    )


def part_name(rows_per_shard: int, number: int) -> str:
    """A shard's name; it contains the shard size, on which its rows depend."""
    return f"part-{rows_per_shard}-{number:05d}"


def receipt_uri(storage_uri: str, name: str, part: str) -> str:
    """The file that marks a shard as complete and lists its files and the images that cannot be read."""
    return storage.join(tables.table_uri(storage_uri, "features", name), f"receipts/{part}.json")


class FeatureWriter:
    """A worker that embeds and writes shards of the cache, given their numbers."""

    def __init__(
        self, storage_uri: str, name: str, rows: pa.Table, sam_folder: str, rows_per_shard: int, use_gpu: bool
    ) -> None:
        self.storage_uri, self.name, self.rows, self.rows_per_shard = storage_uri, name, rows, rows_per_shard
        self.device = torch.device("cuda" if use_gpu else "cpu")
        self.model = load_model(storage.local_folder(sam_folder), SamModel).to(self.device)

    def __call__(self, number: int) -> int:
        """Write the embeddings of one shard, their index, and last the receipt; returns its number of images."""
        rows = self.rows.slice(number * self.rows_per_shard, self.rows_per_shard)
        part = part_name(self.rows_per_shard, number)
        file, index = f"{part}.f16", f"{part}.parquet"
        features: dict[str, np.ndarray] = {}
        unreadable: dict[str, str] = {}
        for image_id, uri in zip(rows["image_id"].to_pylist(), rows["uri"].to_pylist(), strict=True):
            try:
                features[image_id] = self.embed(storage.join(self.storage_uri, uri))
            except InputError as error:
                unreadable[image_id] = str(error)
        content = b"".join(feature.astype("<f2").tobytes() for feature in features.values())
        columns: dict[str, list[Any]] = {
            "image_id": list(features),
            "file": [file] * len(features),
            "row": list(range(len(features))),
        }
        table = pa.table(columns, schema=tables.SCHEMAS["features"])
        entries = [
            tables.write_file(self.storage_uri, "features", self.name, file, content),
            tables.write_part(self.storage_uri, "features", self.name, index, table),
        ]
        receipt = json.dumps({"files": [asdict(entry) for entry in entries], "unreadable": unreadable}).encode()
        storage.write_bytes(receipt_uri(self.storage_uri, self.name, part), receipt)
        return int(rows.num_rows)

    def embed(self, uri: str) -> np.ndarray:
        """[C, h, h] of an image file.

        Raises:
            InputError: it cannot be read.
        """
        image = to_tensor(read_image(uri)).to(self.device)
        embedding: np.ndarray = self.model.encode(image).embedding[0].cpu().numpy()
        return embedding

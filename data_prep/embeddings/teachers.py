"""What a CLIP teacher says about regions and about image-text pairs, computed once for a whole table.

    table --cut into shards--> pixels (CPU pool) --crops, CLIP (actors)--> rows --save--> flat arrays and their index

Shards are cut by the table alone and each is embedded by itself, so the bytes on disk depend neither on the number of
actors nor on where a run was killed.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from data_prep import storage, tables
from data_prep.embeddings.crops import Colour, CropConfig, Fit, crop_squares, crop_windows, square
from data_prep.embeddings.stores import ROWS, EmbeddingJob, save_shard
from data_prep.pairs.shards import runs_of_size
from ovd_models.errors import InputError
from ovd_models.images import decode_image

if TYPE_CHECKING:
    from ovd_models.clip.model import Clip

Pixels = npt.NDArray[np.uint8]
SHARD_PIXELS = 32 << 20
"""Decoded pixels of a shard: 96 MiB, below the size at which Ray Data cuts blocks; a larger image stands alone."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How the work is shared out; results depend on `bfloat16` and, in their last digits, on `batch_size` alone."""

    actors: int | None = None
    """Processes that hold the teacher; None: one for eight cores, or as many as the GPUs allow. Each works on several
    shards at a time: two, or without a GPU one for each core that it has. 0 embeds inside the driver, for debugging."""
    gpus: float = 0
    """GPUs of an actor."""
    threads: int = 1
    """Threads of an actor that cut out crops while a GPU looks at earlier ones; without one, its shards share the
    cores, and each cuts out its own."""
    batch_size: int = 32
    """Squares or captions that the teacher looks at together; some hundred on a GPU. On a CPU, activations of larger
    batches of ViT-B/32 are beyond what the allocator keeps, and their pages are made anew in every layer."""
    images_per_shard: int = 64
    """Images of a shard at most: what a killed run computes again."""
    waiting_bytes: int = 256 << 20
    """Of decoded images that wait for an actor."""
    bfloat16: bool | None = None
    """Compute in bfloat16; None: on a GPU. A CPU with instructions for it is faster with convolutions, not with
    transformers."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("threads", "batch_size", "images_per_shard"):
            if getattr(self, name) < 1:
                raise InputError(f"--embed.{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more")


# ---------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows of one Parquet file that are embedded together."""

    name: str
    uri: str
    start: int
    stop: int


def cut_shards(storage_uri: str, table: str, name: str, images: int, *, prefix: str = "") -> list[Shard]:
    """Shards of the images of a published table: runs of at most `images` rows of a file and of `SHARD_PIXELS`.

    Args:
        storage_uri: the storage.
        table: `boxes` or `pairs`.
        name: of the table.
        images: of a shard, at most.
        prefix: of the shards' names, before a number.
    """
    manifest = tables.read_manifest(storage_uri, table, name)
    root = storage.absolute(tables.table_uri(storage_uri, table, name))
    found: list[Shard] = []
    for path in tables.parquet_files(manifest):
        uri = storage.join(root, path)
        sides = tables.read_parquet(uri, ["width", "height"])
        pixels = sides["width"].to_numpy().astype(np.int64) * sides["height"].to_numpy()
        for start, stop in runs_of_size(np.maximum(pixels, SHARD_PIXELS // images).tolist(), SHARD_PIXELS):
            found.append(Shard(name=f"{prefix}{len(found):06d}", uri=uri, start=start, stop=stop))
    return found


class Shards(Datasource):
    """Shards as blocks of Ray Data: the pixels of their images beside some columns, and the name of the `shard`."""

    def __init__(self, shards: Sequence[Shard], columns: Sequence[str], load: Callable[[pa.Table], pa.Table]) -> None:
        """Take what is read.

        Args:
            shards: one a block.
            columns: of the table.
            load: rows with these columns -> rows with pixels; runs on the CPU pool.
        """
        self.shards, self.read = shards, partial(read_shard, tuple(columns), load)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """A task a shard, however many are asked for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(self.read, shard), unknown) for shard in self.shards]


def read_shard(columns: tuple[str, ...], load: Callable[[pa.Table], pa.Table], shard: Shard) -> list[pa.Table]:
    """The rows of a shard as `load` makes them."""
    rows = load(tables.read_parquet(shard.uri, list(columns)).slice(shard.start, shard.stop - shard.start))
    return [rows.append_column("shard", pa.array([shard.name] * rows.num_rows, pa.string()))]


def load_pictures(rows: pa.Table, root: str) -> pa.Table:
    """Rows of `boxes` -> the same with raw RGB `pixels`, `height` and `width`, as decoded.

    Args:
        rows: with `uri`, relative to `root` or absolute.
        root: the storage.
    """
    uris = [storage.absolute(storage.join(root, uri)) for uri in rows["uri"].to_pylist()]
    images = [decode_image(storage.read_bytes(uri), uri) for uri in uris]
    return rows.drop_columns(["uri"]).append_column(
        "pixels", pa.array([image.tobytes() for image in images], pa.large_binary())
    ).append_column("height", pa.array([image.height for image in images])).append_column(
        "width", pa.array([image.width for image in images])
    )  # fmt: skip


def load_squares(rows: pa.Table, root: str, side: int, fit: Fit, margin: Colour) -> pa.Table:
    """Rows of `pairs` -> `image_id`, `caption` and raw RGB `pixels` of the teacher's input size.

    Args:
        rows: with `image_id`, `caption`, `shard`, `offset`, `size`.
        root: folder of the pairs table.
        side: of the squares.
        fit: how a picture becomes one.
        margin: colour around it.
    """
    squares = [square(decode_image(content, name), side, fit, margin) for content, name in read_members(rows, root)]
    pixels = pa.array([entry.tobytes() for entry in squares], pa.large_binary())
    return rows.select(["image_id", "caption"]).append_column("pixels", pixels)


def read_members(rows: pa.Table, root: str) -> Iterator[tuple[bytes, str]]:
    """The image bytes of rows of `pairs`, with a name for messages; rows that lie together are one range read."""
    members = list(zip(*(rows[name].to_pylist() for name in ("shard", "offset", "size")), strict=True))
    for start, stop in _same_file(members):
        path = members[start][0]
        first = min(offset for _, offset, _ in members[start:stop])
        last = max(offset + size for _, offset, size in members[start:stop])
        content = storage.read_bytes(storage.join(root, path), offset=first, size=last - first)
        for _, offset, size in members[start:stop]:
            yield content[offset - first : offset - first + size], f"{path}@{offset}"


def _same_file(members: Sequence[tuple[str, int, int]]) -> Iterator[tuple[int, int]]:
    """Runs of members of one tar."""
    start = 0
    for stop in range(1, len(members) + 1):
        if stop == len(members) or members[stop][0] != members[start][0]:
            yield start, stop
            start = stop


# --------------------------------------------------------------------------------------------------------- teacher


class Teacher:
    """A CLIP checkpoint that looks at squares and captions, batch by batch."""

    def __init__(self, checkpoint: str, config: EmbedConfig) -> None:
        """Load it.

        Args:
            checkpoint: folder or URI.
            config: batch size, threads, and whether there is a GPU.
        """
        import torch  # here, so that the data tasks stay small

        from ovd_models.clip.model import load_clip
        from ovd_models.clip.towers import fold_norms

        self._torch, self.config = torch, config
        self.device = torch.device("cuda" if config.gpus else "cpu")
        self.half = bool(config.gpus) if config.bfloat16 is None else config.bfloat16
        clip, self.id = load_clip(storage.local_folder(checkpoint))
        fold_norms(clip.model.visual)
        self.clip = clip.to(self.device)
        self.side = clip.config.image_size
        self.margin = margin_of(clip.normalise.mean)
        self.pool = ThreadPoolExecutor(config.threads) if config.gpus else None

    def embed_squares(self, batches: Iterable[Callable[[], Pixels]]) -> npt.NDArray[np.float32]:
        """[N, D] features, not normalised, of N squares.

        Args:
            batches: functions that give the pixels [B, side, side, 3] of the next ones; in threads ahead of a GPU.
        """
        torch, clip = self._torch, self.clip
        found = [torch.empty(0, clip.config.embed_dim, device=self.device)]
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, self.half):
            for pixels in ahead(batches, self.pool, self.config.threads + 1) if self.pool else (b() for b in batches):
                images = torch.from_numpy(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                found.append(clip.image_features(images))
        rows: npt.NDArray[np.float32] = torch.cat(found).cpu().numpy()
        return rows

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N, D] unit rows; a repeated text is embedded once.

        Texts of like length share a batch, since a batch costs what its longest one does.
        """
        torch, clip = self._torch, self.clip
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        rows = np.empty((len(place), clip.config.embed_dim), np.float32)
        tokens = clip.tokenize(list(place))
        order = torch.argsort((tokens != 0).sum(1), stable=True)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, self.half):
            for start in range(0, len(place), self.config.batch_size):
                chosen = order[start : start + self.config.batch_size]
                rows[chosen.numpy()] = clip.encode_tokens(tokens[chosen].to(self.device)).float().cpu().numpy()
        return rows[[place[text] for text in texts]]


def store_checkpoint(clip: "Clip", uri: str) -> None:
    """Write a model into a storage, where the actors of every machine can load it."""
    from ovd_models.clip.model import save_clip

    with tempfile.TemporaryDirectory() as folder:
        save_clip(clip, folder)
        storage.upload_folder(Path(folder), uri)


def margin_of(mean: Sequence[float]) -> Colour:
    """The colour that a teacher sees as nothing: the mean of its training images."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def ahead(batches: Iterable[Callable[[], Pixels]], pool: ThreadPoolExecutor, depth: int) -> Iterator[Pixels]:
    """What functions return, in order, at most `depth` of them running or waiting."""
    waiting: deque[Future[Pixels]] = deque()
    for batch in batches:
        waiting.append(pool.submit(batch))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def embed_regions(
    teacher: Teacher, images: Sequence[Pixels], boxes: Sequence[npt.NDArray[np.float32]], crops: CropConfig
) -> list[npt.NDArray[np.float16]]:
    """What the teacher sees in the boxes of some images, each decoded once (ViLD, section 3.3).

    v = (f(crop at 1x) + f(crop at 1.5x)) / |...|; equal crops, as of boxes that fill the image, are looked at once.

    Args:
        teacher: f.
        images: RGB pictures [H, W, 3] of any sizes.
        boxes: [N, 4] xyxy of each, in its pixels.
        crops: which crops stand for a box.

    Returns:
        For each image [N, D] unit rows.
    """
    windows: list[npt.NDArray[np.int64]] = []
    places: list[npt.NDArray[np.int64]] = []
    total = 0
    for image, box_N4 in zip(images, boxes, strict=True):
        every = np.concatenate([crop_windows(box_N4, scale, *image.shape[1::-1]) for scale in crops.scales])
        distinct, place = np.unique(every, axis=0, return_inverse=True)
        windows.append(distinct)
        places.append(total + place.reshape(len(crops.scales), -1))
        total += len(distinct)
    owner = np.repeat(np.arange(len(images)), [len(entry) for entry in windows])
    window_W4 = np.concatenate([np.empty((0, 4), np.int64), *windows])

    def cut(start: int) -> Pixels:
        own = slice(start, start + teacher.config.batch_size)
        parts = [
            crop_squares(images[number], window_W4[own][owner[own] == number].tolist(), side, crops.fit, margin)
            for number in dict.fromkeys(owner[own].tolist())
        ]
        return np.concatenate(parts)

    images = [np.require(image, requirements="W") for image in images]  # copied here once, else for every batch
    side, margin = teacher.side, teacher.margin
    feature_WD = teacher.embed_squares(partial(cut, start) for start in range(0, total, teacher.config.batch_size))
    return [unit(feature_WD[place].sum(0)).astype(ROWS) for place in places]


def unit(row_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of length 1; zeros stay."""
    length_N1: npt.NDArray[np.float32] = np.linalg.norm(row_ND, axis=1, keepdims=True)
    return (row_ND / np.maximum(length_N1, 1e-12)).astype(np.float32)


class RegionStage:
    """Rows with pixels -> rows of the `regions` table with the bytes of their embeddings."""

    def __init__(
        self, checkpoint: str, config: EmbedConfig, crops: CropConfig, detector: str = "", max_proposals: int = 300
    ) -> None:
        """Load the teacher, and the detector if there is one.

        Args:
            checkpoint: of the teacher.
            config: how it works.
            crops: which crops stand for a box.
            detector: a checkpoint that proposes boxes; the boxes of the rows are taken if empty.
            max_proposals: of an image, the best.
        """
        self.teacher, self.crops, self.max_proposals = Teacher(checkpoint, config), crops, max_proposals
        self.detector = None
        if detector:
            import ovd_models

            self.detector = ovd_models.load(storage.local_folder(detector), str(self.teacher.device))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Embed a shard."""
        sizes = zip(rows["width"].to_pylist(), rows["height"].to_pylist(), strict=True)
        images = [
            np.frombuffer(pixels.as_buffer(), np.uint8).reshape(height, width, 3)
            for (width, height), pixels in zip(sizes, rows["pixels"], strict=True)
        ]
        boxes, scores = self._boxes(rows, images)
        embeddings = embed_regions(self.teacher, images, boxes, self.crops)
        return pa.table(
            {
                "shard": rows["shard"],
                "image_id": rows["image_id"],
                "boxes": pa.array([box_N4.tolist() for box_N4 in boxes], tables.SCHEMAS["regions"].field("boxes").type),
                "scores": pa.array([list(entry) for entry in scores], pa.list_(pa.float32())),
                "count": pa.array([len(box_N4) for box_N4 in boxes], pa.int64()),
                "file": pa.array([entry.tobytes() for entry in embeddings], pa.large_binary()),
            }
        )

    def _boxes(
        self, rows: pa.Table, images: Sequence[Pixels]
    ) -> tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]]:
        """[N, 4] boxes of each image and [N] how sure it is that they hold something."""
        if self.detector is None:
            given = [np.array(boxes, np.float32).reshape(-1, 4) for boxes in rows["boxes"].to_pylist()]
            return given, [np.ones(len(boxes), np.float32) for boxes in given]
        # One at a time: a batch pads images to the largest, and their proposals would depend on their neighbours.
        proposals = [self.detector.propose([Image.fromarray(image)], self.max_proposals)[0] for image in images]
        return [boxes.numpy() for boxes, _ in proposals], [scores.numpy() for _, scores in proposals]


class PairStage:
    """Rows with square pixels and captions -> rows of the `embeddings` table with the bytes of both embeddings."""

    def __init__(self, checkpoint: str, config: EmbedConfig) -> None:
        """Load the teacher of a checkpoint."""
        self.teacher = Teacher(checkpoint, config)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Embed a shard."""
        side, most = self.teacher.side, self.teacher.config.batch_size
        pixels = [np.frombuffer(entry.as_buffer(), np.uint8).reshape(side, side, 3) for entry in rows["pixels"]]
        starts = range(0, len(pixels), most)
        images = unit(self.teacher.embed_squares(partial(np.stack, pixels[start : start + most]) for start in starts))
        texts = self.teacher.embed_texts(rows["caption"].to_pylist())
        return pa.table(
            {
                "shard": rows["shard"],
                "image_id": rows["image_id"],
                "count": pa.array([1] * rows.num_rows, pa.int64()),
                "file": pa.array([row.tobytes() for row in images.astype(ROWS)], pa.large_binary()),
                "text_file": pa.array([row.tobytes() for row in texts.astype(ROWS)], pa.large_binary()),
            }
        )


class ShardWorker:
    """An actor that embeds and writes shards, several at a time."""

    def __init__(
        self, stage: "type[RegionStage] | type[PairStage]", arguments: tuple[Any, ...], job: EmbeddingJob
    ) -> None:
        """Make the stage.

        Args:
            stage: what embeds.
            arguments: its own.
            job: where shards go.
        """
        import torch  # here, so that the data tasks stay small

        self.stage, self.job = stage(*arguments), job
        if self.stage.teacher.device.type == "cpu":
            torch.set_num_threads(1)  # each call has a thread of its own

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Embed a shard and write it; returns what `save_shard` tells."""
        return save_shard(self.stage(rows), self.job)

"""A CLIP teacher's embeddings of regions and of image-text pairs, computed once for a whole table.

    table --cut into shards--> pixels --crops, CLIP--> rows --save--> flat arrays and their index

Shards depend only on the table, and each is embedded by itself, so the bytes on disk depend neither on the number of
actors nor on where a run was killed.
"""

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from data_prep import storage, tables
from data_prep.embeddings.crops import Colour, CropConfig, Fit, crop_squares, crop_windows, square
from data_prep.embeddings.stores import ROWS, EmbeddingJob, SavedShard, save_shard
from data_prep.pairs.rows import append_columns
from data_prep.pairs.shards import runs_of_size
from data_prep.parts import ahead
from data_prep.streams.images import read_image
from ovd_models.errors import InputError
from ovd_models.images import decode_image

if TYPE_CHECKING:
    from ovd_models.clip.model import Clip

Pixels = npt.NDArray[np.uint8]
ImageTable = Literal["boxes", "pairs"]
SHARD_PIXELS = 32 << 20
"""Maximum decoded pixels of a shard: 96 MiB, for each shard that an actor works on. A larger image stands alone."""
SHARDS, MIN_SHARD_IMAGES = 128, 8
GPU_SHARDS = 2
"""Shards whose passes share a GPU: one is cropped or saved during the passes of the other."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Resources of an embedding job. Results depend only on `bfloat16` and, in the last digits, on `batch_size`."""

    actors: int | None = None
    """Processes that hold the teacher. None: as many as the GPUs allow, or one for eight CPU cores. Each works on
    several shards at a time: two on a GPU, or one for each of its cores. 0 embeds inside the driver, for debugging."""
    gpus: float = 0
    """GPUs of an actor."""
    threads: int = 1
    """Threads of a GPU actor that read the next shards, and as many that cut out the next crops. CPU actors ignore it:
    each of their shards reads and cuts its own."""
    batch_size: int = 32
    """Crops or captions in a batch; a few hundred suit a GPU. On a CPU, larger batches of ViT-B/32 need activations
    that the allocator does not keep, so their pages are mapped anew in every layer."""
    images_per_shard: int = 64
    """Maximum number of images in a shard; fewer of a small table, since a killed run repeats the shards in work."""
    bfloat16: bool | None = None
    """Compute in bfloat16; None: only on a GPU. On a CPU with bfloat16 instructions it speeds up convolutions, but not
    transformers."""

    def __post_init__(self) -> None:
        for name in ("threads", "batch_size", "images_per_shard"):
            if getattr(self, name) < 1:
                raise InputError(f"--embed.{name.replace('_', '-')} {getattr(self, name)}: expected 1 or more")

    @property
    def half(self) -> bool:
        """Whether it computes in bfloat16."""
        return bool(self.gpus) if self.bfloat16 is None else self.bfloat16


# ---------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows of one Parquet file that are embedded together."""

    name: str
    uri: str
    start: int
    stop: int


def cut_shards(storage_uri: str, table: ImageTable, name: str, images: int, *, prefix: str = "") -> list[Shard]:
    """Cut a table into shards of consecutive rows of one file, of at most `images` images and `SHARD_PIXELS` pixels.

    A small table still has about `SHARDS` of them, of `MIN_SHARD_IMAGES` or more. Their names are the prefix and a
    number.
    """
    manifest = tables.read_manifest(storage_uri, table, name)
    images = min(images, max(MIN_SHARD_IMAGES, manifest.rows // SHARDS))
    root = storage.absolute(tables.table_uri(storage_uri, table, name))
    shards: list[Shard] = []
    uris = [storage.join(root, path) for path in tables.parquet_files(manifest)]
    for uri, sides in zip(uris, tables.read_files(uris, ["width", "height"]), strict=True):
        pixels = sides["width"].to_numpy().astype(np.int64) * sides["height"].to_numpy()
        for start, stop in runs_of_size(np.maximum(pixels, SHARD_PIXELS // images).tolist(), SHARD_PIXELS):
            shards.append(Shard(name=f"{prefix}{len(shards):06d}", uri=uri, start=start, stop=stop))
    return shards


def read_shard(shard: Shard, columns: Sequence[str], load: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """The rows of a shard as `load` returns them, with the shard's name as column `shard`."""
    rows = load(tables.read_parquet(shard.uri, list(columns)).slice(shard.start, shard.stop - shard.start))
    return rows.append_column("shard", pa.array([shard.name] * rows.num_rows, pa.string()))


def load_pictures(rows: pa.Table, root: str) -> pa.Table:
    """Rows with raw RGB `pixels`, `height` and `width` of the image instead of its `uri`, relative to `root`.

    An image that cannot be read has no pixels, and the reason in `unreadable`.
    """
    images = [try_image(partial(read_image, storage.absolute(storage.join(root, u)))) for u in rows["uri"].to_pylist()]
    columns = {
        "pixels": pa.array([image.tobytes() if image else b"" for image, _ in images], pa.large_binary()),
        "height": pa.array([image.height if image else 0 for image, _ in images], pa.int64()),
        "width": pa.array([image.width if image else 0 for image, _ in images], pa.int64()),
        "unreadable": pa.array([reason for _, reason in images], pa.string()),
    }
    return append_columns(rows.drop_columns(["uri"]), columns)


def try_image(read: Callable[[], Image.Image]) -> tuple[Image.Image | None, str | None]:
    """An image, or the reason that it cannot be read."""
    try:
        return read(), None
    except InputError as error:
        return None, str(error)


def load_squares(rows: pa.Table, root: str, side: int, fit: Fit) -> pa.Table:
    """Rows of `pairs` -> `image_id`, `caption` and raw RGB `pixels`, made by `square`.

    The rows have `image_id`, `caption`, `shard` (relative to `root`), `offset` and `size`. An image that cannot be read
    has no pixels, and the reason in `unreadable`.
    """
    images = [try_image(partial(decode_image, content, name)) for content, name in read_members(rows, root)]
    squares = [square(image, side, fit).tobytes() if image else b"" for image, _ in images]
    columns = {
        "pixels": pa.array(squares, pa.large_binary()),
        "unreadable": pa.array([reason for _, reason in images], pa.string()),
    }
    return append_columns(rows.select(["image_id", "caption"]), columns)


def read_members(rows: pa.Table, root: str) -> Iterator[tuple[bytes, str]]:
    """The image bytes of rows of `pairs`, each with a name for messages; adjacent rows of a tar are one range read."""
    members = zip(*(rows[name].to_pylist() for name in ("shard", "offset", "size")), strict=True)
    for path, group in groupby(members, key=lambda member: member[0]):
        spans = [(offset, offset + size) for _, offset, size in group]
        first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
        content = storage.read_bytes(storage.join(root, path), offset=first, size=last - first)
        for start, stop in spans:
            yield content[start - first : stop - first], f"{path}@{start}"


# --------------------------------------------------------------------------------------------------------- teacher


class Teacher:
    """A CLIP checkpoint that embeds square images and captions in batches."""

    def __init__(self, checkpoint: str, config: EmbedConfig, device: str = "") -> None:
        """Load the checkpoint to `device`; if empty, to an actor's GPU if it has one."""
        import torch  # here, so that the data tasks stay small

        from ovd_models.clip.model import load_clip
        from ovd_models.clip.towers import fold_norms

        self._torch, self.config = torch, config
        self.device = torch.device(device or ("cuda" if config.gpus else "cpu"))
        self.half = config.half
        clip, self.id = load_clip(storage.local_folder(checkpoint))
        fold_norms(clip.model.visual)
        self.clip = clip.to(self.device)
        self.side = clip.config.image_size
        self.margin = margin_of(clip.normalise.mean)
        self.pool = ThreadPoolExecutor(config.threads) if config.gpus else None

    def embed_squares(self, batches: Iterable[Callable[[], Pixels]]) -> npt.NDArray[np.float32]:
        """[N, D] features of N square images, not normalised.

        Each function returns the pixels [B, side, side, 3] of a batch; they run in threads ahead of a GPU.
        """
        torch, clip = self._torch, self.clip
        features = [torch.empty(0, clip.config.embed_dim, device=self.device)]
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, self.half):
            for pixels in ahead(batches, self.pool, self.config.threads + 1) if self.pool else (b() for b in batches):
                images = torch.from_numpy(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                features.append(clip.image_features(images))
        rows: npt.NDArray[np.float32] = torch.cat(features).cpu().numpy()
        return rows

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N, D] unit rows; a repeated text is embedded once.

        Texts of similar length share a batch, since the longest one sets its cost.
        """
        from ovd_models.clip.towers import trim_tokens

        torch, clip = self._torch, self.clip
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        rows = np.empty((len(row_of), clip.config.embed_dim), np.float32)
        tokens = clip.tokenize(list(row_of))
        order = torch.argsort((tokens != 0).sum(1), stable=True)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, self.half):
            for start in range(0, len(row_of), self.config.batch_size):
                chosen = order[start : start + self.config.batch_size]
                own = trim_tokens(clip.model.text, tokens[chosen]).to(self.device)
                rows[chosen.numpy()] = clip.encode_tokens(own).float().cpu().numpy()
        return rows[[row_of[text] for text in texts]]


def store_checkpoint(clip: "Clip", uri: str) -> None:
    """Save a model in the storage, so that every machine can load it."""
    from ovd_models.clip.model import save_clip

    with tempfile.TemporaryDirectory() as folder:
        save_clip(clip, folder)
        storage.upload_folder(Path(folder), uri)


def store_released(storage_uri: str, name: str, pretrained: str) -> str:
    """Save released weights as a checkpoint in `<storage>/teachers`, unless it is there; returns its URI.

    Args:
        storage_uri: folder or URI of the storage.
        name: an architecture of open_clip.
        pretrained: a tag of its weights, or the path or URI of a file.

    Raises:
        InputError: the architecture or the weights are unknown, or a file is not what its name says.
        OSError: a URI cannot be read.
    """
    file = storage.local_file(pretrained) if "://" in pretrained else Path(pretrained)
    tag = pretrained
    if file.is_file():
        from ovd_models.importers.released import check_released

        digest = storage.file_sha256(file)
        check_released(file, digest)
        tag = f"{file.stem}-{digest[:8]}"
    checkpoint = storage.join(storage.absolute(storage_uri), "teachers", f"{name}-{tag}")
    if not storage.exists(storage.join(checkpoint, "clip.json")):
        from ovd_models.clip.model import ClipConfig, open_clip_model

        store_checkpoint(open_clip_model(ClipConfig(name=name), str(file)), checkpoint)
    return checkpoint


def margin_of(mean: Sequence[float]) -> Colour:
    """The colour that a teacher's normalisation maps to zero: the mean of its training images."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def embed_regions(
    teacher: Teacher, images: Sequence[Pixels], boxes: Sequence[npt.NDArray[np.float32]], crops: CropConfig
) -> list[npt.NDArray[np.float16]]:
    """The teacher's embeddings of the boxes of some images (ViLD, section 3.3).

    v = (f(crop at 1x) + f(crop at 1.5x)) / |...|; equal crops, as of boxes that fill the image, are embedded once.

    Args:
        teacher: f.
        images: [H, W, 3] RGB, of any sizes.
        boxes: for each image [N, 4] xyxy in its pixels.
        crops: the crops of a box.

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
    """Rows scaled to length 1; rows of zeros stay zero."""
    length_N1: npt.NDArray[np.float32] = np.linalg.norm(row_ND, axis=1, keepdims=True)
    return (row_ND / np.maximum(length_N1, 1e-12)).astype(np.float32)


class RegionStage:
    """Maps rows with pixels to rows of the `regions` table with the bytes of their embeddings."""

    def __init__(
        self, checkpoint: str, config: EmbedConfig, crops: CropConfig, detector: str = "", max_proposals: int = 300
    ) -> None:
        """Load the teacher, and the detector that proposes boxes; if there is none, those of the rows are used."""
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
                "unreadable": rows["unreadable"],
            }
        )

    def _boxes(
        self, rows: pa.Table, images: Sequence[Pixels]
    ) -> tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]]:
        """[N, 4] boxes and [N] objectness scores of each image; none of one that cannot be read."""
        boxes, scores = [], []
        for image, given in zip(images, rows["boxes"].to_pylist(), strict=True):
            box_N4, score_N = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
            if image.size and self.detector is None:
                box_N4 = np.array(given, np.float32).reshape(-1, 4)
                score_N = np.ones(len(box_N4), np.float32)
            elif image.size and self.detector is not None:
                # One at a time: a batch pads images to the largest, so their proposals would depend on each other.
                found = self.detector.propose([Image.fromarray(image)], self.max_proposals)[0]
                box_N4, score_N = (value.numpy() for value in found)
            boxes.append(box_N4)
            scores.append(score_N)
        return boxes, scores


class PairStage:
    """Maps rows with square pixels and captions to rows of the `embeddings` table with the bytes of both embeddings."""

    def __init__(self, checkpoint: str, config: EmbedConfig) -> None:
        self.teacher = Teacher(checkpoint, config)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Embed a shard."""
        side, size = self.teacher.side, self.teacher.config.batch_size
        whole = pc.is_null(rows["unreadable"])
        chosen = rows.filter(whole)
        pixels = [np.frombuffer(entry.as_buffer(), np.uint8).reshape(side, side, 3) for entry in chosen["pixels"]]
        batches = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        images = unit(self.teacher.embed_squares(partial(np.stack, batch) for batch in batches)).astype(ROWS)
        texts = self.teacher.embed_texts(chosen["caption"].to_pylist()).astype(ROWS)
        places = np.cumsum(whole.to_numpy()) - 1
        counts = whole.to_numpy().astype(np.int64)

        def raw(values_ND: npt.NDArray[np.float16]) -> pa.Array:
            entries = [values_ND[place].tobytes() if n else b"" for place, n in zip(places, counts, strict=True)]
            return pa.array(entries, pa.large_binary())

        return pa.table(
            {
                "shard": rows["shard"],
                "image_id": rows["image_id"],
                "count": pa.array(counts, pa.int64()),
                "file": raw(images),
                "text_file": raw(texts),
                "unreadable": rows["unreadable"],
            }
        )


class ShardWorker:
    """Reads, embeds and saves shards, several at a time."""

    def __init__(
        self,
        read: Callable[[Shard], pa.Table],
        make_stage: "Callable[[], RegionStage | PairStage]",
        job: EmbeddingJob,
        *,
        shares_cores: bool,
    ) -> None:
        """Load the teacher; on a CPU that `shares_cores`, each shard has one core."""
        import torch  # here, so that the driver stays small

        self._read, self._stage, self._job = read, make_stage(), job
        on_cpu = self._stage.teacher.device.type == "cpu"
        if on_cpu and shares_cores:
            torch.set_num_threads(1)
        self._passes: contextlib.AbstractContextManager[Any] = (
            contextlib.nullcontext() if on_cpu else threading.Semaphore(GPU_SHARDS)
        )

    def __call__(self, shard: Shard) -> SavedShard:
        """Read, embed and save a shard."""
        rows = self._read(shard)
        with self._passes:
            rows = self._stage(rows)
        return save_shard(rows, self._job)

"""Scores of image-text pairs by models in actors: CLIP, or a scorer of your own.

Your own scorer is a class: `--scores.scorers nsfw mypackage.mymodule:Scorer`. Each actor constructs it once, without
arguments, and calls it with a batch of images and their captions; it returns one number per pair.
"""

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from data_prep import storage
from data_prep.embeddings.crops import FITS, square
from data_prep.pairs.rows import EMBEDDING, SCORE, Rejection, append_columns, with_rejections
from ovd_models.errors import InputError

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Models that score pairs."""

    scorers: dict[str, str] = field(default_factory=dict)
    """Models by name: folder or URI of a CLIP checkpoint (cosine of image and caption), or `module:Class`."""
    minimum: dict[str, float] = field(default_factory=dict)
    """Minimum scores by scorer; pairs below are rejected as `low_score`."""
    actors: int = 1
    gpus: float = 0
    """GPUs per actor."""

    def __post_init__(self) -> None:
        for name in self.minimum:
            if name not in self.scorers:
                raise InputError(f"--scores.minimum {name}: no such scorer, expected one of {sorted(self.scorers)}")
        for name in self.scorers:
            if not name.isidentifier() or name in ("image_id", EMBEDDING):
                problem = "expected another name, of letters, digits and underscores"
                raise InputError(f"--scores.scorers {name!r}: {problem}")


class Scorer(Protocol):
    """Scores image-text pairs."""

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Sequence[float]:
        """One number per pair; higher is better."""


class ClipScorer:
    """Cosine between the CLIP embeddings of image and caption."""

    def __init__(self, checkpoint: str, device: str = "cpu") -> None:
        import torch  # here: other tasks of a crawl do without its memory

        from ovd_models.clip.model import load_clip

        self._torch, self._device = torch, torch.device(device)
        self.clip = load_clip(storage.local_folder(checkpoint))[0].to(self._device)

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """[N] cosines."""
        from ovd_models.clip.towers import trim_tokens

        with self._torch.inference_mode():
            tokens = trim_tokens(self.clip.model.text, self.clip.tokenize(captions)).to(self._device)
            text = self.clip.encode_tokens(tokens).cpu().numpy()
        cosines: list[float] = (self.embed(images) * text).sum(1).tolist()
        return cosines

    def embed(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """[N, D] unit embeddings of images."""
        side, fit = self.clip.config.image_size, FITS[self.clip.config.resize_mode]
        pixels = np.stack([square(image, side, fit) for image in images])
        with self._torch.inference_mode():
            tensor = self._torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device)
            rows: npt.NDArray[np.float32] = self.clip.encode_images(tensor).float().cpu().numpy()
        return rows


def is_class(model: str) -> bool:
    """Whether a scorer is given as `module:Class` rather than a CLIP checkpoint's folder or URI."""
    return ":" in model and "/" not in model


def check_checkpoint(folder: str) -> None:
    """Raise InputError if there is no CLIP checkpoint at a folder or URI."""
    if not storage.exists(storage.join(folder, "clip.json")):
        raise InputError(f"{folder}: no CLIP checkpoint (clip.json), expected one, or module:Class")


def load_scorer(model: str, device: str) -> Scorer:
    """Load a scorer from a CLIP checkpoint or `module:Class`.

    Raises:
        InputError: the class or checkpoint does not exist.
    """
    if not is_class(model):
        return ClipScorer(model, device)
    module, _, name = model.partition(":")
    try:
        scorer: Scorer = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"scorer {model}: {error}, expected module:Class") from error
    return scorer


class ScoreStage:
    """Adds a column per scorer, and optionally the images' embeddings, to rows of decoded images."""

    def __init__(self, config: ScoreConfig, embedder: str = "") -> None:
        """Load the scorers, and a CLIP checkpoint for the embeddings unless `embedder` is empty."""
        device = "cuda" if config.gpus else "cpu"
        self.config = config
        self.scorers = {name: load_scorer(model, device) for name, model in config.scorers.items()}
        self.embedder = ClipScorer(embedder, device) if embedder else None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Score the rows not rejected so far; `embedding` holds little-endian float16 rows as bytes."""
        chosen = np.flatnonzero(pc.is_null(rows["reason"]).to_numpy(zero_copy_only=False))
        good = rows.select(["content", "caption"]).take(pa.array(chosen))
        scores: dict[str, list[float]] = {name: [] for name in self.scorers}
        embeddings: list[bytes] = []
        for start in range(0, good.num_rows, BATCH):
            batch = good.slice(start, BATCH)
            images = [Image.open(io.BytesIO(content)).convert("RGB") for content in batch["content"].to_pylist()]
            captions = batch["caption"].to_pylist()
            for name, scorer in self.scorers.items():
                scores[name] += [float(value) for value in scorer(images, captions)]
            if self.embedder is not None:
                embeddings += [row.tobytes() for row in self.embedder.embed(images).astype("<f2")]
        index = np.full(rows.num_rows, -1)
        index[chosen] = np.arange(len(chosen))
        place = pa.array(index, mask=index < 0)  # null where a row was rejected before
        columns = {SCORE + name: pa.array(values, pa.float32()).take(place) for name, values in scores.items()}
        if self.embedder is not None:
            columns[EMBEDDING] = pa.array(embeddings, pa.binary()).take(place)
        rows = append_columns(rows, columns)
        return with_rejections(rows, "filter", self._rejections(rows))

    def _rejections(self, rows: pa.Table) -> list[Rejection | None]:
        rejections: list[Rejection | None] = [None] * rows.num_rows
        for name, minimum in self.config.minimum.items():
            for position, value in enumerate(rows[SCORE + name].to_pylist()):
                if value is not None and not value >= minimum and rejections[position] is None:  # NaN is too low
                    rejections[position] = Rejection("low_score", f"{name} {value:.3f}, at least {minimum:g}")
        return rejections

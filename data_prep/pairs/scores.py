"""Scores of image-text pairs by models that live in actors: CLIP, or any that the user gives.

A scorer of your own is a class: `--scores.scorers nsfw mypackage.mymodule:Scorer`. It is made once an actor, without
arguments, and called with a batch of pictures and their captions; it returns a number for each.
"""

import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from data_prep import storage
from data_prep.pairs.decode import Rejection, with_failures
from data_prep.pairs.inputs import EMBEDDING, SCORE
from ovd_models.errors import InputError

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which models look at the pairs."""

    scorers: dict[str, str] = field(default_factory=dict)
    """Name and model of each: folder or URI of a CLIP checkpoint (cosine of image and caption), or `module:Class`."""
    minimum: dict[str, float] = field(default_factory=dict)
    """Pairs that score less are rejected as `low_score`."""
    actors: int = 1
    gpus: float = 0
    """GPUs of an actor."""

    def __post_init__(self) -> None:
        """Check that every limit has its scorer."""
        for name in self.minimum:
            if name not in self.scorers:
                raise InputError(f"--scores.minimum {name}: no such scorer, expected one of {sorted(self.scorers)}")
        for name in self.scorers:
            if not name.isidentifier() or name in ("image_id", EMBEDDING):
                raise InputError(
                    f"--scores.scorers {name!r}: expected another name, of letters, digits and underscores"
                )


class Scorer(Protocol):
    """Gives each pair a number."""

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Sequence[float]:
        """One number a pair, higher is better."""


class ClipScorer:
    """Cosine between the CLIP embeddings of image and caption."""

    def __init__(self, checkpoint: str, device: str = "cpu") -> None:
        import torch  # here, so that the other tasks of a crawl stay small

        from ovd_models.clip.model import load_clip

        self._torch, self._device = torch, torch.device(device)
        self.clip = load_clip(storage.local_folder(checkpoint))[0].to(self._device)

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """[N] cosines."""
        with self._torch.inference_mode():
            text = self.clip.encode_tokens(self.clip.tokenize(captions).to(self._device)).cpu().numpy()
        cosines: list[float] = (self.embed(images) * text).sum(1).tolist()
        return cosines

    def embed(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """[N, D] unit rows of the images alone."""
        side = self.clip.config.image_size
        pixels = np.stack([np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images])
        with self._torch.inference_mode():
            tensor = self._torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device)
            rows: npt.NDArray[np.float32] = self.clip.encode_images(tensor).float().cpu().numpy()
        return rows


def is_class(model: str) -> bool:
    """Whether a scorer is named as `module:Class`, and not by the folder or URI of a CLIP checkpoint."""
    return ":" in model and "/" not in model


def check_checkpoint(folder: str) -> None:
    """Raise InputError where no CLIP checkpoint lies at a folder or URI."""
    if not storage.exists(storage.join(folder, "clip.json")):
        raise InputError(f"{folder}: no CLIP checkpoint (clip.json), expected one, or module:Class")


def load_scorer(model: str, device: str) -> Scorer:
    """The scorer of a class's name or of a CLIP checkpoint.

    Raises:
        InputError: there is no such class or checkpoint.
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
    """Rows of decoded images -> the same with a column of scores a scorer, and the images' embeddings if asked."""

    def __init__(self, config: ScoreConfig, embedder: str = "") -> None:
        """Load the models.

        Args:
            config: the scorers.
            embedder: a CLIP checkpoint, or empty.
        """
        device = "cuda" if config.gpus else "cpu"
        self.config = config
        self.scorers = {name: load_scorer(model, device) for name, model in config.scorers.items()}
        self.embedder = ClipScorer(embedder, device) if embedder else None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Score what is kept so far; `embedding` holds little-endian float16 rows as bytes."""
        chosen = np.flatnonzero(pc.is_null(rows["reason"]).to_numpy(zero_copy_only=False))
        good = rows.select(["content", "caption"]).take(pa.array(chosen))
        scores: dict[str, list[float]] = {name: [] for name in self.scorers}
        embeddings: list[bytes] = []
        for start in range(0, good.num_rows, BATCH):
            part = good.slice(start, BATCH)
            images = [Image.open(io.BytesIO(content)).convert("RGB") for content in part["content"].to_pylist()]
            captions = part["caption"].to_pylist()
            for name, scorer in self.scorers.items():
                scores[name] += [float(value) for value in scorer(images, captions)]
            if self.embedder is not None:
                embeddings += [row.tobytes() for row in self.embedder.embed(images).astype("<f2")]
        columns: dict[str, pa.Array] = {}
        for name, values in scores.items():
            columns[SCORE + name] = _spread(values, chosen, rows.num_rows, pa.float32())
        if self.embedder is not None:
            columns[EMBEDDING] = _spread(embeddings, chosen, rows.num_rows, pa.binary())
        for name, column in columns.items():
            rows = rows.append_column(name, column)
        return with_failures(rows, "filter", self._failures(rows))

    def _failures(self, rows: pa.Table) -> list[Rejection | None]:
        failures: list[Rejection | None] = [None] * rows.num_rows
        for name, least in self.config.minimum.items():
            for position, value in enumerate(rows[SCORE + name].to_pylist()):
                if value is not None and not value >= least and failures[position] is None:
                    failures[position] = Rejection("low_score", f"{name} {value:.3f}, at least {least:g}")
        return failures


def _spread(values: Sequence[Any], positions: npt.NDArray[np.int64], count: int, kind: pa.DataType) -> pa.Array:
    """Values at their positions among `count` rows, null elsewhere."""
    index = np.full(count, -1)
    index[positions] = np.arange(len(positions))
    return pa.array(values, kind).take(pa.array(index, mask=index < 0))

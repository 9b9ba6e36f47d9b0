"""The models of a replica: loaded by name, replaced by their new versions, and what each can answer."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import PIL.Image
from torch import Tensor

from data_prep.embeddings.texts import PreloadedEncoder, TextStore
from ovd_models.checkpoint_info import folder_digest, read_source
from ovd_models.detectors.region_query import RegionQuery, build_query
from ovd_models.predictors import Classifier, Detector, Segmenter, TextSegmenter
from workflows.common.models import borrow_model, load
from workflows.serving.limits import refusal
from workflows.serving.sources import resolve_version
from workflows.serving.texts import CachedEncoder, TextCache, Words

if TYPE_CHECKING:
    from workflows.common.models import Predictor

TASKS: Mapping[str, tuple[str, ...]] = {
    "codet": ("detect",),
    "vild": ("detect",),
    "ovsam": ("segment", "everything"),
    "text_to_mask": ("text-to-mask",),
    "clip": ("classify",),
}
"""Routes by method."""


@dataclass(frozen=True)
class ServedModel:
    """One loaded model."""

    name: str
    uri: str
    """As given."""
    predictor: "Predictor"
    digest: str
    """16 hexadecimal digits of its weights and config."""
    version: str
    """Of the model registry; empty for a folder."""
    run_id: str
    """MLflow's; empty if unknown."""
    licence: str
    """Note about the weights' licence."""
    source: str
    """Released files that it was converted from, with their sha256; empty if it was trained here."""

    @property
    def method(self) -> str:
        """The method that trained it."""
        return self.predictor.method

    @property
    def tasks(self) -> tuple[str, ...]:
        """Routes that it answers."""
        return TASKS[self.method]

    @property
    def batches(self) -> bool:
        """Whether several images are encoded at a time."""
        return isinstance(self.predictor, Detector | Classifier)

    def read(self, picture: PIL.Image.Image) -> Tensor:
        """[3, H, W] uint8 as the model takes it, on its device."""
        return self.predictor.read(picture)

    def encode(self, images: Sequence[Tensor]) -> Sequence[Any]:
        """Images of one size, encoded for any prompts and names."""
        predictor = self.predictor
        if isinstance(predictor, Segmenter | TextSegmenter):
            return [predictor.model.encode(image) for image in images]
        return predictor.encode(images)

    def query(
        self,
        words: Words | None,
        cache: TextCache,
        *,
        prompt_set: str,
        merge: str,
        attributes: Sequence[str],
        deadline: float,
    ) -> RegionQuery:
        """The names of a request, embedded; the model's default vocabulary if None.

        Raises:
            InputError: a name cannot be embedded, or the prompt set is unknown.
            TimeoutError: not all are embedded at `deadline`, in seconds of `time.monotonic`.
            ProblemError: the model has no default vocabulary.
        """
        words = words or Words(self.predictor.vocabulary)
        if not words.names:
            raise refusal("vocabulary", f"missing, model {self.name!r} has no default vocabulary")
        splits = dict(self.predictor.info.splits)
        splits |= {name: "base" if flag else "novel" for name, flag in words.base}
        encoder = CachedEncoder(cache, self.predictor.encoder, prompt_set or self.predictor.prompt_set, deadline)
        query = build_query(
            encoder,
            words.names,
            splits,
            attributes=attributes,
            synonyms=dict(words.synonyms) or None,
            merge="max" if merge == "max" else "mean",
        )
        return query.to(self.predictor.device)


def load_served(name: str, uri: str, storage_uri: str, *, texts: bool, device: str) -> ServedModel:
    """Load a model.

    Raises:
        InputError: there is no such checkpoint, or it is broken.
    """
    version, run_id = resolve_version(uri, storage_uri)
    pinned = f"{uri.partition('@')[0]}/{version}" if "@" in uri and version else uri  # the alias may move meanwhile
    with borrow_model(pinned, storage_uri) as folder:
        predictor = load(str(folder), device=device)
        licence = folder / "LICENCE.txt"
        note = licence.read_text()[:2_000] if licence.is_file() else ""
        digest, source = folder_digest(folder), read_source(folder)
    if texts:
        predictor.encoder = PreloadedEncoder(predictor.encoder, TextStore(storage_uri, predictor.teacher))
    return ServedModel(name or predictor.method, uri, predictor, digest, version, run_id, note, source)


class ModelSet:
    """The models of a replica by name; new versions of registered ones replace them without a pause."""

    def __init__(self, models: Mapping[str, ServedModel], reload: Callable[[ServedModel], ServedModel | None]) -> None:
        """Serve `models`; `reload` returns a model's new version, or None if there is none."""
        self._models, self._reload, self._closed = dict(models), reload, threading.Event()

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(list(self._models.values()))

    def find(self, name: str | None, task: str) -> ServedModel:
        """The model of a name, or the first that answers the task.

        Raises:
            ProblemError: there is none.
        """
        if name is not None and name not in self._models:
            raise refusal("model", f"{name[:100]!r} is not served, expected one of {', '.join(self._models)}")
        able = [model for model in self if task in model.tasks and name in (None, model.name)]
        if not able:
            raise refusal("model", f"{name!r} does not answer /v1/{task}, but {self.tasks(name)}")
        return able[0]

    def tasks(self, name: str | None = None) -> str:
        """Routes of one model, or of all."""
        return ", ".join(f"/v1/{task}" for model in self if name in (None, model.name) for task in model.tasks)

    def watch(self, seconds: float, swapped: Callable[[ServedModel], None]) -> None:
        """Look for new versions every so many seconds, in a thread; requests under way keep the model they have."""

        def look() -> None:
            while not self._closed.wait(seconds):
                for model in self:
                    new = self._reload(model)
                    if new is not None:
                        self._models[model.name] = new
                        swapped(new)

        threading.Thread(target=look, name="champions", daemon=True).start()

    def close(self) -> None:
        """Look for new versions no more."""
        self._closed.set()

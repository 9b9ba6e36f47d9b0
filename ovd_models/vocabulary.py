"""Names and their embeddings: a vocabulary is a value, set at run time, never part of a detector's weights.

K names, S their synonyms (a name is one of its own), D embedding width.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.batches import TensorRecord
from ovd_models.errors import InputError

Synonyms = Mapping[str, Sequence[str]]
"""Other words by name."""
Merge = Literal["mean", "max"]
"""Whether a name's embedding is the mean of its synonyms', or its score the maximum of theirs."""
SynonymMean = Literal["none", "mean"]
"""Use of synonyms in training: none, or the mean of their embeddings."""


@dataclass(frozen=True)
class Vocabulary(TensorRecord):
    """K names and their unit embeddings."""

    names: tuple[str, ...]
    embeddings: Tensor
    """[K, D] float32, unit rows; [S, D] if there are `owners`."""
    is_base: Tensor | None = None
    """[K] bool: the names with boxes in training; None if unknown."""
    owners: Tensor | None = None
    """[S] int64: index of the name of which each row of `embeddings` is a synonym; None if every name has one row."""

    def strongest(self, scores_RS: Tensor) -> Tensor:
        """[R, S] scores of all rows -> [R, K], the score of each name's best synonym."""
        if self.owners is None:
            return scores_RS
        empty_RK = scores_RS.new_empty(len(scores_RS), len(self.names))
        owners_RS = self.owners.expand(len(scores_RS), -1)
        return empty_RK.scatter_reduce(1, owners_RS, scores_RS, "amax", include_self=False)

    def __len__(self) -> int:
        return len(self.names)


class TextEncoder(Protocol):
    """Embeds names."""

    @property
    def teacher(self) -> str:
        """Identifies the model and its weights."""

    @property
    def prompt_set(self) -> str:
        """The name of the templates."""

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """[K, D] unit rows, one for each name, averaged over the prompt set."""

    def embed_captions(self, captions: Sequence[str]) -> Tensor | None:
        """[B, D] unit rows of whole sentences; None without a text tower."""


@dataclass(frozen=True)
class EmbeddingTable:
    """A fixed table of embedded names, for teachers without a text tower."""

    names: tuple[str, ...]
    embeddings: Tensor
    """[K, D] float32, unit rows."""
    teacher: str
    prompt_set: str = "given"

    @classmethod
    def from_array(cls, names: Sequence[str], array: np.ndarray, origin: str) -> "EmbeddingTable":
        """A table from raw rows [K, D] of any norm.

        Raises:
            InputError: the rows do not match the names, or are not finite.
        """
        if array.ndim != 2 or len(array) != len(names):
            raise InputError(f"{origin}: array of shape {list(array.shape)}, expected one row for each of {len(names)}")
        if array.dtype.kind not in "fiu":
            raise InputError(f"{origin}: holds {array.dtype}, expected numbers")
        rows = torch.from_numpy(np.asarray(array, np.float32))
        if not bool(torch.isfinite(rows).all()):
            raise InputError(f"{origin}: holds NaN or infinite values, expected finite embeddings")
        if not bool(rows.any(1).all()):
            raise InputError(f"{origin}: row {int((~rows.any(1)).nonzero()[0])} is zero, expected a direction")
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
        return cls(tuple(names), F.normalize(rows, dim=1), f"{origin.rsplit('/', 1)[-1]}:{digest}")

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """[K, D] unit rows.

        Raises:
            InputError: a name is not in the table.
        """
        index = {name: row for row, name in enumerate(self.names)}
        for name in names:
            if name not in index:
                raise InputError(f"name {name!r}: not in the table of {len(self.names)} embedded names")
        return self.embeddings[[index[name] for name in names]]

    def embed_captions(self, captions: Sequence[str]) -> Tensor | None:
        """None: a table embeds no sentences."""
        return None


def clean_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names trimmed and without repeats, in the given order.

    Raises:
        InputError: there is no name, or one is empty or not text; or `names` is a text itself.
    """
    if not isinstance(names, Iterable):
        raise InputError(f"vocabulary: {names!r}, expected a list of names")
    names = list(listed(names, "vocabulary"))
    if not names:
        raise InputError("vocabulary: empty, expected at least one name")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"vocabulary[{index}]: {name!r}, expected a non-empty name")
    return tuple(dict.fromkeys(name.strip() for name in names))


def listed(words: Iterable[str], field: str) -> Iterable[str]:
    """The words, if they are not one text, whose letters would be taken one by one.

    Raises:
        InputError: they are.
    """
    if isinstance(words, str | bytes):
        raise InputError(f"{field}: the text {words!r}, expected a list such as [{words!r}]")
    return words


def build_vocabulary(
    encoder: TextEncoder,
    names: Sequence[str],
    splits: Mapping[str, str] | None = None,
    synonyms: Synonyms | None = None,
    merge: Merge = "mean",
) -> Vocabulary:
    """Embed names.

    Args:
        encoder: embeds them.
        names: any names.
        splits: `base` or `novel` by name; `is_base` is None if None.
        synonyms: other words by name; a name is always one of its own synonyms.
        merge: whether a name's embedding is the mean of its synonyms', or its score the maximum of theirs.

    Raises:
        InputError: a name is empty or cannot be embedded.
    """
    cleaned = clean_names(names)
    is_base = None if splits is None else torch.tensor([splits.get(name) == "base" for name in cleaned])
    rows, owners = embed_words(encoder.embed_names, cleaned, synonyms, merge)
    return Vocabulary(cleaned, rows, is_base, owners)


def embed_words(
    embed: Callable[[Sequence[str]], Tensor], names: Sequence[str], synonyms: Synonyms | None, merge: Merge
) -> tuple[Tensor, Tensor | None]:
    """Embeddings of clean names with their synonyms, and the owner of each row: see `Vocabulary`."""
    if not synonyms:
        return embed(names), None
    words = [clean_names((name, *listed(synonyms.get(name, ()), f"synonyms of {name}"))) for name in names]
    rows_SD = embed([word for group in words for word in group])
    owners = torch.repeat_interleave(torch.tensor([len(group) for group in words], device=rows_SD.device))
    if merge == "max":
        return rows_SD, owners
    sums_KD = rows_SD.new_zeros(len(names), rows_SD.shape[1]).index_add(0, owners, rows_SD)
    return F.normalize(sums_KD, dim=1), None

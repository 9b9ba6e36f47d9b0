"""Queries about regions beyond a list of names: attributes, hierarchies, and prompts for one request.

K names, A attributes, C children, P prompts, D embedding width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.batches import TensorRecord
from ovd_models.clip.model import ClipTextEncoder, names_at_a_time
from ovd_models.errors import InputError
from ovd_models.prompts import prompts_of
from ovd_models.vocabulary import Merge, Synonyms, TextEncoder, Vocabulary, clean_names, embed_words, listed

Embed = Callable[[Sequence[str]], Tensor]
"""Names -> [K, D] unit rows."""
MOST_KEPT = 8
"""Prompt sets of requests whose encoders are kept, for each encoder."""
_KEPT: WeakKeyDictionary[ClipTextEncoder, dict[str, ClipTextEncoder]] = WeakKeyDictionary()
"""Encoders with other prompts, which share the tower and remember names."""


@runtime_checkable
class PromptedEncoder(Protocol):
    """A text encoder that remembers names in the prompts of requests itself."""

    def with_prompts(self, prompt_set: str) -> TextEncoder:
        """The same encoder with other prompts."""


@dataclass(frozen=True)
class RegionQuery(TensorRecord):
    """Names, attributes and a hierarchy to score every region with."""

    names: Vocabulary
    """K names; those with children are parents."""
    attributes: Vocabulary | None = None
    """A words, assumed independent of the names: the labels are "red cat", "red dog", "blue cat" ..."""
    children: Vocabulary | None = None
    """C names below those of `names`; the labels are the children, and the names that have none."""
    parents: Tensor | None = None
    """[C] int64: row of `names` above each child."""


def build_query(
    encoder: TextEncoder,
    names: Sequence[str] | Mapping[str, Sequence[str]],
    splits: Mapping[str, str],
    *,
    attributes: Sequence[str] = (),
    prompts: str = "",
    attribute_prompts: str = "photo",
    synonyms: Synonyms | None = None,
    merge: Merge = "mean",
) -> RegionQuery:
    """Embed a query.

    Args:
        encoder: the teacher's text tower.
        names: any names, or a mapping from names to their children, `{"bird": ["robin", "jay"], "anchor": []}`; an
            only child has its parent's score.
        splits: `base` or `novel` by name, as in training; if it has none of the names, `is_base` is None.
        attributes: words that apply to any name, such as colours; at least two, between which a region decides.
        prompts: a prompt set for this request, or templates separated by `|` (see `prompts.py`); the encoder's own if
            empty.
        attribute_prompts: the same for attributes, each placed before every name: "a photo of a red cat".
        synonyms: other words by name, child or attribute.
        merge: see `build_vocabulary`.

    Raises:
        InputError: a name is empty, a label twice or cannot be embedded, the prompts are unknown, there is one
            attribute alone, or synonyms of something else.
    """
    top, words = clean_names(names), clean_names(attributes) if attributes else ()
    if len(words) == 1:  # whose softmax is 1 everywhere
        raise InputError(f"attributes: {words[0]!r} alone would fit every region, expected words to choose between")
    below, rows = _find_children(names, top) if isinstance(names, Mapping) else ((), [])
    others = {name.strip(): others for name, others in (synonyms or {}).items()}
    unknown = others.keys() - {*top, *below, *words}
    if unknown:
        raise InputError(f"synonyms of {min(unknown)!r}: not a name of the query, expected one such as {top[0]!r}")

    def build(embed: Embed, labels: tuple[str, ...], is_base: Tensor | None = None) -> Vocabulary:
        embeddings, owners = embed_words(embed, labels, others, merge)
        return Vocabulary(labels, embeddings, is_base, owners)

    def embed_attributes(words: Sequence[str]) -> Tensor:
        # The part that comes from the names is the same for all words, so a softmax over the words ignores it.
        embed, labels = embedder(encoder, attribute_prompts), below or top
        rows_AD = torch.stack([embed([f"{word} {name}" for name in labels]).mean(0) for word in words])
        return F.normalize(rows_AD, dim=1)

    embed, has_split = embedder(encoder, prompts), any(name in splits for name in top)
    is_base = torch.tensor([splits.get(name) == "base" for name in top]) if has_split else None
    return RegionQuery(
        build(embed, top, is_base),
        build(embed_attributes, words) if words else None,
        build(embed, below) if below else None,
        torch.tensor(rows) if below else None,
    )


def _find_children(names: Mapping[str, Sequence[str]], top: tuple[str, ...]) -> tuple[tuple[str, ...], list[int]]:
    """The clean children of clean names, and the row of each one's parent.

    Raises:
        InputError: a name is twice, or a child has two parents or is a name itself.
    """
    if len(top) != len(names):
        raise InputError("vocabulary: a name is repeated, expected each parent once")
    pairs = [(child, row) for row, (name, below) in enumerate(names.items()) for child in listed(below, name)]
    if not pairs:
        return (), []
    children, rows = clean_names([child for child, _ in pairs]), [row for _, row in pairs]
    if len(children) != len(pairs):
        raise InputError("vocabulary: a child has two parents, expected one")
    for child, row in zip(children, rows, strict=True):
        if child in top and child != top[row]:
            raise InputError(f"vocabulary: {child!r} is a name and the child of {top[row]!r}, expected one")
    return children, rows


def embedder(encoder: TextEncoder, prompts: str) -> Embed:
    """What embeds names, [K, D] unit rows, in the prompts of a request; the encoder's own if empty.

    It takes a bounded number of sentences at a time, and a CLIP remembers recent names.

    Raises:
        InputError: the prompts are unknown.
    """
    if not prompts:
        return encoder.embed_names
    if isinstance(encoder, ClipTextEncoder):
        kept = _KEPT.setdefault(encoder, {})
        prompted = kept.get(prompts) or encoder.with_prompts(prompts)
        kept[prompts] = prompted
        if len(kept) > MOST_KEPT:
            kept.pop(next(iter(kept)))
        return prompted.embed_names
    if isinstance(encoder, PromptedEncoder):
        return encoder.with_prompts(prompts).embed_names
    step = names_at_a_time(prompts)

    def embed(names: Sequence[str]) -> Tensor:
        parts = (names[start : start + step] for start in range(0, len(names), step))
        return torch.cat([embed_prompts(encoder, [prompts_of(name, prompts) for name in part]) for part in parts])

    return embed


def embed_prompts(encoder: TextEncoder, texts_KP: Sequence[Sequence[str]]) -> Tensor:
    """[K, D] unit rows: the mean of each name's P prompt embeddings.

    Raises:
        InputError: the encoder is a table of names.
    """
    rows = encoder.embed_captions([text for texts in texts_KP for text in texts])
    if rows is None:
        raise InputError("prompts: the checkpoint has a table of names, expected one with a text tower")
    return F.normalize(rows.view(len(texts_KP), -1, rows.shape[1]).mean(1), dim=1)

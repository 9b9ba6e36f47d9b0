"""What is asked about regions beyond a list of names: attributes, hierarchies, and wordings of one request.

K names, A attributes, C children, P prompts, D embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.errors import InputError
from ovd_models.prompts import prompts_of
from ovd_models.vocabulary import TextEncoder, Vocabulary, build_vocabulary, clean_names


@dataclass(frozen=True)
class RegionQuery:
    """What is asked about every region."""

    names: Vocabulary
    """K names, or K parents where there are children."""
    attributes: Vocabulary | None = None
    """A words, taken as independent of the names: the answers are "red cat", "red dog", "blue cat" ..."""
    children: Vocabulary | None = None
    """C names below those of `names`; the answers are the children, and the names that have none."""
    parents: Tensor | None = None
    """[C] int64: row of `names` above each child."""

    def to(self, device: torch.device) -> "RegionQuery":
        """The same question on another device."""
        attributes, children, parents = self.attributes, self.children, self.parents
        return RegionQuery(
            self.names.to(device),
            None if attributes is None else attributes.to(device),
            None if children is None else children.to(device),
            None if parents is None else parents.to(device),
        )


def build_query(
    encoder: TextEncoder,
    names: Sequence[str] | Mapping[str, Sequence[str]],
    splits: Mapping[str, str],
    *,
    attributes: Sequence[str] = (),
    prompts: str = "",
    attribute_prompts: str = "photo",
) -> RegionQuery:
    """Embed what is asked.

    Args:
        encoder: the teacher's text tower.
        names: any names; or names with the children of each, `{"bird": ["robin", "jay"], "anchor": []}`.
        splits: `base` or `novel` by name, as in training. Where it has none of the names, nobody knows which had boxes.
        attributes: words that hold whatever the name is, as colours.
        prompts: a prompt set for this request, or templates separated by `|` (see `prompts.py`); the encoder's own if
            empty.
        attribute_prompts: the same for an attribute, which stands before each name in turn: "a photo of a red cat".

    Raises:
        InputError: a name is empty or cannot be embedded, or the prompts are unknown.
    """
    top = clean_names(list(names))
    of_top = build_vocabulary(encoder, top, splits if any(name in splits for name in top) else None)
    if prompts:
        of_top = Vocabulary(of_top.names, embed_prompts(encoder, top, prompts), of_top.is_base)
    children, parents = None, None
    if isinstance(names, Mapping):
        if len(top) != len(names):
            raise InputError("vocabulary: a name stands twice, expected each parent once")
        pairs = [(child, row) for row, below in enumerate(names.values()) for child in below]
        if pairs:
            below = clean_names([child for child, _ in pairs])
            if len(below) != len(pairs):
                raise InputError("vocabulary: a child stands below two names, expected it below one")
            rows = embed_prompts(encoder, below, prompts) if prompts else encoder.embed_names(below)
            children, parents = Vocabulary(below, rows), torch.tensor([row for _, row in pairs])
    asked = None
    if attributes:
        words = clean_names(attributes)
        named = children.names if children is not None else top
        asked = Vocabulary(words, embed_attributes(encoder, words, named, attribute_prompts))
    return RegionQuery(of_top, asked, children, parents)


def embed_prompts(encoder: TextEncoder, names: Sequence[str], prompts: str) -> Tensor:
    """[K, D] unit rows: the prompts' unit embeddings averaged for each name.

    Raises:
        InputError: the prompt set is unknown, or the encoder is a table of names.
    """
    return _mean_of(encoder, [prompts_of(name, prompts) for name in names])


def embed_attributes(encoder: TextEncoder, words: Sequence[str], names: Sequence[str], prompts: str) -> Tensor:
    """[A, D] unit rows: each word before every name, in all prompts.

    What the names have in common is the same for all words, so a softmax among these ignores it.

    Raises:
        InputError: the prompt set is unknown, or the encoder is a table of names.
    """
    return _mean_of(
        encoder, [[text for name in names for text in prompts_of(f"{word} {name}", prompts)] for word in words]
    )


def _mean_of(encoder: TextEncoder, texts_KP: Sequence[Sequence[str]]) -> Tensor:
    """K lists of P texts -> [K, D] unit means of their unit rows."""
    rows = encoder.embed_captions([text for texts in texts_KP for text in texts])
    if rows is None:
        raise InputError("prompts: the checkpoint has a table of names, expected one with a text tower")
    return F.normalize(rows.view(len(texts_KP), -1, rows.shape[1]).mean(1), dim=1)

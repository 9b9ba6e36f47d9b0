"""What is asked about regions beyond a list of names: attributes, hierarchies, and wordings of one request.

K names, A attributes, C children, P prompts of a name, D embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.errors import InputError
from ovd_models.prompts import with_article
from ovd_models.vocabulary import TextEncoder, Vocabulary, build_vocabulary, clean_names

ATTRIBUTE_PROMPTS = ("a photo of {attribute_a_name}",)
"""Wording of an attribute: "a photo of a red umbrella", averaged over the names that are asked for."""


@dataclass(frozen=True)
class Question:
    """What is asked about every region."""

    names: Vocabulary
    """K names, or K parents where there are children."""
    attributes: Vocabulary | None = None
    """A words, taken as independent of the names: the answers are "red cat", "red dog", "blue cat" ..."""
    children: Vocabulary | None = None
    """C names below those of `names`; the answers are the children, and the names that have none."""
    parents: Tensor | None = None
    """[C] int64: row of `names` above each child."""

    def to(self, device: torch.device) -> "Question":
        """The same question on another device."""
        attributes, children, parents = self.attributes, self.children, self.parents
        return Question(
            self.names.to(device),
            None if attributes is None else attributes.to(device),
            None if children is None else children.to(device),
            None if parents is None else parents.to(device),
        )


def build_question(
    encoder: TextEncoder,
    names: Sequence[str] | Mapping[str, Sequence[str]],
    splits: Mapping[str, str],
    *,
    attributes: Sequence[str] = (),
    prompts: Sequence[str] = (),
    attribute_prompts: Sequence[str] = ATTRIBUTE_PROMPTS,
) -> Question:
    """Embed what is asked.

    Args:
        encoder: the teacher's text tower.
        names: any names; or names with the children of each, `{"bird": ["robin", "jay"], "anchor": []}`.
        splits: `base` or `novel` by name, as in training. Where it has none of the names, nobody knows which had boxes.
        attributes: words that hold whatever the name is, as colours.
        prompts: templates of this request with `{name}` or `{a_name}`, instead of the encoder's prompt set.
        attribute_prompts: templates with `{attribute}`, or with `{attribute_a_name}` for "a red cat", averaged over
            the names.

    Raises:
        InputError: a name or template is empty or cannot be embedded.
    """
    top = clean_names(list(names))
    of_top = build_vocabulary(encoder, top, splits if any(name in splits for name in top) else None)
    if prompts:
        of_top = Vocabulary(of_top.names, embed_templates(encoder, top, prompts), of_top.is_base)
    children, parents = None, None
    if isinstance(names, Mapping):
        if len(top) != len(names):
            raise InputError("vocabulary: a name stands twice, expected each parent once")
        pairs = [(child, row) for row, below in enumerate(names.values()) for child in below]
        if pairs:
            below = clean_names([child for child, _ in pairs])
            if len(below) != len(pairs):
                raise InputError("vocabulary: a child stands below two names, expected it below one")
            rows = embed_templates(encoder, below, prompts) if prompts else encoder.embed_names(below)
            children, parents = Vocabulary(below, rows), torch.tensor([row for _, row in pairs])
    asked = None
    if attributes:
        words = clean_names(attributes)
        named = children.names if children is not None else top
        asked = Vocabulary(words, embed_attributes(encoder, words, named, attribute_prompts))
    return Question(of_top, asked, children, parents)


def embed_templates(encoder: TextEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """[K, D] unit rows: the templates' unit embeddings averaged for each name.

    Raises:
        InputError: a template has no place for the name, or the encoder is a table of names.
    """
    try:
        texts = [text.format(name=name, a_name=with_article(name)) for name in names for text in templates]
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"prompts {list(templates)}: {error!r}, expected {{name}} or {{a_name}}") from error
    if not all("name}" in text for text in templates):
        raise InputError(f"prompts {list(templates)}: no place for the name, expected {{name}} or {{a_name}}")
    return _mean_of(encoder, texts, len(templates))


def embed_attributes(
    encoder: TextEncoder, words: Sequence[str], names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """[A, D] unit rows: each word in all templates, with all names where the template has a place for one.

    What the names have in common is the same for all words, so a softmax among these ignores it.

    Raises:
        InputError: a template has no place for the word, or the encoder is a table of names.
    """
    if not templates or not all("{attribute" in text for text in templates):
        raise InputError(f"attribute prompts {list(templates)}: expected {{attribute}} or {{attribute_a_name}}")

    def sentences(word: str) -> list[str]:
        named = [text for text in templates if "{attribute_a_name}" in text]
        alone = [text for text in templates if "{attribute_a_name}" not in text]
        return [text.format(attribute_a_name=with_article(name, word)) for text in named for name in names] + [
            text.format(attribute=word) for text in alone
        ]

    try:
        texts = [sentences(word) for word in words]
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"attribute prompts {list(templates)}: {error!r}, expected {{attribute}}") from error
    return _mean_of(encoder, [text for group in texts for text in group], len(texts[0]))


def _mean_of(encoder: TextEncoder, texts: Sequence[str], prompts: int) -> Tensor:
    """[K * P] texts -> [K, D] unit means of P unit rows each."""
    rows = encoder.embed_captions(texts)
    if rows is None:
        raise InputError("prompts: the checkpoint has a table of names, expected one with a text tower")
    return F.normalize(rows.view(-1, prompts, rows.shape[1]).mean(1), dim=1)

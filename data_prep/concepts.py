"""From captions to concepts: which names of a vocabulary a caption mentions, and the groups of images that share one.

vocabulary = Vocabulary.parse(["umbrella", "mouse, computer mouse"])
vocabulary.match("Two red Umbrellas and mice")      # [0, 1]
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep import storage, tables
from ovd_models.errors import InputError

WORD = re.compile(r"[^\W_]+")
IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "die": "dice", "ox": "oxen", "knife": "knives", "wife": "wives",
    "leaf": "leaves", "loaf": "loaves", "shelf": "shelves", "wolf": "wolves", "calf": "calves", "half": "halves",
    "scarf": "scarves", "hoof": "hooves", "potato": "potatoes", "tomato": "tomatoes", "cactus": "cacti",
    "sheep": "sheep", "fish": "fish", "deer": "deer",
}  # fmt: skip
SINGULAR = {plural: singular for singular, plural in IRREGULAR.items()}


@dataclass(frozen=True)
class Vocabulary:
    """Names to look for in captions."""

    names: tuple[str, ...]
    phrases: dict[str, dict[tuple[str, ...], tuple[int, ...]]]
    """First word -> words of a phrase -> indices of the names it stands for; longer phrases first."""

    @classmethod
    def read(cls, uri: str) -> Self:
        """The vocabulary of a text file, as `parse` takes its lines.

        Raises:
            InputError: the file is missing or malformed.
        """
        try:
            lines = storage.read_bytes(uri).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            message = " ".join(str(error).split())
            raise InputError(f"{uri}: expected a text file of one name a line ({message})") from error
        return cls.parse(lines)

    @classmethod
    def parse(cls, lines: Iterable[str]) -> Self:
        """A vocabulary of one name a line, each optionally followed by synonyms after commas.

        Singular and plural forms stand for each other, unless the form is itself a name. Empty lines are skipped.

        Raises:
            InputError: a line names nothing, or a name comes twice.
        """
        entries = [[part.strip() for part in line.split(",")] for line in lines if line.strip()]
        names = tuple(entry[0].replace("_", " ") for entry in entries)
        seen: set[str] = set()
        exact: dict[tuple[str, ...], list[int]] = {}
        for index, entry in enumerate(entries):
            if not WORD.search(entry[0]):
                raise InputError(f"vocabulary: name {index + 1} is {entry[0]!r}, expected a word")
            if names[index].lower() in seen:
                raise InputError(f"vocabulary: {names[index]!r} is listed twice, expected each name once")
            seen.add(names[index].lower())
            for phrase in entry:
                if WORD.search(phrase):
                    exact.setdefault(tuple(WORD.findall(phrase.lower())), []).append(index)
        every = {words: list(indices) for words, indices in exact.items()}
        for words, indices in exact.items():
            for form in inflections(words[-1]):
                other = (*words[:-1], form)
                if other not in exact:
                    every.setdefault(other, []).extend(index for index in indices if index not in every.get(other, []))
        phrases: dict[str, dict[tuple[str, ...], tuple[int, ...]]] = {}
        for words in sorted(every, key=len, reverse=True):
            phrases.setdefault(words[0], {})[words] = tuple(dict.fromkeys(every[words]))
        return cls(names, phrases)

    def match(self, caption: str) -> list[int]:
        """Indices of the names a caption mentions, ascending, each once; of overlapping phrases the longest counts."""
        words = WORD.findall(caption.lower())
        found: set[int] = set()
        position = 0
        while position < len(words):
            step = 1
            for phrase, indices in self.phrases.get(words[position], {}).items():
                if len(phrase) == 1 or tuple(words[position : position + len(phrase)]) == phrase:
                    found.update(indices)
                    step = len(phrase)
                    break
            position += step
        return sorted(found)


def inflections(word: str) -> list[str]:
    """The plural of an English noun, and the singular if it looks like a plural."""
    if word in IRREGULAR:
        return [IRREGULAR[word]]
    if word in SINGULAR:
        return [SINGULAR[word]]
    forms = []
    if word.endswith(("s", "x", "z", "ch", "sh")):
        forms.append(word + "es")
    elif len(word) > 1 and word.endswith("y") and word[-2] not in "aeiou":
        forms.append(word[:-1] + "ies")
    else:
        forms.append(word + "s")
    if len(word) > 4 and word.endswith("ies"):
        forms.append(word[:-3] + "y")
    elif len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        forms += [word[:-2], word[:-1]]
    elif len(word) > 4 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        forms.append(word[:-1])
    return forms


def build_groups(
    pairs: pa.Table, mentions: Sequence[Sequence[int]], names: Sequence[str], *, min_images: int = 1
) -> tuple[pa.Table, pa.Table]:
    """The `concepts` and `groups` tables.

    Args:
        pairs: [N] rows with the image columns of `groups`.
        mentions: [N] for each pair, indices into `names`.
        names: concepts by index.
        min_images: concepts of fewer unique images are left out.

    Returns:
        Concepts in alphabetical order with the range of their rows in `groups`, and groups sorted by concept and
        image, each image once a concept.
    """
    counts = np.array([len(mention) for mention in mentions], np.int64)
    pair = np.repeat(np.arange(len(counts)), counts)
    name = np.fromiter((index for mention in mentions for index in mention), np.int64, int(counts.sum()))
    image = pairs["image_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)[pair]
    _, first = np.unique(np.stack([name, image]), axis=1, return_index=True)
    first.sort()
    pair, name = pair[first], name[first]
    images = np.bincount(name, minlength=len(names))

    alphabetical = sorted(np.flatnonzero(images >= max(1, min_images)).tolist(), key=lambda index: names[index])
    concept_of = np.full(len(names), -1, np.int32)
    concept_of[alphabetical] = np.arange(len(alphabetical), dtype=np.int32)
    lists = [sorted(concept_of[list(mention)][concept_of[list(mention)] >= 0].tolist()) for mention in mentions]

    used = concept_of[name] >= 0
    pair, concept = pair[used], concept_of[name[used]]
    columns = ["image_id", "shard", "offset", "size", "width", "height", "caption"]
    groups = pairs.select(columns).take(pair).append_column("concept_id", pa.array(concept, pa.int32()))
    groups = groups.append_column("concept_ids", pa.array(lists, pa.list_(pa.int32())).take(pa.array(pair)))
    groups = groups.sort_by([("concept_id", "ascending"), ("image_id", "ascending")])
    groups = groups.select(tables.SCHEMAS["groups"].names).cast(tables.SCHEMAS["groups"])

    count = images[alphabetical].astype(np.int64)
    stop = np.cumsum(count)
    concepts = pa.table(
        [
            pa.array(np.arange(len(alphabetical)), pa.int32()),
            pa.array([names[index] for index in alphabetical], pa.string()),
            pa.array(count, pa.int64()),
            pa.array(stop - count, pa.int64()),
            pa.array(stop, pa.int64()),
        ],
        schema=tables.SCHEMAS["concepts"],
    )
    assert pc.sum(concepts["image_count"]).as_py() in (groups.num_rows, None)
    return concepts, groups

"""Names that compete in OV-SAM's study: those of a box set, and many distractors."""

import itertools
from collections.abc import Sequence

from data_prep import storage, tables
from data_prep.concepts.word_lists import read_list
from ovd_models.errors import InputError

MODIFIERS = (
    "ancient", "antique", "bamboo", "broken", "cardboard", "carved", "ceramic", "clay", "concrete", "copper", "cotton",
    "crystal", "decorated", "dusty", "felt", "folding", "fragile", "frozen", "glass", "heavy", "iron", "knitted",
    "leather", "marble", "metal", "modern", "oversized", "paper", "plastic", "polished", "portable", "rubber", "rusty",
    "shiny", "silk", "stone", "striped", "velvet", "wicker", "wooden",
)  # fmt: skip
"""First words of distractors; no colours, which objects of the pictogram world may have."""


def competing_names(storage_uri: str, boxes: str, sizes: Sequence[int], distractors: str) -> list[str]:
    """The names of a box set, then distractors up to the largest of the vocabularies' sizes.

    `distractors` is a file with a name per line; if empty, names are composed.

    Raises:
        InputError: there are too few names, or a size is smaller than the box set.
    """
    rows = tables.read_table(storage_uri, "categories", boxes).to_pylist()
    own = [row["name"] for row in rows if row["split"]]
    if sizes and min(sizes) < len(own):
        raise InputError(f"vocabulary_sizes: {min(sizes)}, expected at least the set's {len(own)} names")
    more = storage.read_text(distractors).splitlines() if distractors else composed_names()
    names = list(dict.fromkeys([*own, *(name.strip().lower() for name in more if name.strip())]))
    count = max(sizes, default=len(own))
    if len(names) < count:
        raise InputError(f"{distractors or 'composed names'}: {len(names)} names with the set's, expected {count}")
    return names[:count]


def composed_names() -> list[str]:
    """45,760 names such as "wooden alarm clock", ordered so that each noun appears once before any is repeated."""
    objects = sorted(read_list("compounds"))
    pairs = itertools.product(range(len(MODIFIERS)), enumerate(objects))
    return [f"{MODIFIERS[(first + number) % len(MODIFIERS)]} {name}" for first, (number, name) in pairs]

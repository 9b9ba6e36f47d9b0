"""Names that compete for what OV-SAM segments: those of a box set, and many that are nobody's."""

import itertools
from collections.abc import Sequence

from data_prep import storage, tables
from data_prep.concepts import nouns
from ovd_models.errors import InputError

MODIFIERS = (
    "ancient", "antique", "bamboo", "broken", "cardboard", "carved", "ceramic", "clay", "concrete", "copper", "cotton",
    "crystal", "decorated", "dusty", "felt", "folding", "fragile", "frozen", "glass", "heavy", "iron", "knitted",
    "leather", "marble", "metal", "modern", "oversized", "paper", "plastic", "polished", "portable", "rubber", "rusty",
    "shiny", "silk", "stone", "striped", "velvet", "wicker", "wooden",
)  # fmt: skip
"""What distracting names begin with: no colour, which things of the pictogram world may have."""


def competing_names(storage_uri: str, boxes: str, sizes: Sequence[int], distractors: str) -> list[str]:
    """The names of a box set and then distracting ones, as many as the largest size asks for.

    Args:
        storage_uri: the storage.
        boxes: name of the box set.
        sizes: of vocabularies.
        distractors: a file with a name a line; if empty, names are composed.

    Raises:
        InputError: there are too few, or a size leaves out names of the set.
    """
    rows = tables.read_table(storage_uri, "categories", boxes).to_pylist()
    own = [row["name"] for row in rows if row["split"]]
    if sizes and min(sizes) < len(own):
        raise InputError(f"vocabulary_sizes: {min(sizes)}, expected at least the set's {len(own)} names")
    more = storage.read_bytes(distractors).decode().splitlines() if distractors else composed_names()
    names = list(dict.fromkeys([*own, *(name.strip().lower() for name in more if name.strip())]))
    wanted = max(sizes, default=len(own))
    if len(names) < wanted:
        raise InputError(f"{distractors or 'composed names'}: {len(names)} names with the set's, expected {wanted}")
    return names[:wanted]


def composed_names() -> list[str]:
    """45,760 names of things: "wooden alarm clock"; in an order that shows each noun before any comes again."""
    vocabulary, compounds = nouns.phrases()
    things = sorted(vocabulary.names[:compounds])
    pairs = itertools.product(range(len(MODIFIERS)), enumerate(things))
    return [f"{MODIFIERS[(first + number) % len(MODIFIERS)]} {thing}" for first, (number, thing) in pairs]

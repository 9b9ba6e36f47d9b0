"""English word lists, one text file each in `words/`; the first lines of a file say what it holds."""

import functools
from importlib import resources
from typing import Literal

WordList = Literal[
    "compounds", "concrete", "ignored_phrases", "ing_nouns", "invariant", "irregular_plurals", "nonvisual",
    "other_plurals", "roles", "tagger_misses",
]  # fmt: skip


@functools.cache
def read_list(name: WordList) -> tuple[str, ...]:
    """The entries of a list, one a line, in the order of the file."""
    lines = resources.files(__package__).joinpath("words", f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))


@functools.cache
def word_set(name: WordList) -> frozenset[str]:
    """The entries of a list as a set."""
    return frozenset(read_list(name))


@functools.cache
def singulars(name: Literal["irregular_plurals", "other_plurals"]) -> dict[str, str]:
    """Plural -> singular, in the order of the file."""
    return dict(line.split() for line in read_list(name))

"""Concepts of captions by a vocabulary: which of its names a caption mentions.

matcher = NameMatcher.parse(["umbrella", "mouse, computer mouse"])
matcher.match("Two red Umbrellas and mice")      # ["mouse", "umbrella"]
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from data_prep import storage
from data_prep.concepts.word_lists import singulars
from ovd_models.errors import InputError

WORD = re.compile(r"[^\W_]+")


class Extractor(Protocol):
    """Finds the concepts of captions: a `NameMatcher`, or a `data_prep.concepts.nouns.NounExtractor`."""

    def match(self, caption: str) -> list[str]:
        """The concepts a caption mentions, in alphabetical order, each once."""


@dataclass(frozen=True)
class NameMatcher:
    """Finds the names of a vocabulary in captions."""

    names: tuple[str, ...]
    phrases: dict[str, dict[tuple[str, ...], tuple[int, ...]]]
    """First word -> words of a phrase -> indices of the names it stands for; longer phrases first."""

    @classmethod
    def read(cls, uri: str) -> Self:
        """The vocabulary of a text file, in the format of `parse`.

        Raises:
            InputError: the file is missing or malformed.
        """
        try:
            lines = storage.read_text(uri).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            message = " ".join(str(error).split())
            raise InputError(f"{uri}: expected a text file of one name a line ({message})") from error
        return cls.parse(lines)

    @classmethod
    def parse(cls, lines: Iterable[str]) -> Self:
        """A vocabulary of one name a line, each optionally followed by synonyms after commas.

        Singular and plural forms stand for each other, unless the form is itself a name. Empty lines are skipped.

        Raises:
            InputError: a line has no name, or a name is repeated.
        """
        return cls._build([[part.strip() for part in line.split(",")] for line in lines if line.strip()])

    @classmethod
    def of_names(cls, names: Iterable[str]) -> Self:
        """A vocabulary of names without synonyms, which may hold commas: `car, sedan`.

        Raises:
            InputError: a name has no word, or is repeated.
        """
        return cls._build([[name.strip()] for name in names])

    @classmethod
    def _build(cls, entries: Sequence[Sequence[str]]) -> Self:
        names = tuple(entry[0].replace("_", " ") for entry in entries)
        used: dict[str, int] = {}
        exact: dict[tuple[str, ...], list[int]] = {}
        for index, entry in enumerate(entries):
            if not WORD.search(entry[0]):
                raise InputError(f"vocabulary: name {index + 1} is {entry[0]!r}, expected a word")
            if names[index].lower() in used:
                both = f"names {used[names[index].lower()]} and {index + 1}"
                raise InputError(f"vocabulary: {names[index]!r} is listed twice ({both}), expected each name once")
            used[names[index].lower()] = index + 1
            for phrase in entry:
                if WORD.search(phrase):
                    exact.setdefault(tuple(WORD.findall(phrase.lower())), []).append(index)
        indices_of = {words: list(indices) for words, indices in exact.items()}
        for words, indices in exact.items():
            for form in inflections(words[-1]):
                inflected = (*words[:-1], form)
                if inflected not in exact:
                    indices_of.setdefault(inflected, []).extend(indices)
        phrases: dict[str, dict[tuple[str, ...], tuple[int, ...]]] = {}
        for words in sorted(indices_of, key=len, reverse=True):
            phrases.setdefault(words[0], {})[words] = tuple(dict.fromkeys(indices_of[words]))
        return cls(names, phrases)

    def match(self, caption: str) -> list[str]:
        """The names a caption mentions, in alphabetical order, each once; of overlapping phrases the longest counts."""
        spans = self.spans(WORD.findall(caption.lower()))
        return sorted({self.names[index] for _, _, indices in spans for index in indices})

    def spans(self, words: Sequence[str]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Positions of names among lower-case words: start, stop and the indices of the names, left to right."""
        position = 0
        while position < len(words):
            stop = position + 1
            for phrase, indices in self.phrases.get(words[position], {}).items():
                if len(phrase) == 1 or tuple(words[position : position + len(phrase)]) == phrase:
                    stop = position + len(phrase)
                    yield position, stop, indices
                    break
            position = stop


def inflections(word: str) -> list[str]:
    """The plural of an English noun, and its singular if it looks like a plural."""
    irregular = singulars("irregular_plurals")
    for plural, singular in irregular.items():
        if word == singular:
            return [plural]
    if word in irregular:
        return [irregular[word]]
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

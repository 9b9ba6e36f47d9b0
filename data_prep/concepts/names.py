"""From captions to concepts: which names of a vocabulary a caption mentions, and the groups of images that share one.

vocabulary = Vocabulary.parse(["umbrella", "mouse, computer mouse"])
vocabulary.match("Two red Umbrellas and mice")      # ["mouse", "umbrella"]
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from data_prep import storage
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


class Extractor(Protocol):
    """Finds the concepts of captions: a `NameMatcher`, or `data_prep.concepts.nouns.Nouns`."""

    def match(self, caption: str) -> list[str]:
        """The concepts a caption mentions, in alphabetical order, each once."""


@dataclass(frozen=True)
class NameMatcher:
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

    def match(self, caption: str) -> list[str]:
        """The names a caption mentions, in alphabetical order, each once; of overlapping phrases the longest counts."""
        spans = self.spans(WORD.findall(caption.lower()))
        return sorted({self.names[index] for _, _, indices in spans for index in indices})

    def spans(self, words: Sequence[str]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Where names stand among lower-case words: start, stop and the indices of the names, left to right."""
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

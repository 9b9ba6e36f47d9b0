"""CoDet's rule for concepts: the nouns that WordNet counts among objects or food.

rule = read_wordnet("/usr/share/wordnet")     # Debian's wordnet-base, or nltk_data/corpora/wordnet
rule.keeps("fire truck"), rule.keeps("idea")  # True, False

Of a word's first two synsets one must reach `object` or `food` by first hypernyms before it reaches `entity`,
`location` or another of `REJECTED`. Every word of a longer name must be in WordNet, and the last one decides.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from data_prep import storage
from ovd_models.errors import InputError

ACCEPTED = ("object", "food")
REJECTED = ("entity", "location", "photograph", "photo", "picture", "system", "land", "structure")
PARTS = ("noun", "verb", "adj", "adv")
SYNSETS = 2
T = TypeVar("T")


@dataclass(frozen=True)
class WordNetRule:
    """The words that the rule needs."""

    words: frozenset[str]
    """All words of WordNet."""
    objects: frozenset[str]
    """Those that name objects or food."""

    def keeps(self, name: str) -> bool:
        """Whether a lower-case name in the singular is a concept."""
        words = name.split()
        return bool(words) and words[-1] in self.objects and self.words.issuperset(words)


def read_wordnet(folder: str) -> WordNetRule:
    """The rule by the files `index.*` and `data.*` of WordNet 3.0 in a folder or URI.

    Raises:
        InputError: a file is missing or malformed.
    """
    synsets: dict[str, list[str]] = {}
    parents: dict[str, list[str]] = {}
    firsts: dict[str, str] = {}
    for part in PARTS:
        for word, own in _read(storage.join(folder, f"index.{part}"), _index_line):
            synsets.setdefault(word, []).extend(part + offset for offset in own)
        for key, (first, above) in _read(storage.join(folder, f"data.{part}"), _data_line):
            firsts[part + key], parents[part + key] = first, [part + offset for offset in above]
    if not all(synsets.get(word) for word in ACCEPTED + REJECTED):
        raise InputError(f"{folder}: lacks the word 'entity' or 'object', expected the files of WordNet 3.0")

    def rank(synset: str) -> tuple[str, int]:  # NLTK, by which CoDet reads WordNet, sorts hypernyms by name
        return firsts[synset], synsets[firsts[synset]].index(synset)

    parent = {key: min(above, key=rank) for key, above in parents.items() if above}
    accepted, rejected = ({key for word in words for key in synsets[word]} for words in (ACCEPTED, REJECTED))
    objects = {
        word
        for word, own in synsets.items()
        if any(_reaches(synset, parent, accepted, rejected) for synset in own[:SYNSETS])
    }
    return WordNetRule(frozenset(synsets), frozenset(objects))


def _reaches(synset: str, parent: Mapping[str, str], accepted: set[str], rejected: set[str]) -> bool:
    """Whether a synset or one above it is accepted before any is rejected."""
    while synset not in rejected:
        if synset in accepted:
            return True
        if synset not in parent:
            break
        synset = parent[synset]
    return False


def _index_line(fields: list[str]) -> tuple[str, list[str]]:
    """A word, and its synsets in the order of its senses."""
    return fields[0], fields[-int(fields[2]) :]


def _data_line(fields: list[str]) -> tuple[str, tuple[str, list[str]]]:
    """A synset, its first word, and the synsets above it."""
    pointers = fields[4 + 2 * int(fields[3], 16) :]  # their number, then four fields each
    above = [offset for symbol, offset in zip(pointers[1::4], pointers[2::4], strict=False) if symbol == "@"]
    return fields[0], (fields[4].lower().partition("(")[0], above)


def _read(uri: str, parse: Callable[[list[str]], tuple[str, T]]) -> Iterator[tuple[str, T]]:
    """The parsed fields of each line of a file of WordNet, without its licence and glosses."""
    number, line = 0, ""
    try:
        for line in storage.read_bytes(uri).decode().splitlines():
            number += 1
            if not line.startswith("  "):
                yield parse(line.partition(" | ")[0].split())
    except OSError as error:
        raise InputError(f"{uri}: cannot be read ({' '.join(str(error).split())}), expected WordNet 3.0") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"{uri}: line {number} is {line[:60]!r}, expected WordNet 3.0") from error

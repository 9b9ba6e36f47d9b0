"""Concepts of captions without a vocabulary: the nouns that name something visible.

NounExtractor().match("Two boys beside a red fire hydrant by a brick wall")  # ["boy", "brick", "fire hydrant", "wall"]

HanTa tags each word. The word lists join compounds, leave out what is not visible and correct the tagger's mistakes.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.concepts.names import NameMatcher
from data_prep.concepts.word_lists import read_list, singulars, word_set
from data_prep.concepts.wordnet import WordNetRule

TOKEN = re.compile(r"[^\W_]+|[^\w\s]")
# What separates words besides spaces. Endless words are dropped: HanTa's time grows with the square of their length.
SEPARATOR = re.compile(r"['’](?:s|re|t|ll|ve|d|m)\b|['’_-]|[^\W_]{30,}")
LATIN = re.compile(r"[a-zß-öø-ÿœ]{2,}")
NOUN_TAGS = frozenset({"NN0", "NN1", "NN2", "UNC"})
NAME_TAGS = frozenset({"NP0"})
ABSTRACT = re.compile(r".{2,}(?:ness|ity|tion|sion|ment|ism|ance|ence|ship|ology|hood)")
"""Endings of nouns that name nothing visible, except the nouns in the list `concrete`."""
SPORT_HEADS = frozenset(
    {"ball", "bat", "club", "court", "course", "field", "game", "glove", "helmet", "match", "player", "racket", "rink",
     "stick", "team"}
)  # fmt: skip
"""What sports have, and hardly anything else has several of."""
CLOTHING_HEADS = frozenset({"attire", "garb", "outfit", "uniform"})
"""Clothing that is named by who wears it, or when."""
CACHED_WORDS = 1 << 17


@functools.cache
def phrase_matcher() -> tuple[NameMatcher, int]:
    """Matches the compounds, then the ignored phrases; with the number of compounds."""
    compounds = read_list("compounds")
    return NameMatcher.parse(compounds + read_list("ignored_phrases")), len(compounds)


@functools.cache
def load_hanta() -> Any:
    """HanTa with its English model, loaded once a process."""
    from HanTa.HanoverTagger import HanoverTagger

    tagger = HanoverTagger("morphmodel_en.pgz")
    # Most of the time goes into the morphology of words outside its lexicon, and captions repeat their words.
    tagger._tag_word = functools.lru_cache(maxsize=CACHED_WORDS)(tagger._tag_word)
    return tagger


@functools.lru_cache(maxsize=CACHED_WORDS)
def lexicon_tag(word: str) -> str:
    """The likeliest tag of a lower-case word in HanTa's lexicon; empty if the lexicon lacks the word."""
    tagger = load_hanta()
    readings = tagger.cache.get(word, ())
    return str(tagger.int2tag[max(readings, key=lambda item: item[1])[0]]) if readings else ""


@functools.lru_cache(maxsize=CACHED_WORDS)
def is_adverb(word: str) -> bool:
    """Whether a lower-case word is likelier an adverb than a noun (overhead, inside), by HanTa's log-probabilities."""
    tagger = load_hanta()
    chances = {str(tagger.int2tag[tag]): chance for tag, chance in tagger.cache.get(word, ())}
    noun = max((chances[tag] for tag in NOUN_TAGS if tag in chances), default=-math.inf)
    return bool(noun < chances.get("AV0", -math.inf))


@functools.lru_cache(maxsize=CACHED_WORDS)
def singular(word: str) -> str:
    """The singular of a lower-case English noun: by the lists, an irregular last part (snowmen), or the ending."""
    irregular = singulars("irregular_plurals")
    listed = irregular.get(word) or singulars("other_plurals").get(word)
    if listed or word in word_set("invariant") or len(word) < 3:
        return listed or word
    for plural, one in irregular.items():
        if word.endswith(plural) and plural not in ("dice", "mice"):  # jaundice, pumice
            return word.removesuffix(plural) + one
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("sses", "ches", "shes", "xes", "zzes", "tzes")) else word[:-1]


def is_visual(noun: str) -> bool:
    """Whether a singular noun names something visible."""
    if not noun or noun in word_set("nonvisual") or (noun.endswith("ing") and noun not in word_set("ing_nouns")):
        return False
    return noun in word_set("concrete") or not ABSTRACT.fullmatch(noun)


@functools.cache
def sports() -> frozenset[str]:
    """Words that name at least two of `SPORT_HEADS` among the compounds: tennis (ball, court, racket)."""
    pairs = [tuple(phrase.split()) for phrase in read_list("compounds")]
    counts = Counter(pair[0] for pair in pairs if len(pair) == 2 and pair[1] in SPORT_HEADS)
    return frozenset(word for word, count in counts.items() if count > 1)


def is_compound(first: str, second: str) -> bool:
    """Whether two nouns in a row are one concept.

    So are a role (bicycle rider), words that are also written together, clothing (wedding attire), a verb's noun with
    its object (face piercing), and a visible thing named by its sport (soccer jersey).
    """
    if second in word_set("roles") or second in CLOTHING_HEADS or lexicon_tag(first + second) == "NN1":
        return True
    if second.endswith("ing") and lexicon_tag(second) in ("AJ0", "VVG") and is_visual(second):
        return True
    return first in sports() and is_visual(second)


@dataclass(frozen=True)
class NounExtractor:
    """Finds every noun of an English caption that names something visible; a compound is one concept."""

    rule: WordNetRule | None = None
    """Which nouns are concepts; None: those that the word lists and their endings do not exclude."""

    def match(self, caption: str) -> list[str]:
        """Lower-case names in the singular, in alphabetical order, each once."""
        tokens = TOKEN.findall(SEPARATOR.sub(" ", caption))
        nouns = self.nouns(tokens)
        concepts: set[str] = set()
        matcher, compounds = phrase_matcher()
        for start, stop, indices in matcher.spans([token.lower() for token in tokens]):
            names = (matcher.names[index] for index in indices if index < compounds)
            concepts.update(name for name in names if self.rule is None or self.rule.keeps(name))
            nouns[start:stop] = [""] * (stop - start)
        position = 0
        while position < len(nouns):
            first, second = nouns[position], "".join(nouns[position + 1 : position + 2])
            if first and second and is_compound(first, second):
                name = second if second.endswith("ing") else first + second
                visual = is_visual(name) if self.rule is None else self.rule.keeps(f"{first} {second}")
                concepts.update([f"{first} {second}"] if visual else [])
                position += 2
            else:
                visual = is_visual(first) if self.rule is None else self.rule.keeps(first)
                concepts.update([first] if visual else [])
                position += 1
        return sorted(concepts)

    def nouns(self, tokens: Sequence[str]) -> list[str]:
        """The singular of each token that is a common noun, and an empty string for each other token."""
        words = [token.lower() for token in tokens]
        tagged = list(zip(tokens, words, self.tags(words), strict=True))
        # A capital marks a name, except in captions that write every noun with one, as titles do.
        plain = any(token.islower() and tag in NOUN_TAGS for token, _, tag in tagged)
        nouns = []
        for position, (token, word, tag) in enumerate(tagged):
            if singular(word) in word_set("tagger_misses"):
                is_noun = True
            elif tag in NAME_TAGS or (plain and position and token[0].isupper()):
                is_noun = lexicon_tag(word).startswith("NN") or (token.islower() and not lexicon_tag(word))
            else:
                is_noun = tag in NOUN_TAGS and not (
                    position and tagged[position - 1][2] in NOUN_TAGS and is_adverb(word)
                )
            nouns.append(singular(word) if is_noun and LATIN.fullmatch(word) else "")
        return nouns

    def tags(self, words: Sequence[str]) -> list[str]:
        """The tag of each lower-case word of a caption."""
        return list(load_hanta().tag_sent(words, taglevel=0))

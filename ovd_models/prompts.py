"""Prompt sets: the sentences in which a text encoder embeds a name; and the cleaning of data sets' names.

A template holds `{a}` (the name after its article), `{a:red}` (with a word between them) or `{name}` (the bare name).
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ovd_models.errors import InputError

COLOURS = ("red", "green", "blue", "orange", "purple", "brown", "black", "white")
FIELD = re.compile(r"\{(?:name|a(?::([^{}]*))?)\}")
Article = Literal["a/an", "a"]
SynonymRule = Literal["none", "mean", "max"]
"""Use of synonyms in evaluation: none, the mean of their embeddings, or the maximum of their scores."""


@dataclass(frozen=True)
class PromptSet:
    """Templates whose embeddings are averaged."""

    templates: tuple[str, ...]
    source: str
    """Where the wording comes from."""
    article: Article = "a/an"
    """Chosen by the next letter, or always `a`, as in some released embeddings."""


def with_article(name: str, word: str = "", article: Article = "a/an") -> str:
    """`an anchor`, `a red anchor`."""
    phrase = f"{word} {name}".strip()
    return ("an " if article == "a/an" and phrase[:1].lower() in tuple("aeiou") else "a ") + phrase


def _with_articles(frame: str, words: Iterable[str] = ("",)) -> tuple[str, ...]:
    """The frame with `a WORD NAME` and with `the WORD NAME` in place of `*`, for each word."""
    things = [(f"{{a:{word}}}", f"the {word} {{name}}".replace("  ", " ")) for word in words]
    return tuple(frame.replace("*", thing) for pair in things for thing in pair)


def _with_qualities(frame: str, qualities: Iterable[str]) -> tuple[str, ...]:
    """`_with_articles` of the frame with each quality in place of `~`."""
    return tuple(template for quality in qualities for template in _with_articles(frame.replace("~", quality)))


_DEPICTIONS = ("sculpture", "rendering", "tattoo", "drawing", "painting", "doodle", "sketch", "rendition")
_FLAWS = ("low resolution", "cropped", "close-up", "jpeg corrupted", "blurry", "pixelated", "black and white")
_COUNTED = ("a photo of my {name}.", "a photo of one {name}.", "a photo of many {name}.")

_IMAGENET = (
    *_with_qualities("a ~ of *.", _DEPICTIONS),
    *_with_qualities("~ of *.", ("art", "graffiti", "itap")),
    "itap of my {name}.",
    *_with_articles("* in a video game."),
    *_with_articles("a photo of *."),
    *_COUNTED,
    *_with_qualities("a ~ photo of *.", ("good", "bad", "bright", "dark", *_FLAWS)),
    *_with_articles("a photo of *.", ("clean", "dirty", "nice", "cool", "weird", "small", "large", "hard to see")),
    *_with_articles("*.", ("embroidered", "plastic", "origami", "toy", "plushie", "cartoon")),
)
_VILD = (
    *_with_articles("There is * in the scene."),
    *_with_articles("a photo of * in the scene."),
    "a photo of one {name} in the scene.",
    *_with_articles("itap of *."),
    "itap of my {name}.",
    *_with_articles("a photo of *."),
    *_COUNTED,
    *_with_qualities("a ~ photo of *.", ("good", "bad", "bright", "dark", *_FLAWS)),
    *_with_articles("a photo of *.", ("nice", "cool", "weird", "small", "large", "clean", "dirty", "hard to see")),
    *_with_articles("*.", ("plastic", "toy", "plushie", "cartoon", "embroidered")),
    *_with_articles("a painting of *."),
)
_SIZES = ("small", "medium", "large")
_OVSAM = (
    "a photo of {a}.",
    "This is a photo of {a}",
    "There is {a} in the scene",
    "There is the {name} in the scene",
    "a photo of {a} in the scene",
    *(
        frame.replace("*", f"{{a:{size}}}")
        for frame in ("a photo of *.", "This is a photo of *.", "There is * in the scene.")
        for size in _SIZES
    ),
)

PROMPT_SETS: dict[str, PromptSet] = {
    "name": PromptSet(("{a}",), "Detic and CoDet, whose released embeddings have `a` in every case (`name:a`)"),
    "bare": PromptSet(("{name}",), "the name as it is"),
    "photo": PromptSet(("a photo of {a}",), "CLIP (Radford et al. 2021), section 3.1.4"),
    "colours": PromptSet(
        ("a photo of {a}", *(f"a photo of {{a:{colour}}}" for colour in COLOURS)),
        "ours, for the pictogram world: the mean over its colours",
    ),
    "imagenet": PromptSet(_IMAGENET, "CLIP's ImageNet notebook (Radford et al. 2021): 80 templates", "a"),
    "vild": PromptSet(_VILD, "ViLD (Gu et al. 2022), its public notebook: 63 templates"),
    "vild-this": PromptSet(
        tuple(f"This is {text}" if text.startswith(("a ", "{a", "the ")) else text for text in _VILD),
        "ViLD's notebook as it runs: `This is` before the 58 templates that start with an article",
    ),
    "ovsam": PromptSet(_OVSAM, "Open-Vocabulary SAM (Yuan et al. 2024): 14 templates of ViLD's kind", "a"),
}
"""Prompt sets by name. `NAME:a` and `NAME:an` change the article; a text with `{` is a custom set."""


@functools.lru_cache(maxsize=64)
def find_prompt_set(prompt_set: str) -> PromptSet:
    """The prompt set of a name, or of custom templates separated by `|`.

    Raises:
        InputError: the name is unknown, or a template has no field for a name.
    """
    if "{" in prompt_set:
        templates = tuple(part.strip() for part in prompt_set.split("|"))
        for template in templates:
            if not FIELD.search(template) or set("{}") & set(FIELD.sub("", template)):
                raise InputError(f"prompt {template!r}: expected {{a}}, {{a:word}} or {{name}} in every template")
        return PromptSet(templates, "custom")
    name, _, article = prompt_set.partition(":")
    if name not in PROMPT_SETS or article not in ("", "a", "an"):
        raise InputError(
            f"prompt set {prompt_set!r}: unknown, expected one of {', '.join(PROMPT_SETS)} "
            "(with :a or :an for the article), or templates with {name}, separated by |"
        )
    found = PROMPT_SETS[name]
    chosen: dict[str, Article] = {"": found.article, "a": "a", "an": "a/an"}
    return PromptSet(found.templates, found.source, chosen[article])


def prompts_of(name: str, prompt_set: str) -> list[str]:
    """The sentences of a name.

    Raises:
        InputError: the prompt set is unknown.
    """
    found = find_prompt_set(prompt_set)

    def put(field: re.Match[str]) -> str:
        return name if field[0] == "{name}" else with_article(name, field[1] or "", found.article)

    return [FIELD.sub(put, template) for template in found.templates]


# ------------------------------------------------------------------------------------------------ names of data sets


def clean_name(name: str) -> str:
    """A category's name as ViLD embeds it: `Bible_/_Holy_Book.` -> `bible or holy book`; parentheses stay."""
    spaced = re.sub(r"\s*/\s*", " or ", name.replace("_", " "))
    return " ".join(spaced.lower().split()).rstrip(".")


def split_synonyms(name: str) -> list[str]:
    """The synonyms in a category's name, by OV-SAM's rule: `bath_mat_or_rug` -> `bath mat`, `rug`."""
    parts = re.split(r"_or_|/|,", name.lower())
    return [cleaned for part in parts if (cleaned := " ".join(part.replace("_", " ").split()))]

"""Sentences that stand for a name when a text encoder embeds it, and how names of data sets are cleaned before.

A template holds `{a}` (the name behind its article), `{a:red}` (with a word between them) or `{name}` (the bare name).
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


@dataclass(frozen=True)
class PromptSet:
    """Templates that are averaged."""

    templates: tuple[str, ...]
    source: str
    """Where the wording comes from."""
    article: Article = "a/an"
    """Chosen by the next letter, or always `a`, as some released embeddings have it."""


def with_article(name: str, word: str = "", article: Article = "a/an") -> str:
    """`an anchor`, `a red anchor`."""
    phrase = f"{word} {name}".strip()
    return ("an " if article == "a/an" and phrase[:1].lower() in tuple("aeiou") else "a ") + phrase


def _one_and_the(frame: str, words: Iterable[str] = ("",)) -> tuple[str, ...]:
    """For each word, the frame about one thing and about a certain thing; `*` in the frame is where they stand."""
    things = [(f"{{a:{word}}}", f"the {word} {{name}}".replace("  ", " ")) for word in words]
    return tuple(frame.replace("*", thing) for pair in things for thing in pair)


def _pictures(frame: str, qualities: Iterable[str]) -> tuple[str, ...]:
    """`_one_and_the` of frames that a quality is put into, at `~`."""
    return tuple(template for quality in qualities for template in _one_and_the(frame.replace("~", quality)))


_DEPICTIONS = ("sculpture", "rendering", "tattoo", "drawing", "painting", "doodle", "sketch", "rendition")
_FLAWS = ("low resolution", "cropped", "close-up", "jpeg corrupted", "blurry", "pixelated", "black and white")
_COUNTED = ("a photo of my {name}.", "a photo of one {name}.", "a photo of many {name}.")

_IMAGENET = (
    *_pictures("a ~ of *.", _DEPICTIONS),
    *_pictures("~ of *.", ("art", "graffiti", "itap")),
    "itap of my {name}.",
    *_one_and_the("* in a video game."),
    *_one_and_the("a photo of *."),
    *_COUNTED,
    *_pictures("a ~ photo of *.", ("good", "bad", "bright", "dark", *_FLAWS)),
    *_one_and_the("a photo of *.", ("clean", "dirty", "nice", "cool", "weird", "small", "large", "hard to see")),
    *_one_and_the("*.", ("embroidered", "plastic", "origami", "toy", "plushie", "cartoon")),
)
_VILD = (
    *_one_and_the("There is * in the scene."),
    *_one_and_the("a photo of * in the scene."),
    "a photo of one {name} in the scene.",
    *_one_and_the("itap of *."),
    "itap of my {name}.",
    *_one_and_the("a photo of *."),
    *_COUNTED,
    *_pictures("a ~ photo of *.", ("good", "bad", "bright", "dark", *_FLAWS)),
    *_one_and_the("a photo of *.", ("nice", "cool", "weird", "small", "large", "clean", "dirty", "hard to see")),
    *_one_and_the("*.", ("plastic", "toy", "plushie", "cartoon", "embroidered")),
    *_one_and_the("a painting of *."),
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
        "ours, for the pictogram world: the mean over the colours that a thing may have",
    ),
    "imagenet": PromptSet(_IMAGENET, "CLIP's ImageNet notebook (Radford et al. 2021): 80 templates", "a"),
    "vild": PromptSet(_VILD, "ViLD (Gu et al. 2022), its public notebook: 63 templates"),
    "vild-this": PromptSet(
        tuple(f"This is {text}" if text.startswith(("a ", "{a", "the ")) else text for text in _VILD),
        "ViLD's notebook as it runs: `This is` before the 58 templates that start with an article",
    ),
    "ovsam": PromptSet(_OVSAM, "Open-Vocabulary SAM (Yuan et al. 2024): 14 templates of ViLD's kind", "a"),
}
"""Prompt sets by name. `NAME:a` and `NAME:an` change the article of any; a text with `{` is a set of its own."""


@functools.lru_cache(maxsize=64)
def find_prompt_set(prompt_set: str) -> PromptSet:
    """The set of a name, or of templates that are given themselves, separated by `|`.

    Raises:
        InputError: the name is unknown, or a template has no place for the name.
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
    """The sentences that stand for a name.

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
    """The synonyms that a category's name holds, by OV-SAM's rule: `bath_mat_or_rug` -> `bath mat`, `rug`."""
    parts = re.split(r"_or_|/|,", name.lower())
    return [cleaned for part in parts if (cleaned := " ".join(part.replace("_", " ").split()))]

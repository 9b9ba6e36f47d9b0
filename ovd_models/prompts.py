"""Sentences that stand for a name when a text encoder embeds it."""

from ovd_models.errors import InputError

COLOURS = ("red", "green", "blue", "orange", "purple", "brown", "black", "white")
PROMPT_SETS: dict[str, tuple[str, ...]] = {
    "name": ("{a}",),
    "photo": ("a photo of {a}",),
    "colours": ("a photo of {a}", *(f"a photo of {{a:{colour}}}" for colour in COLOURS)),
}
"""Templates by the name of the set: `{a}` is the name behind its article, `{a:red}` with a word between them.

`name` is the prompt of CoDet's and Detic's released embeddings (there with "a" in every case); `colours` averages
over the colours that a thing may have.
"""


def with_article(name: str, word: str = "") -> str:
    """`an anchor`, `a red anchor`."""
    phrase = f"{word} {name}".strip()
    return ("an " if phrase[:1].lower() in tuple("aeiou") else "a ") + phrase


class _Article:
    """Formats `{a}` and `{a:word}` of a template."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __format__(self, word: str) -> str:
        return with_article(self.name, word)


def prompts_of(name: str, prompt_set: str) -> list[str]:
    """The sentences that stand for a name.

    Raises:
        InputError: the prompt set is unknown.
    """
    if prompt_set not in PROMPT_SETS:
        raise InputError(f"prompt set {prompt_set!r}: unknown, expected one of {', '.join(PROMPT_SETS)}")
    return [template.format(a=_Article(name)) for template in PROMPT_SETS[prompt_set]]

"""What is not worth keeping: a list of pure functions, each named by its reason, and the cleaning of captions."""

import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.pairs.decode import Rejection, with_failures

TAG = re.compile(r"</?[a-zA-Z!][^<>]*>")
JOINERS = "\u200c\u200d"  # invisible, but part of words in several scripts
SPACES = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The limits of the filters."""

    min_side: int = 32
    """Shorter side of the image as found, in pixels."""
    max_aspect: float = 5.0
    """Longer side over shorter side."""
    min_contrast: float = 2.0
    """Standard deviation of the image reduced to 32 x 32, in grey levels of 255."""
    min_caption: int = 3
    """Characters of the cleaned caption."""
    max_caption: int = 1000
    min_letters: float = 0.5
    """Letters (of any script) as a share of the cleaned caption's characters, spaces left out."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What the filters look at: one decoded image and its cleaned caption."""

    width: int
    """As found, in pixels."""
    height: int
    contrast: float
    caption: str


def too_small(row: Candidate, config: FilterConfig) -> Rejection | None:
    """The shorter side is below `min_side`."""
    if min(row.width, row.height) < config.min_side:
        return Rejection("too_small", f"{row.width} x {row.height}, at least {config.min_side}")
    return None


def aspect(row: Candidate, config: FilterConfig) -> Rejection | None:
    """The image is longer than `max_aspect` times its shorter side."""
    if max(row.width, row.height) > config.max_aspect * min(row.width, row.height):
        return Rejection("aspect", f"{row.width} x {row.height}, at most {config.max_aspect:g} to 1")
    return None


def blank(row: Candidate, config: FilterConfig) -> Rejection | None:
    """The image shows (nearly) one colour."""
    if row.contrast < config.min_contrast:
        return Rejection("blank", f"contrast {row.contrast:.2f}, at least {config.min_contrast:g}")
    return None


def caption_length(row: Candidate, config: FilterConfig) -> Rejection | None:
    """The caption is too short or too long."""
    if not config.min_caption <= len(row.caption) <= config.max_caption:
        limits = f"{config.min_caption} to {config.max_caption}"
        return Rejection("caption_length", f"{len(row.caption)} characters, expected {limits}")
    return None


def caption_characters(row: Candidate, config: FilterConfig) -> Rejection | None:
    """Too few of the caption's characters are letters."""
    solid = row.caption.replace(" ", "")
    letters = sum(unicodedata.category(character)[0] in "LM" for character in solid)
    if letters < config.min_letters * len(solid):
        return Rejection("caption_characters", f"{letters} letters of {len(solid)} characters")
    return None


FILTERS: tuple[Callable[[Candidate, FilterConfig], Rejection | None], ...] = (
    too_small,
    aspect,
    blank,
    caption_length,
    caption_characters,
)
"""In order; the first that rejects a row gives its reason."""


def judge(row: Candidate, config: FilterConfig) -> Rejection | None:
    """None to keep a row, or why not."""
    for rejects in FILTERS:
        rejection = rejects(row, config)
        if rejection is not None:
            return rejection
    return None


def clean_caption(raw: str | None) -> str:
    """A caption as one line of plain text in NFC, without markup, control or bidirectional characters."""
    if not raw:
        return ""
    text = html.unescape(raw) if "&" in raw else raw
    if "<" in text:
        text = TAG.sub(" ", text)
    text = SPACES.sub(" ", text).strip()
    if text.isascii() and text.isprintable():
        return text
    text = "".join(letter for letter in text if letter in JOINERS or unicodedata.category(letter)[0] != "C")
    return SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()


def filter_rows(rows: pa.Table, config: FilterConfig) -> pa.Table:
    """Table rows of decoded images -> the same rows with the cleaned `caption`, or why they are not kept.

    What is not kept loses its `content`, but for the first row of each reason, which the report shows; the measure
    `contrast` has done its work and goes.
    """
    captions = [clean_caption(raw) for raw in rows["raw_caption"].to_pylist()]
    measures = (rows[name].to_pylist() for name in ("reason", "original_width", "original_height", "contrast"))
    failures = [
        judge(Candidate(width=width, height=height, contrast=contrast, caption=caption), config)
        if reason is None
        else None
        for reason, width, height, contrast, caption in zip(*measures, captions, strict=True)
    ]
    rows = with_failures(rows, "filter", failures)
    reasons = rows["reason"].to_pylist()
    shown = {reason: position for position, reason in reversed(list(enumerate(reasons)))}
    stays = [reason is None or shown[reason] == position for position, reason in enumerate(reasons)]
    content = pc.if_else(pa.array(stays, pa.bool_()), rows["content"], pa.scalar(None, pa.large_binary()))
    rows = rows.drop_columns(["contrast", "content"]).append_column("content", content)
    return rows.append_column("caption", pa.array(captions, pa.string()))

"""Filters of decoded images and their captions, and the cleaning of captions."""

import html
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.pairs.rows import Rejection, with_rejections

TAG = re.compile(
    r"<!--.*?-->|<!doctype[^<>]*>|</?[abipqsu](?:\s[^<>]*=[^<>]*)?\s*/?>|"
    r"</?(?:abbr|address|article|aside|big|blockquote|body|br|button|caption|center|cite|code|dd|del|div|dl|dt|em|embed|"
    r"figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|iframe|img|input|ins|label|li|link|main|mark|meta|"
    r"nav|noscript|object|ol|option|param|picture|pre|script|section|select|small|source|span|strike|strong|style|sub|"
    r"sup|svg|table|tbody|td|textarea|tfoot|th|thead|time|title|tr|tt|ul|video|wbr)(?=[\s/>])[^<>]*>",
    re.IGNORECASE | re.DOTALL,
)
"""HTML's elements and comments; other words in brackets are text: `<PERSON>`, `vector<int>`."""
JOINERS = "\u200c\u200d"  # invisible, but part of words in several scripts
SPACES = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The limits of the filters."""

    min_side: int = 32
    """Minimum shorter side of the fetched image in pixels."""
    max_aspect: float = 5.0
    """Maximum ratio of the longer to the shorter side."""
    min_contrast: float = 2.0
    """Minimum standard deviation of the image reduced to 32 x 32, in grey levels of 255."""
    min_caption: int = 3
    """Minimum characters of the cleaned caption."""
    max_caption: int = 1000
    min_letters: float = 0.5
    """Minimum share of letters (of any script) among the cleaned caption's characters, not counting spaces."""


def failed_filters(
    config: FilterConfig, *, width: int, height: int, contrast: float, caption: str
) -> Iterator[Rejection]:
    """The filters that an image (size in pixels as fetched) with its cleaned caption fails; the first one counts."""
    short, long = sorted((width, height))
    if short < config.min_side:
        yield Rejection("too_small", f"{width} x {height}, at least {config.min_side}")
    if long > config.max_aspect * short:
        yield Rejection("aspect", f"{width} x {height}, at most {config.max_aspect:g} to 1")
    if contrast < config.min_contrast:
        yield Rejection("blank", f"contrast {contrast:.2f}, at least {config.min_contrast:g}")
    length = len(caption)
    if not config.min_caption <= length <= config.max_caption:
        limits = f"{config.min_caption} to {config.max_caption}"
        yield Rejection("caption_length", f"{length} characters, expected {limits}")
    solid = caption.replace(" ", "")
    letters = sum(unicodedata.category(character)[0] in "LM" for character in solid)
    if letters < config.min_letters * len(solid):
        yield Rejection("caption_characters", f"{letters} letters of {len(solid)} characters")


def clean_caption(raw: str | None) -> str:
    """One line of plain text in NFC, without markup, control characters and bidirectional marks."""
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
    """Append the cleaned `caption` to rows of decoded images, and reject those that fail a filter.

    Drops `contrast`, and the `content` of rejected rows except the first of each reason, which the report shows.
    """
    captions = [clean_caption(raw) for raw in rows["raw_caption"].to_pylist()]
    measures = (rows[name].to_pylist() for name in ("reason", "original_width", "original_height", "contrast"))
    rejections = []
    for reason, width, height, contrast, caption in zip(*measures, captions, strict=True):
        failed = failed_filters(config, width=width, height=height, contrast=contrast, caption=caption)
        rejections.append(next(failed, None) if reason is None else None)
    rows = with_rejections(rows, "filter", rejections)
    reasons = rows["reason"].to_pylist()
    first = {reason: position for position, reason in reversed(list(enumerate(reasons)))}
    keeps = [reason is None or first[reason] == position for position, reason in enumerate(reasons)]
    content = pc.if_else(pa.array(keeps, pa.bool_()), rows["content"], pa.scalar(None, pa.large_binary()))
    rows = rows.drop_columns(["contrast", "content"]).append_column("content", content)
    return rows.append_column("caption", pa.array(captions, pa.string()))

"""What a web site permits crawlers: its robots.txt (RFC 9309), and headers that opt out or ask to wait."""

import email.utils
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from protego import Protego
from yarl import URL

from data_prep.pairs.addresses import NEGATIVE_SECONDS, FetchError, LookupCache, LookupResult

OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
VALUED_DIRECTIVES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
AGENT_NAME = re.compile(r"[a-z0-9_.*/-]+", re.ASCII)

MAX_BYTES = 500 << 10
"""Maximum bytes read of a robots.txt."""
MAX_RULES = 5_000
"""A site with more rules for us is skipped: each of its URLs would have to be checked against all of them."""
REMEMBERED_RULES = 100_000
"""Total weight of the rules of all sites; each site adds one."""
UNAVAILABLE_SECONDS = 600.0
"""How long a site is skipped if its server fails to return its robots.txt."""
AGENT_LINE = re.compile(r"\s*user[- ]?agent(?:\s*:|\s)\s*([^#]*)", re.IGNORECASE)
OTHER_LINE = re.compile(r"\s*(?:$|#|(?:site-?maps?|host)\s*:)", re.IGNORECASE)

HttpGet = Callable[[URL], Coroutine[Any, Any, tuple[int, bytes]]]
"""Gets a robots.txt: the final status and up to MAX_BYTES of the body; raises FetchError if there is no answer."""


@dataclass(frozen=True)
class Rules:
    """The rules of a site's robots.txt for us; by default none."""

    parsed: Protego | None = None
    closed: str | None = None
    """Why no URL of the site may be fetched."""


class Robots:
    """The robots.txt files of all sites met, each fetched once for all URLs that wait for it."""

    def __init__(self, user_agent: str, *, cache_seconds: float, retry_seconds: float, get: HttpGet) -> None:
        self._agent = product_token(user_agent)
        self._cache_seconds, self._retry_seconds = cache_seconds, retry_seconds
        self._get = get
        self._sites: LookupCache[Rules] = LookupCache(self._load, REMEMBERED_RULES)

    async def refusal(self, url: URL) -> str | None:
        """Why a URL may not be fetched, or None.

        Raises:
            FetchError: robots.txt could not be fetched; the URL fails in the same way.
        """
        rules = await self._sites.get(str(url.origin()))
        if rules.closed or rules.parsed is None or rules.parsed.can_fetch(str(url), self._agent):
            return rules.closed
        return "robots.txt disallows it"

    async def _load(self, origin: str) -> LookupResult[Rules]:
        try:
            status, body = await self._get(URL(origin) / "robots.txt")
        except FetchError as error:
            detail = f"robots.txt: {error.detail}"
            failure = FetchError(error.reason, detail, transient=error.transient, refusal=error.refusal)
            seconds = self._retry_seconds if error.transient or error.reason == "timeout" else NEGATIVE_SECONDS
            return LookupResult(value=failure, seconds=min(seconds, self._cache_seconds))
        if status >= 500:
            closed = Rules(closed=f"robots.txt answered {status}")
            return LookupResult(value=closed, seconds=min(UNAVAILABLE_SECONDS, self._cache_seconds))
        rules, weight = parse_rules(body if 200 <= status < 300 else b"", self._agent)
        return LookupResult(value=rules, seconds=self._cache_seconds, weight=1 + weight)


def product_token(user_agent: str) -> str:
    """The name of a crawler in robots.txt files: `ovd-ray` for `ovd-ray/0.1 (crawler)`."""
    return user_agent.partition("/")[0].strip().lower()


def parse_rules(content: bytes, agent: str) -> tuple[Rules, int]:
    """The rules for an agent, and their memory weight: the number of lines, or of 32-character units if larger."""
    lines = _lines_for(content[:MAX_BYTES].decode("utf-8-sig", errors="replace"), agent)
    if len(lines) > MAX_RULES:
        return Rules(closed=f"robots.txt has more than {MAX_RULES} lines for us"), 0
    text = "\n".join(lines)
    return Rules(Protego.parse(text) if lines else None), max(len(lines), len(text) // 32)


def _lines_for(text: str, agent: str) -> list[str]:
    """The lines of the groups for an agent or for all.

    The parser copies a group's lines for each of its agents: half a megabyte could grow to gigabytes.
    """
    kept: list[str] = []
    named: set[str] = set()
    in_names = False
    for line in text.splitlines():
        if OTHER_LINE.match(line):
            continue
        name = AGENT_LINE.match(line)
        if not name:
            in_names = False
            if named:
                kept.append(line)
            continue
        if not in_names:
            in_names, named = True, set()
        token = product_token(name[1])
        token = token.replace("*", "") or token
        if token in ("*", agent) and token not in named:
            named.add(token)
            kept.append(f"User-agent: {token}")
    return kept


def opt_out(robots_tags: Sequence[str], tdm_reservation: str, user_agent: str) -> str | None:
    """The header by which a site opts out of crawls like this one, or None.

    In the values of `X-Robots-Tag`, directives after an agent's name apply to that agent only: `otherbot: noindex,
    nofollow, ovd-ray: noai`. `tdm-reservation` is the W3C community group's text and data mining reservation.
    """
    for header in robots_tags:
        agent = "*"
        for part in header.lower().split(","):
            name, colon, directive = part.partition(":")
            if colon and name.strip() in VALUED_DIRECTIVES:
                continue
            if colon and AGENT_NAME.fullmatch(name.strip()):
                agent, part = product_token(name), directive
            if agent in ("*", product_token(user_agent)) and part.strip() in OPT_OUT_DIRECTIVES:
                return f"X-Robots-Tag: {header[:200]}"
    return "tdm-reservation: 1" if tdm_reservation.strip() == "1" else None


def retry_after(header: str) -> float:
    """Seconds that a `Retry-After` header (a number or a date) asks to wait; 0 if malformed."""
    if re.fullmatch(r"\d{1,9}", header.strip(), re.ASCII):
        return float(header)
    try:
        when = email.utils.parsedate_to_datetime(header)
        return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - time.time())
    except (ValueError, OverflowError):  # the latter for a year or a zone of many digits
        return 0.0

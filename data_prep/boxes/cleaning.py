"""Boxes cut to their image, and the account of what a check of a box set found."""

import collections
from collections.abc import Mapping, Sequence
from typing import Literal

from ovd_models.errors import InputError

MAX_PLACES = 3
"""Places that the report names for a reason."""
Fate = Literal["mended", "left out", "noted"]
"""What became of something odd: read as it was meant, not read, or read as it is."""
FATES: tuple[Fate, ...] = ("mended", "left out", "noted")


def clip_box(box: Sequence[float], width: int, height: int) -> tuple[list[float], str]:
    """An xyxy box cut to its image, and the reason to skip it, empty if there is none."""
    corners = zip(box, (width, height, width, height), strict=True)
    x0, y0, x1, y1 = clipped = [min(max(0.0, value), float(edge)) for value, edge in corners]
    if not (box[2] > box[0] and box[3] > box[1]):
        return clipped, "boxes without area"
    return clipped, "" if x1 > x0 and y1 > y0 else "boxes outside their image"


class SkipReport:
    """Counts of skipped annotations by reason, and the first places of each."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self._places: dict[str, dict[str, None]] = collections.defaultdict(dict)  # distinct, one more than is named

    def add(self, reason: str, place: str) -> None:
        """Count one skipped annotation."""
        self.counts[reason] += 1
        if len(self._places[reason]) <= MAX_PLACES:
            self._places[reason][place] = None

    def places(self, reason: str) -> list[str]:
        """The first places of a reason."""
        return list(self._places[reason])[:MAX_PLACES]

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """As "2 boxes of other categories (category 99 in a.jpg), 1 crowds (b.jpg)"."""
        parts = []
        for reason, count in self.counts.items():
            more = ["..."] if len(self._places[reason]) > MAX_PLACES else []
            parts.append(f"{count:,} {reason} ({', '.join([*self.places(reason), *more])})")
        return ", ".join(parts)


class Account:
    """What is odd about a box set: counted by kind, with the first places of each."""

    def __init__(self, origin: str) -> None:
        """Start the account of an annotation file."""
        self.origin = origin
        self.reports: Mapping[Fate, SkipReport] = {fate: SkipReport() for fate in FATES}

    def add(self, fate: Fate, kind: str, place: str) -> None:
        """Count one of a kind, such as "boxes without area"."""
        self.reports[fate].add(kind, place)

    def __bool__(self) -> bool:
        return any(self.reports.values())

    def print(self) -> None:
        """One line for each fate that something had."""
        for fate, report in self.reports.items():
            if report:
                print(f"{self.origin}: {fate}: {report}", flush=True)

    def check_strict(self) -> None:
        """Raise InputError if anything was odd."""
        if self:
            found = "; ".join(f"{fate}: {report}" for fate, report in self.reports.items() if report)
            raise InputError(f"{self.origin}: --strict: {found}")

    def to_rows(self) -> list[dict[str, str | int]]:
        """For a manifest or a page: `file`, `fate`, `kind`, `count` and `examples`."""
        return [
            {
                "file": self.origin,
                "fate": fate,
                "kind": kind,
                "count": count,
                "examples": ", ".join(report.places(kind)),
            }
            for fate, report in self.reports.items()
            for kind, count in report.counts.items()
        ]

"""Boxes cut to their image, and a report of the annotations that were skipped."""

import collections
from collections.abc import Sequence

MAX_PLACES = 3
"""Places that the report names for a reason."""


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

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """As "2 boxes of other categories (category 99 in a.jpg), 1 crowds (b.jpg)"."""
        parts = []
        for reason, count in self.counts.items():
            places = list(self._places[reason])
            named = ", ".join([*places[:MAX_PLACES], *(["..."] if len(places) > MAX_PLACES else [])])
            parts.append(f"{count:,} {reason} ({named})")
        return ", ".join(parts)

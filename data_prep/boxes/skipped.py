"""What a reader of annotations leaves out: counted by reason, with the first places."""

import collections
from dataclasses import dataclass, field

PLACES = 3
"""Of a reason, that a message names."""


@dataclass
class SkippedRows:
    """Counts and places by reason."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    """The first ones, and one more where there are more."""

    def add(self, reason: str, place: str) -> None:
        """Note one."""
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if place not in places and len(places) <= PLACES:
            places.append(place)

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self.counts)

    def __str__(self) -> str:
        """As "2 boxes of other categories (category 99 in a.jpg), 1 crowds (b.jpg)"."""
        parts = []
        for reason, count in self.counts.items():
            places = self.places[reason]
            more = ", ..." if len(places) > PLACES else ""
            parts.append(f"{count:,} {reason} ({', '.join(places[:PLACES])}{more})")
        return ", ".join(parts)

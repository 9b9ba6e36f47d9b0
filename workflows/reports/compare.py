"""Evaluations side by side: differences with paired intervals, names that gained and lost, pictures.

Paired: in each draw of the bootstrap, all are evaluated on the same images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ovd_models.metrics.explanation import image_scores
from ovd_models.metrics.matching import average_precisions, interval, mean_of
from ovd_models.metrics.protocols import Measured, Protocol
from workflows.reports.explanation import Explained, ReadImage, draw_annotated, draw_predicted
from workflows.reports.page import render_page

NUM_NAMES, NUM_PICTURES = 12, 8


@dataclass(frozen=True)
class Entry:
    """One of the evaluations."""

    name: str
    explained: Explained
    measured: Measured
    settings: Mapping[str, Any]
    """Of its training, under dotted names; empty for files of predictions."""


@dataclass(frozen=True)
class Difference:
    """How much better an evaluation is than the first one, in a group of names."""

    name: str
    """Such as `AP50 novel`."""
    first: float
    own: float
    low: float
    """Of the 95 % interval of their difference."""
    high: float

    @property
    def difference(self) -> float:
        """Own minus first."""
        return self.own - self.first

    @property
    def verdict(self) -> str:
        """Whether the interval excludes zero."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no clear difference"


@dataclass(frozen=True)
class Compared:
    """Evaluations of one set."""

    entries: Sequence[Entry]
    differences: Sequence[Sequence[Difference]]
    """Of each evaluation but the first."""
    names: Sequence[Sequence[tuple[str, float, float]]]
    """Of each but the first: each name's AP50 in the first one and its own, greatest gain first."""

    def to_json(self) -> dict[str, Any]:
        """The differences by evaluation and group."""
        return {
            "first": self.entries[0].name,
            "others": {
                entry.name: {
                    row.name: {"first": row.first, "own": row.own, "difference": row.difference, "low": row.low,
                               "high": row.high}
                    for row in rows
                }
                for entry, rows in zip(self.entries[1:], self.differences, strict=True)
            },
        }  # fmt: skip


def compare(entries: Sequence[Entry]) -> Compared:
    """Compare all with the first one."""
    aps = [average_precisions(entry.explained.truth, entry.explained.matches) for entry in entries]
    first = entries[0].explained
    differences = []
    names = []
    for entry, ap_TK in zip(entries[1:], aps[1:], strict=True):
        rows = []
        for group, chosen in first.groups.items():
            for name, values in (("AP50", (aps[0][:1], ap_TK[:1])), ("AP", (aps[0], ap_TK))):
                one, two = (mean_of(value[:, chosen]) for value in values)
                key = f"{name} {group}"
                draws = entry.explained.draws[key] - first.draws[key]
                if np.isfinite(one) and np.isfinite(two):
                    rows.append(Difference(key, one, two, *interval(draws, two - one)))
        differences.append(rows)
        changes = [
            (name, float(one), float(two))
            for name, one, two in zip(first.truth.names, aps[0][0], ap_TK[0], strict=True)
            if np.isfinite(one)
        ]
        names.append(sorted(changes, key=lambda row: row[1] - row[2]))
    return Compared(entries, differences, names)


def console_table(compared: Compared) -> str:
    """The differences for the console."""
    lines = []
    for entry, rows in zip(compared.entries[1:], compared.differences, strict=True):
        lines.append(f"{entry.name} against {compared.entries[0].name}")
        lines += [
            f"  {row.name:16}{row.first:8.3f} -> {row.own:.3f}  {row.difference:+.3f} "
            f"[{row.low:+.3f}, {row.high:+.3f}]  {row.verdict}"
            for row in rows
        ]
    return "\n".join(lines)


def changed_settings(entries: Sequence[Entry]) -> list[tuple[str, list[Any]]]:
    """Settings that differ between trainings, of those that all of them have, but not where they lie."""
    known = [entry.settings for entry in entries if entry.settings]
    keys = [key for key in (known[0] if known else {}) if all(key in own for own in known)]
    rows = [
        (key, [entry.settings.get(key, "–") for entry in entries]) for key in keys if key not in ("storage", "resume")
    ]
    return [(key, values) for key, values in rows if len({str(own[key]) for own in known}) > 1]


def render(compared: Compared, *, title: str, subject: str, protocol: Protocol, read: ReadImage | None) -> str:
    """The page as HTML; without `read`, it has no pictures."""
    names = []
    for rows in compared.names:
        gained = [row for row in rows if row[2] > row[1]][:NUM_NAMES]
        lost = [row for row in reversed(rows) if row[2] < row[1]][:NUM_NAMES]
        names.append({"gained": gained, "lost": lost})
    values: dict[str, Any] = {
        "title": title,
        "subject": subject,
        "protocol": protocol,
        "images": len(compared.entries[0].explained.truth.image_ids),
        "entries": compared.entries,
        "differences": compared.differences,
        "names": names,
        "settings": changed_settings(compared.entries),
        "numbers": [
            (name, [entry.measured.numbers[name] for entry in compared.entries])
            for name in compared.entries[0].measured.numbers
        ],
        "pictures": [] if read is None else draw_differences(compared, read),
    }
    return render_page("compare", values)


def draw_differences(compared: Compared, read: ReadImage) -> list[dict[str, Any]]:
    """The images whose F1 differs most between any two, each annotated and as all predict it."""
    scores = [
        image_scores(entry.explained.truth, entry.explained.matches, entry.explained.calibration.threshold)[0]
        for entry in compared.entries
    ]
    f1 = np.stack(scores)
    spread = np.nan_to_num(f1.max(0) - f1.min(0), nan=0.0)
    drawn: list[dict[str, Any]] = []
    for number in np.argsort(-spread, kind="stable").tolist():
        if len(drawn) == NUM_PICTURES or not spread[number]:
            break
        image = read(number)
        if image is None:
            continue
        pictures: list[tuple[str, Image.Image]] = [
            ("annotated", draw_annotated(compared.entries[0].explained, number, image))
        ]
        for entry, score in zip(compared.entries, f1[:, number].tolist(), strict=True):
            caption = f"{entry.name}: F1 {score:.2f}"
            pictures.append((caption, draw_predicted(entry.explained, number, image)))
        drawn.append({"pictures": pictures})
    return drawn

"""Pairs report: what a crawl kept, what it rejected and why, and the concepts of its captions, on one page.

pairs, rejects, concepts, groups --streamed--> counts, histograms, co-occurrence
   | range reads of the shards
   v
reports/pairs-<name>.html: one file without scripts or external resources

python workflows/pairs_report.py --storage store --name mine
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage name")

from collections.abc import Callable
from dataclasses import dataclass

from workflows.common import cli
from workflows.reports.pairs import write_pairs_report


@dataclass(frozen=True, kw_only=True)
class Run:
    """One report."""

    storage: str = "store"
    """Folder or URI of all tables."""
    name: str
    """Name of the tables."""


def smoke() -> Run:
    """The crawl of `prepare_pairs.py --config smoke`; use `--name` for another one."""
    return Run(name="smoke")


CONFIGS: dict[str, Callable[[], Run]] = {"smoke": smoke}


def main() -> None:
    """Write the report and print its path."""
    run = cli.parse(CONFIGS, __doc__)
    print(f"report: {write_pairs_report(run.storage, run.name)}")


if __name__ == "__main__":
    cli.execute(main)

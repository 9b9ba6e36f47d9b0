"""Every claim of the papers, measured on the pictogram world and judged over seeds, on one page.

claims x seeds --what is not recorded yet: train, measure--> docs/claims/*.json --> docs/claims.md, .json, plots

A killed run continues: finished results are files, finished trainings are reused and unfinished ones resume. Seeds are
outermost, so that each claim has one seed before any has two.

python workflows/claims.py                             # all claims, three seeds or more each
python workflows/claims.py --claims 10 12 --seeds 0
python workflows/claims.py --render                    # the page from the recorded results
python workflows/claims.py --check                     # measure one recorded claim again and compare
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "claims seeds render check demo results storage")

import time
from dataclasses import dataclass
from pathlib import Path

from data_prep import storage
from ovd_models.errors import InputError
from workflows.common import cli
from workflows.studies.claims import parts, teachers
from workflows.studies.claims.catalogue import CHEAP_FIRST, PARTS
from workflows.studies.claims.page import write_page
from workflows.studies.claims.parts import Part, Record

CHECKED = (2,)
"""Claims that train without a CLIP, in minutes; `--check` takes the first one that is recorded."""
TOLERANCE = 0.05
"""Largest difference of a metric when a claim is measured again, on another machine or with other threads."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the claims."""

    storage: str = "runs/claims"
    """Folder that holds tables and runs."""
    demo: str = "runs/demo"
    """Storage with a CLIP of `clip.py --config pictograms`, which is then that of seed 0; else one is trained."""
    results: str = "docs/claims"
    """Folder of the recorded results; the page is beside it."""
    claims: tuple[int, ...] = ()
    """Numbers of the claims to measure; all if empty."""
    seeds: tuple[int, ...] = ()
    """Seeds of all trainings; if empty, each claim has its own number. Every claim has one seed before any has two."""
    render: bool = False
    """Only render the page from the recorded results."""
    check: bool = False
    """Only measure one cheap recorded claim again, with its first seed, and compare."""


CONFIGS = {"default": Run}


def chosen_parts(run: Run) -> list[Part]:
    """The parts to measure, cheap ones first.

    Raises:
        InputError: a claim is unknown.
    """
    for number in run.claims:
        if number not in PARTS:
            raise InputError(f"--claims {number}: unknown, expected 1 to {max(PARTS)}")
    return [PARTS[number] for number in CHEAP_FIRST if number in (run.claims or CHEAP_FIRST)]


def read_records(run: Run) -> dict[int, list[Record]]:
    """The recorded results of all claims, in the order of their seeds.

    Raises:
        InputError: a file is malformed or was measured with other settings.
    """
    found: dict[int, list[Record]] = {}
    for number, part in PARTS.items():
        endings = [path.stem.split("-")[1] for path in Path(run.results).glob(f"{number:02}-*.json")]
        seeds = sorted(int(ending) for ending in endings if ending.isdigit())
        records = [parts.read_record(run.results, part, seed) for seed in seeds]
        found[number] = [record for record in records if record is not None]
    return found


def render(run: Run) -> None:
    """Write the page from the recorded results."""
    records = read_records(run)
    write_page([parts.judge(part, records[number]) for number, part in PARTS.items()], run.results)


def plan(run: Run, records: dict[int, list[Record]]) -> list[tuple[Part, int]]:
    """What remains, one seed of every claim before the next; prints it with the recorded hours."""
    done = {(number, record.seed) for number, of in records.items() for record in of}
    chosen = chosen_parts(run)
    wanted = [
        (part, seed)
        for seed in run.seeds or range(max(part.seeds for part in chosen))
        for part in chosen
        if run.seeds or seed < part.seeds
    ]
    remaining = [(part, seed) for part, seed in wanted if (part.number, seed) not in done]
    seconds = [record.seconds for of in records.values() for record in of]
    print(f"recorded: {len(done)} results in {sum(seconds) / 3600:.2f} h")
    known, unknown = 0.0, 0
    for part, _ in remaining:
        of = [record.seconds for record in records[part.number]]
        known, unknown = known + (sum(of) / len(of) if of else 0.0), unknown + (not of)
    estimate = f"about {known / 3600:.2f} h" + (f" and {unknown} not measured before" if unknown else "")
    print(f"remaining: {len(remaining)} results, {estimate}")
    for part, seed in remaining:
        print(f"  claim {part.number}, seed {seed}")
    return remaining


def check(run: Run, records: dict[int, list[Record]]) -> bool:
    """Measure a cheap recorded claim again in an empty storage, and print both results; whether they agree.

    Raises:
        InputError: none of the cheap claims is recorded.
    """
    numbers = [number for number in CHECKED if records[number] and number in (run.claims or CHECKED)]
    if not numbers:
        raise InputError(f"--check: no result of claims {CHECKED} in {run.results}, expected one of them")
    before = records[numbers[0]][0]
    place = storage.join(run.storage, "check")
    storage.remove_folder(place)
    now = parts.measure(PARTS[numbers[0]], before.seed, place, "")
    largest = 0.0
    for variant, metrics in before.results.items():
        for name, value in metrics.items():
            again = now.results[variant][name]
            largest = max(largest, abs(again - value))
            print(f"{variant:28}{name:16}{value:8.3f}{again:8.3f}{again - value:+8.3f}")
    print(f"claim {before.claim}, seed {before.seed}: largest difference {largest:.3f}, allowed {TOLERANCE}")
    return largest <= TOLERANCE


def main() -> None:
    """Print what is recorded and what remains, measure it, and render the page after each result."""
    run = cli.parse(CONFIGS, __doc__)
    chosen_parts(run)
    records = read_records(run)
    if run.check:
        if not check(run, records):
            raise SystemExit(1)
        return
    if run.render:
        render(run)
        print(f"page: {run.results}.md")
        return
    teacher = teachers.find_demo_teacher(run.demo)
    print(f"CLIP of seed 0: {teacher or 'is trained'}")
    for part, seed in plan(run, records):
        print(f"== claim {part.number}, seed {seed}: {time.strftime('%H:%M:%S')}", flush=True)
        record = parts.measure(part, seed, run.storage, teacher)
        parts.draw(part, seed, run.storage, teacher, run.results)
        print(f"recorded: {parts.write_record(run.results, record)}", flush=True)
        render(run)
    render(run)
    print(f"page: {run.results}.md")


if __name__ == "__main__":
    cli.execute(main)

"""The page of all claims: Markdown, JSON and a plot of each, from the recorded results alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure

from workflows.studies import study as studies
from workflows.studies.claims.parts import Verdict
from workflows.studies.study import ClaimResult

TITLE = """# The papers' claims, measured again

`make claims` measures each claim of the three papers on the [pictogram world](walkthrough.md), with seeds 0, 1 and 2,
and renders this page from the results in `docs/claims/`. Results with other settings are refused, not mixed.

```
make claims                                             # prints what is recorded and what remains, then measures it
python workflows/claims.py --claims 10 12 --seeds 0     # some claims, some seeds
python workflows/claims.py --render                     # the page alone, in seconds
python workflows/claims.py --check                      # measures one cheap claim again and compares
```

Intervals are 95 % intervals of the mean over seeds (Student's t); differences are paired by seed. A claim *holds* if
every line of its rule does: the whole interval (or, where the rule says so, the mean) is within the bounds. With one
seed there is no interval, and the claim is *undecided*. A paper's value with a star is recalled and was not checked
against the paper's text.
"""
WORDS = ("holds", "does not hold", "undecided", "not measured", "no command yet")


def verdict_word(verdict: Verdict) -> str:
    """The claim's state in a word or two."""
    if not verdict.records:
        return "not measured" if verdict.part.measure else "no command yet"
    return {True: "holds", False: "does not hold", None: "undecided"}[verdict.holds]


def number_of(judged: ClaimResult) -> str:
    """The mean with its interval."""
    interval = " ({:+.3f} to {:+.3f})".format(*judged.interval) if judged.interval else ""
    return f"{judged.mean:+.3f}{interval}"


def render_markdown(verdicts: Sequence[Verdict]) -> str:
    """The page."""
    words = [verdict_word(verdict) for verdict in verdicts]
    counts = ", ".join(f"{words.count(word)} {word}" for word in WORDS)
    seconds = sum(record.seconds for verdict in verdicts for record in verdict.records)
    cpu = sum(record.cpu_seconds for verdict in verdicts for record in verdict.records)
    rows = [["", "claim", "headline", "mean, interval", "seeds", ""]]
    for verdict, word in zip(verdicts, words, strict=True):
        first = verdict.judged[0] if verdict.judged else None
        rows.append([
            f"[{verdict.part.number}](#claim-{verdict.part.number})",
            verdict.part.statement,
            first.claim.statement if first else "",
            number_of(first) if first else "",
            str(len(verdict.seeds) or ""),
            word,
        ])  # fmt: skip
    summary = (
        f"Claims: {counts}. The recorded results took {cpu / 3600:.2f} CPU-hours and {seconds / 3600:.1f} h of wall "
        "time on a shared machine, without attempts that were killed and without the demo, whose CLIP is that of seed "
        "0."
    )
    sections = [line for verdict in verdicts for line in section(verdict)]
    return "\n".join([TITLE, summary, "", *studies.table(rows), *sections]).rstrip() + "\n"


def section(verdict: Verdict) -> list[str]:
    """One claim in Markdown."""
    part, seeds = verdict.part, ", ".join(map(str, verdict.seeds))
    lines = [f'## <a id="claim-{part.number}"></a>Claim {part.number}: {verdict_word(verdict)}', "", part.statement, ""]
    lines += [*(f"- Paper: {text}." for text in part.paper), f"- Schedule: {part.schedule}"]
    lines += [f"- {part.remark}"] if part.remark else []
    if not verdict.records:
        return [*lines, ""]
    spent = ", ".join(f"{record.seconds / 60:.1f}" for record in verdict.records)
    lines += [f"- Seeds: {seeds} ({spent} minutes).", "", *studies.claim_table(verdict.judged)]
    lines += studies.metric_table(verdict.results, "", part.columns or {}, each=part.claims[0].metric)
    lines += [f"![claim {part.number}](claims/{part.number:02}.png)", ""]
    return [*lines, f"![{part.picture_text}](claims/{part.number:02}.jpg)", ""] if part.picture else lines


def render_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The content of `docs/claims.json`."""
    records = [record for verdict in verdicts for record in verdict.records]
    newest = max(records, key=lambda record: record.measured, default=None)
    claims = []
    for verdict in verdicts:
        first = verdict.judged[0] if verdict.judged else None
        claims.append({
            "id": verdict.part.number,
            "statement": verdict.part.statement,
            "paper": list(verdict.part.paper),
            "ours": first.mean if first else None,
            "interval": first.interval if first else None,
            "seeds": verdict.seeds,
            "holds": verdict.holds,
            "rule": [
                {"statement": judged.claim.statement, "baseline": judged.baseline, "mean": judged.mean,
                 "interval": judged.interval, "by_seed": judged.ours, "holds": judged.holds and len(judged.ours) > 1}
                for judged in verdict.judged
            ],
        })  # fmt: skip
    return {"commit": newest.commit if newest else "", "claims": claims}


def draw(verdict: Verdict) -> matplotlib.figure.Figure:
    """The rule's metrics, or the table's first two, of every variant: a dot for each seed and a bar at the mean."""
    every, results = verdict.part.columns or {}, verdict.results
    metrics = [metric for metric in every.values() if any(metric == claim.metric for claim in verdict.part.claims)]
    metrics = list(dict.fromkeys([*metrics, *every.values()]))[:2]
    columns = [(header, metric) for metric in metrics for header, own in every.items() if own == metric]
    figure = matplotlib.figure.Figure(figsize=(9, 1.2 + 0.3 * len(results)))
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, (header, metric) in zip(axes, columns, strict=True):
        for row, result in enumerate(results.values()):
            if result.has([metric]):
                values = result.values(metric)
                axis.barh(row, result.mean(metric), color="#cfd8e8", height=0.6)
                axis.plot(values, [row] * len(values), "o", color="#24508f", markersize=4)
        axis.set(xlabel=header, yticks=range(len(results)), yticklabels=list(results))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    return figure


def write_page(verdicts: Sequence[Verdict], results: str) -> None:
    """Write `<results>.md`, `<results>.json` and a plot of each measured claim into `<results>/`."""
    for verdict in verdicts:
        if verdict.records and verdict.part.columns:
            figure = draw(verdict)
            # Without the version of matplotlib, so that a rendering elsewhere gives the same bytes.
            path = Path(results, f"{verdict.part.number:02}.png")
            figure.savefig(path, dpi=90, bbox_inches="tight", metadata={"Software": None})
    Path(f"{results}.md").write_text(render_markdown(verdicts))
    Path(f"{results}.json").write_text(json.dumps(render_json(verdicts), indent=1) + "\n")

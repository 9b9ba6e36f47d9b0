"""The page of all claims: Markdown, JSON and a plot of each, from the recorded results alone."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes

from workflows.studies import study as studies
from workflows.studies.claims.parts import Verdict
from workflows.studies.study import ClaimResult, Results

TITLE = """# The papers' claims, measured again

`make claims` measures each claim of the three papers on the [pictogram world](walkthrough.md), and renders this page
from the results in `docs/claims/`. A claim has three seeds, or five where the means of three were within the bounds but
an interval was not: with three alone, these claims do not hold, and seeds that are added after a look at the first make
an interval somewhat too narrow. Results with other settings are refused, not mixed.

```
make claims                                          # what is not recorded yet
python workflows/claims.py --claims 10 12 --seeds 0  # some claims, some seeds
python workflows/claims.py --render                  # this page alone, in seconds
python workflows/claims.py --check                   # one claim again, compared
```

Intervals are 95 % intervals of the mean over seeds (Student's t); differences are paired by seed. A claim *holds* if
every line of its rule does: the whole interval (or, where the rule says so, the mean) is within the bounds. It is
*undecided* until all its seeds are measured. *Over images* is a bootstrap: the 95 % interval of the mean if
the evaluation images were others, with the same trainings; seeds whose draws are not recorded are left out. A paper's
value with a star is recalled and was not checked against the paper's text.
"""
BLUE = "#24508f"
PLURALS = {"holds": "hold", "does not hold": "do not hold", "undecided": "undecided", "not measured": "not measured"}


def verdict_word(verdict: Verdict) -> str:
    """The claim's state in a word or two."""
    if not verdict.records:
        return "not measured"
    return {True: "holds", False: "does not hold", None: "undecided"}[verdict.holds]


def headline(verdict: Verdict) -> str:
    """The first line of the rule with its mean and interval; empty if it is not measured."""
    if not verdict.judged:
        return ""
    first = verdict.judged[0]
    interval = f" ({studies.format_interval(first.interval)})" if first.interval else ""
    return f"{first.claim.statement}: **{first.mean:+.3f}**{interval}"


def render_markdown(verdicts: Sequence[Verdict]) -> str:
    """The page."""
    words = [verdict_word(verdict) for verdict in verdicts]
    counts = ", ".join(f"{words.count(word)} {plural}" for word, plural in PLURALS.items())
    seconds = sum(record.seconds for verdict in verdicts for record in verdict.records)
    cpu = sum(record.cpu_seconds for verdict in verdicts for record in verdict.records)
    rows = [["claim", "headline: mean (95 % interval)", "state"]]
    for verdict, word in zip(verdicts, words, strict=True):
        number, count = verdict.part.number, len(verdict.seeds)
        more = f" of {verdict.part.seeds}" if count < verdict.part.seeds else ""
        seeds = f", {count}{more} seed{'s' if count > 1 or more else ''}" if count else ""
        rows.append([f"[{number}](#claim-{number}). {verdict.part.statement}", headline(verdict), word + seeds])
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
    lines += [f"- Seeds: {seeds} ({spent} minutes).", "", *rule_table(verdict), *result_table(verdict)]
    lines += [f"![claim {part.number}](claims/{part.number:02}.png)", ""]
    return [*lines, f"![{part.picture_text}](claims/{part.number:02}.jpg)", ""] if part.picture else lines


def rule_table(verdict: Verdict) -> list[str]:
    """Every line of the rule with its intervals; few columns, since a page is narrow."""
    rows = [["rule", "mean", "over seeds", "over images", "holds"]]
    for judged in verdict.judged:
        claim, images = judged.claim, verdict.interval_over_images(judged)
        paper = "" if claim.paper is None else f"; paper {claim.paper:+.3f}, {claim.source}"
        text = f"{studies.statement(judged)} ({studies.requirement(claim)}{paper})"
        ends = [studies.format_interval(interval) if interval else "" for interval in (judged.interval, images)]
        rows.append([text, f"{judged.mean:+.3f}", *ends, studies.outcome(judged)])
    return studies.table(rows)


def result_table(verdict: Verdict) -> list[str]:
    """Means over seeds of every variant, blank where a metric is not measured; the headline's metric also by seed."""
    columns, first = verdict.part.columns, verdict.part.claims[0].metric
    rows = [["", *columns, "each seed"]]
    for variant, result in verdict.results.items():
        means = [f"{result.mean(metric):.3f}" if result.has([metric]) else "" for metric in columns.values()]
        if any(means):
            each = [f"{value:.3f}" for value in result.values(first)] if result.has([first]) else []
            rows.append([variant, *means, ", ".join(each)])
    return studies.table(rows)


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
            "interval_over_images": verdict.interval_over_images(first) if first else None,
            "seeds": verdict.seeds,
            "holds": verdict.holds,
            "rule": [rule_line(verdict, judged) for judged in verdict.judged],
        })  # fmt: skip
    return {"commit": newest.commit if newest else "", "claims": claims}


def rule_line(verdict: Verdict, judged: ClaimResult) -> dict[str, Any]:
    """A line of the rule as JSON."""
    return {
        "statement": judged.claim.statement,
        "baseline": judged.baseline,
        "mean": judged.mean,
        "interval": judged.interval,
        "interval_over_images": verdict.interval_over_images(judged),
        "by_seed": judged.ours,
        "holds": judged.holds and len(judged.ours) > 1,
    }


def draw(verdict: Verdict) -> matplotlib.figure.Figure:
    """Above, the rule's metrics, or the table's first two, of every variant; below, the rule."""
    every, results = verdict.part.columns, verdict.results
    metrics = [metric for metric in every.values() if any(metric == claim.metric for claim in verdict.part.claims)]
    metrics = list(dict.fromkeys([*metrics, *every.values()]))[:2]
    columns = [(header, metric) for metric in metrics for header, own in every.items() if own == metric]
    shown = {name: result for name, result in results.items() if any(result.has([metric]) for metric in metrics)}
    heights = (1.0 + 0.3 * len(shown), 0.4 + 0.6 * len(verdict.judged))
    figure = matplotlib.figure.Figure(figsize=(9, sum(heights)), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=heights)
    upper, lower = halves
    axes = upper.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, (header, metric) in zip(axes, columns, strict=True):
        draw_metric(axis, shown, metric)
        axis.set(xlabel=header, yticks=range(len(shown)), yticklabels=list(shown))
    axes[0].invert_yaxis()
    for row, judged in enumerate(verdict.judged):
        axis = lower.add_subplot(len(verdict.judged), 1, row + 1)
        draw_line(axis, judged)
        if row + 1 == len(verdict.judged):
            axis.set_xlabel("measured (diamond: mean; line: 95 % interval over seeds) and allowed (green)", fontsize=9)
    return figure


def draw_metric(axis: Axes, results: Results, metric: str) -> None:
    """A bar at the mean of every variant, with a dot for each seed and the mean as a number."""
    for row, result in enumerate(results.values()):
        if result.has([metric]):
            mean, values = result.mean(metric), result.values(metric)
            axis.barh(row, mean, color="#cfd8e8", height=0.6)
            axis.plot(values, [row] * len(values), "o", color=BLUE, markersize=4, clip_on=False)
            axis.annotate(
                f"{mean:.3f}", (max(mean, *values), row), (7, 0), textcoords="offset points", va="center", fontsize=8
            )
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def draw_line(axis: Axes, judged: ClaimResult) -> None:
    """A line of the rule: mean and interval over seeds, a dot for each seed, and what is allowed in green."""
    claim, values = judged.claim, list(judged.ours.values())
    ends = judged.interval or (judged.mean, judged.mean)
    bounds = [bound for bound in (claim.at_least, claim.at_most) if bound is not None]
    low, high = min(*ends, *values, *bounds), max(*ends, *values, *bounds)
    margin = 0.08 * (high - low) + 0.005
    axis.set(xlim=(low - margin, high + margin), ylim=(-1, 1), yticks=[0])
    axis.set_yticklabels(["\n".join(textwrap.wrap(claim.statement.replace("`", ""), 48))], fontsize=8)
    axis.axvspan(claim.at_least, high + margin if claim.at_most is None else claim.at_most, color="#dcefdc")
    axis.plot(ends, (0, 0), color=BLUE, linewidth=2)
    axis.plot(values, [0] * len(values), "o", color=BLUE, markersize=4)
    axis.plot(judged.mean, 0, "D", color="black", markersize=6)
    axis.annotate(f"{judged.mean:+.3f}", (judged.mean, 0), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def write_page(verdicts: Sequence[Verdict], results: str) -> None:
    """Write `<results>.md`, `<results>.json` and a plot of each measured claim into `<results>/`."""
    for verdict in verdicts:
        if verdict.records:
            figure = draw(verdict)
            # Without the version of matplotlib, so that a rendering elsewhere gives the same bytes.
            path = Path(results, f"{verdict.part.number:02}.png")
            figure.savefig(path, dpi=90, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    Path(f"{results}.md").write_text(render_markdown(verdicts))
    Path(f"{results}.json").write_text(json.dumps(render_json(verdicts), indent=1) + "\n")

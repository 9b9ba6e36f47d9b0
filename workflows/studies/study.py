"""What the studies share: results that are remembered, paired differences with intervals, tables."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import storage
from workflows.common import cli

QUANTILE_95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Of Student's t with 0, 1, ... degrees of freedom."""
Numbers = dict[str, float]
Results = Mapping[str, Mapping[int, Numbers]]
"""What was measured, by what it was measured on and by seed."""
Claims = Mapping[str, tuple[str, str, str]]
"""Claim -> metric, and what is compared with what."""


def label_of(seed: int, name: str, own: Any) -> str:
    """The name of one training of a study; it changes with any of its settings but the storage."""
    return f"study-{seed}-{name}-{cli.config_hash(dataclasses.replace(own, storage=''))[:8]}"


def remembered(storage_uri: str, study: str, label: str, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a job: read where it was done, else done now and written."""
    path = storage.join(storage_uri, "reports", study, f"{label}.json")
    if not storage.exists(path):
        print(f"study: {label}", flush=True)
        storage.write_bytes(path, json.dumps(job()).encode())
    found: dict[str, Any] = json.loads(storage.read_bytes(path))
    return found


def paired(values: Sequence[float]) -> Numbers:
    """Mean of paired differences and the ends of its 95 % interval (Student's t); NaN for a single pair."""
    mean = float(np.mean(values))
    freedom = len(values) - 1
    half = QUANTILE_95[freedom] * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if freedom else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(values)}


def differences(results: Results, claims: Claims) -> dict[str, Numbers]:
    """Paired differences over the seeds that have both sides."""
    found = {}
    for claim, (metric, one, two) in claims.items():
        seeds = [seed for seed in results.get(one, {}) if seed in results.get(two, {})]
        if seeds:
            found[claim] = paired([results[one][seed][metric] - results[two][seed][metric] for seed in seeds])
    return found


def ap_table(results: Results) -> list[str]:
    """Markdown: AP50 means over seeds, and that of each seed on novel names."""
    lines = ["| | base AP50 | novel AP50 | novel AP50 of each seed |", "|---|---|---|---|"]
    for name, of_seeds in results.items():
        values = list(of_seeds.values())
        if "ap50_novel" in values[0]:
            base, novel = ([entry[key] for entry in values] for key in ("ap50_base", "ap50_novel"))
            each = ", ".join(f"{value:.3f}" for value in novel)
            lines.append(f"| {name} | {np.mean(base):.3f} | {np.mean(novel):.3f} | {each} |")
    return lines


def difference_table(found: Mapping[str, Numbers]) -> list[str]:
    """Markdown: paired differences with their intervals."""
    lines = ["| difference | mean | 95 % interval | seeds |", "|---|---|---|---|"]
    for claim, row in found.items():
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}" if row["seeds"] > 1 else "none from one seed"
        lines.append(f"| {claim} | {row['mean']:+.3f} | {interval} | {row['seeds']} |")
    return lines


def write_report(storage_uri: str, name: str, report: Mapping[str, Any], text: str) -> str:
    """Write `reports/<name>.json` and `.md`; returns the path of the first."""
    path = storage.join(storage_uri, "reports", name)
    storage.write_bytes(f"{path}.json", json.dumps(report, indent=1).encode())
    storage.write_bytes(f"{path}.md", text.encode())
    return f"{path}.json"

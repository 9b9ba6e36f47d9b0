"""Is every tensor of the released checkpoints accounted for?

python benchmarks/manifests.py

Every name of every manifest is used by our model, with its shape, or named as ignored with a reason, and nothing of
ours is left without a tensor. Prints what is ignored, writes runs/bench/manifests.json and exits with 1 if one is left.
"""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from reference import REFERENCE

from ovd_models.importers.codet import account_codet_tensors
from ovd_models.weights import TensorAccount

REPOSITORY = Path(__file__).parents[1]
MANIFESTS = REFERENCE / "parity/manifests"
FIGURES = REPOSITORY / "runs" / "bench" / "manifests.json"
Account = Callable[[Mapping[str, Sequence[int]], str], TensorAccount]
FAMILIES: dict[str, Account] = {"codet": account_codet_tensors}
"""The beginning of a manifest's name -> what accounts for its names and shapes."""


def accounts() -> dict[str, TensorAccount]:
    """Every manifest of a known family."""
    found = {}
    for path in sorted(MANIFESTS.glob("*.json")):
        family = path.stem.partition("_")[0]
        if family in FAMILIES and not path.stem.endswith(".meta"):
            shapes = {name: shape for name, (shape, _) in json.loads(path.read_text()).items()}
            found[path.stem] = FAMILIES[family](shapes, path.stem)
    return found


def main() -> None:
    found = accounts()
    if not found:
        sys.exit(f"{MANIFESTS}: no manifests")
    print(f"{'manifest':28} {'used':>5} {'ignored':>8} {'unaccounted':>12} {'missing':>8}")
    for name, account in found.items():
        counts = (
            len(account.used),
            len(account.ignored),
            len(account.unaccounted),
            len(account.missing),
        )
        print(f"{name:28} {counts[0]:5} {counts[1]:8} {counts[2]:12} {counts[3]:8}")
        for reason, count in Counter(account.ignored.values()).items():
            print(f"    {count:4} {reason}")
    left = sum(len(account.unaccounted) + len(account.missing) for account in found.values())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    figures = {"manifests": len(found), "unaccounted": left, "commit": commit, "machine": machine}
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    if left:
        sys.exit(f"{left} tensors unaccounted for")


if __name__ == "__main__":
    main()

"""Check that every tensor of the released checkpoints is accounted for.

python benchmarks/manifests.py

Every name of every manifest must be used by our model, with its shape, or be ignored for a stated reason, and every
tensor of our model must be filled. Prints the counts and reasons, writes runs/bench/manifests.json, and exits with 1 if
a tensor is unaccounted for.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from measure import write_figures
from reference import REFERENCE

from ovd_models.importers.codet import account_codet_tensors
from ovd_models.importers.ovsam import account_ovsam_tensors
from ovd_models.weights import TensorAccount

MANIFESTS = REFERENCE / "parity/manifests"
Account = Callable[[Mapping[str, Sequence[int]], str], TensorAccount]
FAMILIES: dict[str, Account] = {
    "codet": account_codet_tensors,
    "ovsam": lambda shapes, _: account_ovsam_tensors(shapes),  # files may hold a part of the model
}
"""Prefix of a manifest's name -> the function that accounts for its names and shapes."""


def accounts() -> dict[str, TensorAccount]:
    """The account of every manifest, by name.

    Raises:
        KeyError: a manifest is of no known family.
    """
    found = {}
    for path in sorted(MANIFESTS.glob("*.json")):
        if not path.stem.endswith(".meta"):
            shapes = {name: shape for name, (shape, _) in json.loads(path.read_text()).items()}
            found[path.stem] = FAMILIES[path.stem.partition("_")[0]](shapes, path.stem)
    return found


def main() -> None:
    found = accounts()
    if not found:
        sys.exit(f"{MANIFESTS}: no manifests")
    print(f"{'manifest':28} {'used':>5} {'ignored':>8} {'unaccounted':>12} {'missing':>8}")
    for name, account in found.items():
        used, ignored, unaccounted, missing = map(
            len, (account.used, account.ignored, account.unaccounted, account.missing)
        )
        print(f"{name:28} {used:5} {ignored:8} {unaccounted:12} {missing:8}")
        for reason, count in Counter(account.ignored.values()).items():
            print(f"    {count:4} {reason}")
    left = sum(len(account.unaccounted) + len(account.missing) for account in found.values())
    write_figures("manifests", {"manifests": len(found), "unaccounted": left})
    if left:
        sys.exit(f"{left} tensors unaccounted for")


if __name__ == "__main__":
    main()

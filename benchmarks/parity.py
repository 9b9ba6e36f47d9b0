"""Differences between our CoDet and the released one, quantity by quantity, on recorded inputs and outputs.

python benchmarks/parity.py [PACK ...]     all packs, or those whose names start like this

Prints the largest difference of every compared quantity and exits with 1 if one is beyond the tolerance of the packs'
README: elementwise rtol 1e-4 and atol 1e-5 for the small packs, 1e-3 and 1e-4 for the full-size models.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from parity_models import FULL_FUNCTIONS
from parity_packs import PACK_FUNCTIONS, PACKS, Quantity


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One compared quantity."""

    quantity: str
    difference: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute value of theirs."""
    within: bool


def compare(quantities: Iterable[Quantity], rtol: float, atol: float) -> list[Comparison]:
    comparisons = []
    for name, *values in quantities:
        ours, theirs = (torch.as_tensor(value).detach().double() for value in values)
        same_shape = ours.shape == theirs.shape
        difference = (ours - theirs).abs() if same_shape else torch.tensor(math.inf)
        comparisons.append(
            Comparison(
                quantity=name,
                difference=float(difference.max()) if difference.numel() else 0.0,
                scale=float(theirs.abs().max()) if theirs.numel() else 0.0,
                within=same_shape and bool((difference <= atol + rtol * theirs.abs()).all()),
            )
        )
    return comparisons


def compare_pack(pack: str) -> list[Comparison]:
    """Every compared quantity of a pack."""
    if pack in PACK_FUNCTIONS:
        return compare(PACK_FUNCTIONS[pack](pack), 1e-4, 1e-5)
    return compare(FULL_FUNCTIONS[pack](pack), 1e-3, 1e-4)


def main() -> None:
    prefixes = tuple(sys.argv[1:]) or ("",)
    if not PACKS.is_dir():
        sys.exit(f"{PACKS}: no packs")
    print(f"{'pack':34} {'quantity':36} {'max difference':>14} {'of scale':>10}  within")
    beyond = 0
    for pack in (*PACK_FUNCTIONS, *FULL_FUNCTIONS):
        if not pack.startswith(prefixes):
            continue
        for row in compare_pack(pack):
            relative = row.difference / row.scale if row.scale else 0.0
            within = "yes" if row.within else "NO"
            print(f"{pack:34} {row.quantity:36} {row.difference:14.2e} {relative:10.1e}  {within}")
            beyond += not row.within
    if beyond:
        sys.exit(f"{beyond} quantities beyond the tolerance")


if __name__ == "__main__":
    main()

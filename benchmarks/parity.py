"""Differences between our models and the released ones, quantity by quantity, on recorded inputs and outputs.

python benchmarks/parity.py [PACK ...]     all packs, or those whose names start like this

Packs are found by their file names in `parity/goldens` of `OVD_REFERENCE_DATA`, whatever their seeds, sizes and
backbones. Prints the largest difference of every compared quantity and writes `runs/bench/parity.json`. Exits with 1 if
a pack cannot be compared or a quantity is out of tolerance: rtol 1e-4 and atol 1e-5 for the small packs, 1e-3 and 1e-4
for the full-size models, elementwise.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import parity_models as models
import parity_packs as parts
import parity_sam as sam
import torch
from measure import write_figures
from parity_packs import PACKS, Quantity

FOLDERS = ("codet", "codet_full", "ovsam", "ovsam_full", "sam", "text")
INPUTS = re.compile(r"codet/align_zs_s\d+")
"""Tables that other packs read."""


@dataclass(frozen=True)
class Kind:
    """Packs of one kind."""

    pattern: str
    """Of their folder and name."""
    quantities: Callable[[Path], Iterator[Quantity]]
    full_size: bool = False


KINDS = (
    Kind(r"codet/centernet_s\d+(_emptygt)?", parts.centernet),
    Kind(r"codet/fedloss_s\d+", parts.fedloss),
    Kind(r"codet/boxloss_s\d+", parts.boxloss),
    Kind(r"codet/inference_s\d+", parts.inference),
    Kind(r"codet/zeroshot_s\d+", parts.zeroshot),
    Kind(r"codet/align_g\d+_N\d+_s\d+_(guided|unguided)_(allbce|fed\d+)", parts.alignment),
    Kind(r"codet_full/ovcoco_\w+", models.ovcoco, full_size=True),
    Kind(r"codet_full/ovlvis_\w+", models.ovlvis, full_size=True),
    Kind(r"codet_full/caption_ovcoco_\w+", models.caption_ovcoco, full_size=True),
    Kind(r"codet_full/caption_ovlvis_\w+", models.caption_ovlvis, full_size=True),
    Kind(r"ovsam/sam2clip_adapter_s\d+_\d+x\d+", sam.adapter),
    Kind(r"ovsam/clip2sam_head_s\d+", sam.naming_head),
    Kind(r"ovsam/clip2sam_genbox_s\d+", sam.box_of_mask),
    Kind(r"ovsam/fusion_s\d+", sam.fusion),
    Kind(r"ovsam/fusion_underflow", sam.underflow),
    Kind(r"ovsam/prompt_encoder_s\d+", sam.prompt_encoder),
    Kind(r"ovsam/clip_resnet_s\d+", sam.clip_resnet),
    Kind(r"ovsam/misc\w*", sam.masks_and_boxes),
    Kind(r"ovsam/ins_cls_iou_metric\w*", sam.pointing_metric),
    Kind(r"ovsam_full/ovsam_(coco|lvis)_rn50x16", sam.whole_ovsam, full_size=True),
    Kind(r"sam/tiny_sam_s\d+", sam.tiny_sam),
    Kind(r"text/clip_text_encoder\w*", models.text_encoder, full_size=True),
    Kind(r"text/ovsam_descriptions", sam.descriptions),
)


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
    """Compare pairs of values elementwise."""
    comparisons = []
    for name, *values in quantities:
        ours, theirs = (torch.as_tensor(value).detach().double() for value in values)
        same_shape = ours.shape == theirs.shape
        difference = (ours - theirs).abs() if same_shape else torch.tensor(math.inf)
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        comparisons.append(
            Comparison(
                quantity=name,
                difference=float(difference.max()) if difference.numel() else 0.0,
                scale=scale,
                within=same_shape and bool((difference <= atol + rtol * theirs.abs()).all()),
            )
        )
    return comparisons


def find_packs() -> list[Path]:
    """All packs."""
    folders = [PACKS / "goldens" / name for name in FOLDERS]
    files = sorted(path for folder in folders for path in folder.glob("*") if path.suffix in (".npz", ".json"))
    return [path for path in files if not INPUTS.fullmatch(pack_name(path))]


def pack_name(path: Path) -> str:
    """Folder and name, such as `codet/fedloss_s0`."""
    return f"{path.parent.name}/{path.stem}"


def kind_of(path: Path) -> Kind | None:
    """The kind of a pack; None if its name is of no known kind."""
    return next((kind for kind in KINDS if re.fullmatch(kind.pattern, pack_name(path))), None)


def compare_pack(path: Path) -> list[Comparison]:
    """Every compared quantity of a pack of a known kind."""
    kind = kind_of(path)
    if kind is None:
        raise ValueError("its name is of no known kind")
    return compare(kind.quantities(path), *((1e-3, 1e-4) if kind.full_size else (1e-4, 1e-5)))


def main() -> None:
    """Compare, print and write the figures."""
    prefixes = tuple(sys.argv[1:]) or ("",)
    found = [path for path in find_packs() if path.stem.startswith(prefixes) or pack_name(path).startswith(prefixes)]
    if not found:
        sys.exit(f"{PACKS / 'goldens'}: no packs")
    print(f"{'pack':44} {'quantity':44} {'max difference':>14} {'of scale':>10}  within")
    quantities, beyond, failed = 0, 0, []
    for path in found:
        try:
            rows = compare_pack(path)
        except Exception as error:  # a pack of any content: the others are still compared
            failed.append(f"{path}: cannot be compared ({type(error).__name__}: {error})".splitlines()[0])
            continue
        for row in rows:
            relative = row.difference / row.scale if row.scale else 0.0
            within = "yes" if row.within else "NO"
            print(f"{pack_name(path):44} {row.quantity:44} {row.difference:14.2e} {relative:10.1e}  {within}")
            beyond += not row.within
        quantities += len(rows)
    print(*failed, sep="\n", end="\n" if failed else "")
    write_figures("parity", {"packs": len(found) - len(failed), "quantities": quantities, "out_of_tolerance": beyond})
    print(f"{len(found) - len(failed)} packs, {quantities} quantities, {beyond} out of tolerance")
    if beyond or failed:
        sys.exit(1)


if __name__ == "__main__":
    main()

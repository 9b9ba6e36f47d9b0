"""All claims, in the order of the page."""

from workflows.studies.claims.clip_parts import INTERACTIVE, PROMPTS, SIZES
from workflows.studies.claims.codet_parts import GROUPS_AGAINST_NAMES, SHARED, SWEEPS
from workflows.studies.claims.parts import Part
from workflows.studies.claims.proposal_parts import PROPOSALS, QUALITY
from workflows.studies.claims.sam_parts import ABLATION, CLICKS, DETECTORS, NAIVE, TOWERS
from workflows.studies.claims.transfer_parts import TRANSFER
from workflows.studies.claims.vild_parts import (
    BACKBONES,
    CROPS,
    DISTILLATION,
    RARE,
    TEACHERS,
    WEIGHTS,
)

PARTS: dict[int, Part] = {
    part.number: part
    for part in (
        PROMPTS,
        PROPOSALS,
        QUALITY,
        DISTILLATION,
        RARE,
        BACKBONES,
        TEACHERS,
        TRANSFER,
        INTERACTIVE,
        CROPS,
        WEIGHTS,
        GROUPS_AGAINST_NAMES,
        SHARED,
        SWEEPS,
        CLICKS,
        NAIVE,
        DETECTORS,
        SIZES,
        TOWERS,
        ABLATION,
    )
}
"""Every claim by its number."""
CHEAP_FIRST = (1, 9, 18, 2, 15, 12, 4, 8, 10, 16, 17, 20, 3, 5, 13, 19, 14, 7, 6, 11)
"""Claims in the order in which they are measured: what an earlier one trains, a later one reuses."""

"""All claims, in the order of the page."""

from workflows.studies.claims.clip_parts import INTERACTIVE, PROMPTS, SIZES
from workflows.studies.claims.codet_parts import GROUPS_AGAINST_NAMES, SHARED, SWEEPS
from workflows.studies.claims.parts import Part
from workflows.studies.claims.sam_parts import CLICKS, NAIVE
from workflows.studies.claims.vild_parts import (
    BACKBONES,
    CROPS,
    DISTILLATION,
    PROPOSALS,
    QUALITY,
    RARE,
    TEACHERS,
    TRANSFER,
    WEIGHTS,
)

DETECTORS = Part(
    number=17,
    statement="OV-SAM's masks and names on detectors' boxes are above SAM's masks with the detectors' names.",
    paper=("AP base, novel 31.1, 36.0 against 28.0, 33.8 on Detic's boxes: COCO, OV-SAM Table 2",),
    schedule="`python -m workflows.studies.ovsam --detectors` measures it, outside this page",
)
TOWERS = Part(
    number=19,
    statement="A convolutional CLIP is a better base for OV-SAM than a vision transformer.",
    paper=("IoU and accuracy 78.1, 55.1 (RN50x16) against 38.6, 14.3 (ViT-L/14): COCO, OV-SAM's ablation",),
    schedule="`python -m workflows.studies.ovsam --other-teachers` measures it, outside this page",
)
ABLATION = Part(
    number=20,
    statement="Adapter, pyramid and label branch each contribute to OV-SAM.",
    paper=("accuracy 54.2 without CLIP2SAM, 79.3 with a label token, 84.3 with the pyramid: COCO, OV-SAM's ablation",),
    schedule="none",
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
CHEAP_FIRST = (1, 9, 18, 2, 15, 12, 4, 8, 10, 3, 5, 13, 16, 14, 7, 6, 11)
"""Claims with a command in the order in which they are measured: what an earlier one trains, a later one reuses."""

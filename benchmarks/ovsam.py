"""Cost of OV-SAM at its published size, compared with SAM and CLIP, and the time of one more prompt.

python benchmarks/ovsam.py

RN50x16 and ViT-H at 1024 px with random weights, so nothing is downloaded. Operations are the multiplications and
additions of matrix products and convolutions, for one image and four named boxes, counted on torch's `meta` device
without computing anything. Times are medians on this machine's CPU. Prints a table and writes runs/bench/ovsam.json.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import torch
from measure import write_figures
from torch import nn
from torch.nn import functional as F

from ovd_models.ovsam.clip_pyramid import ClipPyramid, build_tower
from ovd_models.ovsam.head import ROI_SIDE
from ovd_models.ovsam.model import RN50X16, OvSam, published
from ovd_models.sam.model import VIT_H, SamModel
from ovd_models.segments import Prompts
from ovd_models.vocabulary import Vocabulary
from workflows.reports.pointing import count_flops, median_ms

SIDE, CROP, NAMES, BOXES = 1024, 384, 65, 4


def parameters(modules: Iterable[nn.Module]) -> int:
    """Number of parameters of all modules; shared ones count once."""
    return sum(value.numel() for value in {id(p): p for module in modules for p in module.parameters()}.values())


def costs() -> dict[str, tuple[int, int]]:
    """Parameters and operations of OV-SAM, of SAM alone, and of SAM with CLIP on crops or once on the whole image.

    In OV-SAM, CLIP scores its own features of the box, as in the released models, or a cut-out of each mask.
    """
    with torch.device("meta"):
        model, sam, whole = OvSam(published(RN50X16)), SamModel(VIT_H), ClipPyramid(build_tower(RN50X16, SIDE), RN50X16)
        image, crops = torch.empty(1, 3, SIDE, SIDE), torch.empty(BOXES, 3, CROP, CROP)
        grid = torch.empty(BOXES, whole.channels[-1], whole.grid, whole.grid)
        regions = torch.empty(BOXES, model.config.pyramid_width, ROI_SIDE, ROI_SIDE)
        sparse = torch.empty(BOXES, 2, VIT_H.prompt_width)
        dense = torch.empty(BOXES, VIT_H.prompt_width, VIT_H.embedding_side, VIT_H.embedding_side)
    for module in (model, sam, whole):  # the counter would follow gradients through parameters
        module.eval().requires_grad_(False)

    def ovsam(score_by_clip: Callable[[], object]) -> None:
        levels = model.clip(image)
        model.namer.pyramid(levels)
        model.decode(model.adapter(levels).expand(BOXES, -1, -1, -1), sparse, dense)
        model.namer.embed(regions)
        score_by_clip()

    decoder = sam.sam.mask_decoder
    sam_flops = count_flops(lambda: decoder(sam.sam.image_encoder(image), dense[:1], sparse, dense, False))
    sam_and_clip = parameters([sam, whole])
    return {
        "OV-SAM": (parameters([model]), count_flops(lambda: ovsam(lambda: model.clip.head(grid)))),
        "OV-SAM, cut-outs": (parameters([model]), count_flops(lambda: ovsam(lambda: model.clip.tower(crops)))),
        "SAM": (parameters([sam]), sam_flops),
        "image crop": (sam_and_clip, sam_flops + count_flops(lambda: whole.tower(crops))),
        "feature crop": (sam_and_clip, sam_flops + count_flops(lambda: (whole(image), whole.head(grid)))),
    }


def times(repeats: int) -> dict[str, float]:
    """Milliseconds to encode an image, and for one more named prompt on it with each view of CLIP."""
    torch.manual_seed(0)
    model = OvSam(published(RN50X16)).eval()
    image = torch.randint(0, 256, (3, 768, SIDE), dtype=torch.uint8)
    texts = F.normalize(torch.randn(NAMES, RN50X16.embed_dim), dim=1)
    vocabulary = Vocabulary(tuple(map(str, range(NAMES))), texts, torch.ones(NAMES) > 0)
    encoded, prompt = model.encode(image), Prompts.create(boxes=[[256.0, 192.0, 768.0, 576.0]])
    figures = {"encode_ms": median_ms(lambda: model.encode(image), repeats)}
    views: tuple[Literal["features", "cut_out"], ...] = ("features", "cut_out")
    for view in views:
        model.config = replace(model.config, clip_view=view)
        figures[f"{view}_prompt_ms"] = median_ms(lambda: model.segment(encoded, prompt, vocabulary), repeats)
        figures[f"{view}_prompt_of_encode"] = round(figures[f"{view}_prompt_ms"] / figures["encode_ms"], 4)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions; 0 skips the timing")
    given = parser.parse_args()
    rows = costs()
    print("| | parameters | GFLOP |\n|---|---|---|")
    for name, (count, flops) in rows.items():
        print(f"| {name} | {count / 1e6:.0f} M | {flops / 1e9:,.0f} |")
    figures: dict[str, object] = {
        f"{variant} {part} of {name}": round(rows[variant][index] / rows[name][index], 3)
        for variant in ("OV-SAM", "OV-SAM, cut-outs")
        for name in ("image crop", "feature crop")
        for index, part in enumerate(("parameters", "flops"))
    }
    if given.repeats:
        figures |= times(given.repeats)
    for name, value in figures.items():
        print(name, value)
    write_figures("ovsam", figures)


if __name__ == "__main__":
    main()

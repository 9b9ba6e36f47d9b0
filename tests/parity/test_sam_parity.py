"""The tiny SAM of the parity pack: the same numbers as recorded from segment-anything 1.0."""

from typing import Any

import numpy as np
import pytest
import torch
from reference_data import PARITY, needs

from ovd_models.sam.model import EverythingConfig, SamConfig, SamModel, scale_prompts
from ovd_models.segments import Prompts

PACKS = PARITY / "goldens/sam"
pytestmark = needs("parity/goldens/sam")
CONFIG = SamConfig(
    image_size=128,
    patch_size=16,
    width=32,
    depth=2,
    heads=2,
    window=4,
    global_blocks=(1,),
    prompt_width=32,
    mask_channels=8,
    decoder_heads=4,
    decoder_mlp=64,
    iou_width=32,
)


@pytest.fixture(scope="module", params=[0, 1])
def case(request: Any) -> tuple[SamModel, dict[str, np.ndarray]]:
    with np.load(PACKS / f"tiny_sam_s{request.param}.npz") as file:
        pack = {name: file[name] for name in file.files}
    model = SamModel(CONFIG).eval()
    model.sam.load_state_dict({n[2:]: torch.from_numpy(v) for n, v in pack.items() if n.startswith("w:")})
    return model, pack


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=5e-5)


def test_the_image_embedding(case: tuple[SamModel, dict[str, np.ndarray]]) -> None:
    model, pack = case
    encoded = model.encode(torch.from_numpy(pack["image"]).permute(2, 0, 1))
    close(encoded.embedding, pack["embedding"])
    assert encoded.input_size == tuple(pack["input_size"])
    assert encoded.size == tuple(pack["original_size"])
    assert sum(weight.numel() for weight in model.parameters()) == 104_326


@pytest.mark.parametrize(
    ("name", "points", "labels", "box", "several"),
    [
        ("point1_multi", [0], [1], False, True),
        ("point1_single", [0], [1], False, False),
        ("point2_posneg", [0, 1], [1, 0], False, True),
        ("box", [], None, True, False),
        ("box_point", [1], [0], True, False),
        ("point_mask", [0], [1], False, False),
    ],
)
def test_every_kind_of_prompt(
    case: tuple[SamModel, dict[str, np.ndarray]],
    name: str,
    points: list[int],
    labels: list[int] | None,
    box: bool,
    several: bool,
) -> None:
    model, pack = case
    predictor = model.predictor(model.encode(torch.from_numpy(pack["image"]).permute(2, 0, 1)))
    masks, ious, low = predictor.predict(
        pack["points"][points] if points else None,
        None if labels is None else np.array(labels),
        pack["box"] if box else None,
        pack["mask_input_used"] if name == "point_mask" else None,
        multimask_output=several,
        return_logits=True,
    )
    close(masks, pack[f"{name}_masks_logits"])
    close(ious, pack[f"{name}_iou"])
    close(low, pack[f"{name}_low"])


def test_records_give_the_recorded_masks(case: tuple[SamModel, dict[str, np.ndarray]]) -> None:
    model, pack = case
    image = torch.from_numpy(pack["image"]).permute(2, 0, 1)
    by_box = model.segment(image, Prompts.create(boxes=pack["batch_boxes"]))
    close(by_box.low_res, pack["sam_forward_low"][:, 0])
    close(by_box.ious, pack["sam_forward_iou"][:, 0])
    by_click = model.segment(image, Prompts.create(points=pack["points"][:1]))
    best = int(pack["point1_multi_iou"].argmax())
    assert np.array_equal(by_click.masks[0].numpy(), pack["point1_multi_masks_logits"][best] > 0)
    encoded = model.encode(image)
    corners = scale_prompts(torch.from_numpy(pack["batch_boxes"]).view(-1, 2, 2), encoded)
    close(corners.view(-1, 4), pack["batch_boxes_transformed"])


def test_everything(case: tuple[SamModel, dict[str, np.ndarray]]) -> None:
    model, pack = case
    image = torch.from_numpy(pack["image"]).permute(2, 0, 1)
    found = model.everything(image, EverythingConfig(points_per_side=4, min_iou=-9, min_stability=0.0))
    close(found.ious, pack["amg_iou"])
    assert found.masks.flatten(1).sum(1).tolist() == pack["amg_area"].tolist()
    x, y, width, height = pack["amg_bbox"][0]  # with inclusive edges
    assert found.boxes.tolist() == [[x, y, x + width + 1, y + height + 1]]

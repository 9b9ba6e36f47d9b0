"""The released OV-SAM at full size, its weights by a rule: the same numbers as recorded from the released code."""

import json
import re
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from reference_data import PARITY, load_fill, needs
from torch import Tensor
from torch.nn import functional as F

from ovd_models.importers.ovsam import account_ovsam_tensors
from ovd_models.ovsam.head import fuse_scores, name_logits
from ovd_models.ovsam.model import RN50X16, OvSam, enlarge, published
from ovd_models.sam.model import EncodedImage

PACK = PARITY / "goldens/ovsam_full/ovsam_coco_rn50x16.npz"
NOVEL = (4, 5, 15, 16, 19, 20, 25, 27, 31, 36, 41, 43, 55, 57, 66, 71, 76)
UNUSED = (9, 10, 11, 12, 32, 34, 35, 38, 40, 52, 58, 60, 67, 77, 78)
pytestmark = [pytest.mark.slow, needs("parity/goldens/ovsam_full")]


@pytest.fixture(scope="module")
def fill() -> ModuleType:
    return load_fill()


@pytest.fixture(scope="module")
def pack() -> dict[str, Tensor]:
    with np.load(PACK) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


@pytest.fixture(scope="module")
def model(fill: ModuleType) -> OvSam:
    manifest = json.loads((PARITY / "manifests/ovsam_ovsam_coco_rn50x16_point.json").read_text())
    state = {}
    for name, ours in account_ovsam_tensors(manifest).used.items():
        shape, dtype = manifest[name]
        if dtype == "int64":
            state[ours] = torch.zeros(shape, dtype=torch.int64)
            continue
        value = fill.value(name, tuple(shape))
        for pattern, scale, shift in fill.SPECIAL["ovsam_coco_rn50x16"]:
            if re.search(pattern, name):
                value = value * np.float32(scale) + np.float32(shift)
        state[ours] = torch.from_numpy(value)
    model = OvSam(published(RN50X16))
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="module")
def looked(model: OvSam, pack: dict[str, Tensor]) -> Iterator[tuple[list[Tensor], Tensor, list[Tensor]]]:
    with torch.no_grad():
        pixels, _ = model.preprocess([pack["resized_768x1024"].permute(2, 0, 1)])
        levels = model.clip(pixels)
        yield levels, model.adapter(levels), model.namer.pyramid(levels)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach().to(expected.dtype), expected, rtol=1e-3, atol=1e-4)


def sliced(value: Tensor, count: int) -> Tensor:
    flat = value.flatten()
    return flat[torch.from_numpy(np.linspace(0, len(flat) - 1, count).astype(np.int64))]


def same(pack: dict[str, Tensor], name: str, value: Tensor) -> None:
    close(sliced(value, len(pack[f"{name}_slice"])), pack[f"{name}_slice"])
    wide = value.double()
    found = torch.stack([wide.sum(), wide.abs().sum(), wide.std(), wide.min(), wide.max()])
    expected = pack[f"{name}_stats"]
    close(found[1:], expected[1:])
    assert abs(found[0] - expected[0]) < 1e-4 * expected[1]


def test_levels_adapter_and_pyramid(pack: dict[str, Tensor], looked: tuple[list[Tensor], Tensor, list[Tensor]]) -> None:
    levels, embedding, pyramid = looked
    for index, (level, entry) in enumerate(zip(levels, pyramid, strict=True)):
        assert list(level.shape) == pack[f"clip{index}_shape"].tolist()
        same(pack, f"clip{index}", level)
        same(pack, f"fpn{index}", entry)
    same(pack, "neck", embedding)


@pytest.mark.parametrize("kind", ["point", "box"])
def test_masks_and_names(
    kind: str,
    fill: ModuleType,
    model: OvSam,
    pack: dict[str, Tensor],
    looked: tuple[list[Tensor], Tensor, list[Tensor]],
) -> None:
    levels, embedding, pyramid = looked
    boxes, points = pack["boxes"].float(), pack["points"].float()
    with torch.no_grad():
        if kind == "box":
            sparse, dense = model.prompt_encoder(None, boxes, None)
        else:
            sparse, dense = model.prompt_encoder((points, torch.ones(points.shape[:2])), None, None)
        low, _ = model.decode(embedding.expand(len(boxes), -1, -1, -1), sparse, dense)
        for row in range(len(low)):
            found = sliced(low[row], pack[f"{kind}_lowres_slice"].shape[1])
            close(found, pack[f"{kind}_lowres_slice"][row])
        text = torch.from_numpy(fill.value("text_embed.RN50x16_CocoOVDataset", (80, 17, 768)))
        text = F.normalize(text, dim=-1)
        rois = F.pad(model.rois_of(low, boxes if kind == "box" else None), (1, 0))
        head = name_logits(model.namer(pyramid, rois), text)
        # The reference gives the annotated boxes to CLIP whatever was prompted.
        clip = name_logits(model.clip.region_embeddings(levels[-1], F.pad(boxes, (1, 0))), text)
    close(head, pack[f"{kind}_head_logit"][:, 0])
    close(clip, pack[f"{kind}_clip_logit"][:, 0])
    classes = torch.arange(80)
    is_base, takes_part = ~torch.isin(classes, torch.tensor(NOVEL)), ~torch.isin(classes, torch.tensor(UNUSED))
    # The reference takes CLIP's word only where the mask survives plain bilinear resizing to CLIP's last level; these
    # masks, whose sign depends on the place within a patch, never do. Ours asks whether the mask has a pixel at all.
    seen = (F.interpolate(low[:, None], levels[-1].shape[-2:], mode="bilinear") > 0).flatten(1).any(1)
    fused = fuse_scores(head, clip, is_base, seen)
    fused[:, :-1].masked_fill_(~takes_part, -1000)  # the reference's score of names that take no part
    close(fused, pack[f"{kind}_fused"][:, 0])
    assert fused[:, :-1].argmax(1).tolist() == pack[f"{kind}_labels"].tolist()

    encoded = EncodedImage(embedding, (768, 1024), (600, 800), (600, 800))
    masks = enlarge(low, encoded, 1024) > 0
    assert masks.flatten(1).sum(1).tolist() == pytest.approx(pack[f"{kind}_mask_area"].tolist(), abs=4)
    bits = torch.from_numpy(np.unpackbits(pack[f"{kind}_mask_bits"].numpy())).view(6, 600, 800).bool()
    assert (masks ^ bits).sum() <= 20

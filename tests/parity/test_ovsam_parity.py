"""OV-SAM's parity packs: the same numbers as recorded from the released implementation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from reference_data import PARITY, needs
from torch import Tensor

from ovd_models.importers.ovsam import account_ovsam_tensors, our_name
from ovd_models.ovsam.adapter import LevelProjection, Sam2Clip, feature_distillation_loss
from ovd_models.ovsam.clip_pyramid import ClipPyramid, TowerConfig
from ovd_models.ovsam.head import (
    RegionNamer,
    fuse_scores,
    label_loss,
    mask_losses,
    name_logits,
    read_points,
    region_levels,
)
from ovd_models.ovsam.metrics import PointingMetrics, centre_points, mask_depth
from ovd_models.ovsam.model import RN50X16, OvSam, enlarge, published
from ovd_models.sam.model import EncodedImage, SamConfig, build_mask_decoder, build_prompt_encoder, run_decoder
from ovd_models.sam.training import mask_ious
from ovd_models.segments import boxes_of

PACKS = PARITY / "goldens/ovsam"
pytestmark = needs("parity/goldens/ovsam")
MANIFESTS = sorted(path for path in PARITY.glob("manifests/ovsam_*.json") if not path.name.endswith(".meta.json"))


def read(name: str) -> dict[str, Tensor]:
    with np.load(PACKS / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files if file[key].dtype.kind != "U"}


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.detach().to(expected.dtype), expected, rtol=rtol, atol=atol)


def weights(pack: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in pack.items() if name.startswith(prefix)}


# --------------------------------------------------------------------------------------------------------- adapter


@pytest.mark.parametrize("name", ["s0_256x320", "s1_256x320", "s3_448x448"])
def test_adapter(name: str) -> None:
    pack = read(f"sam2clip_adapter_{name}")
    config = SamConfig(
        patch_size=16, width=32, heads=int(pack["num_heads"]), window=int(pack["window"]), prompt_width=16
    )
    height, width = (int(side) // 16 for side in pack["hw"])
    adapter = Sam2Clip((6, 10, 14, 18), (4, 8, 16, 32), config, 5, (height, width))
    adapter.load_state_dict(weights(pack, "w:"))
    levels = [pack[f"in{index}"] for index in range(4)]
    hidden = adapter.fused(levels)
    close(hidden, pack["pre"])
    for index, block in enumerate(adapter.blocks):
        hidden = block(hidden)
        close(hidden, pack[f"block{index}"], atol=5e-5)
    found = adapter(levels)
    close(found, pack["out"], atol=5e-5)
    loss = feature_distillation_loss(found, pack["target"], torch.ones(2, height, width))
    close(loss, pack["mse"])
    loss.backward()
    close(adapter.neck[0].weight.grad, pack["grad_neck0"])
    close(adapter.level_encoding.weight.grad, pack["grad_level"])
    last = adapter.patch_embeds[3]
    assert isinstance(last, LevelProjection)
    close(last.projection.weight.grad, pack["grad_patch3"])
    close(adapter.blocks[4].attn.rel_pos_h.grad, pack["grad_relpos4"])


# ------------------------------------------------------------------------------------------------------------ head


class Head:
    """The tiny head of a pack: decoder, label token and label branch."""

    def __init__(self, pack: dict[str, Tensor]) -> None:
        config = SamConfig(image_size=128, patch_size=16, prompt_width=32, decoder_heads=8, decoder_mlp=2048)
        self.decoder = build_mask_decoder(config, num_multimask=0)
        del self.decoder.iou_token, self.decoder.iou_prediction_head
        self.decoder.load_state_dict(weights(pack, "head:mask_decoder."))
        self.label_token = torch.nn.Parameter(pack["head:label_token.weight"])
        self.namer = RegionNamer((6, 10, 14, 18), (4, 8, 16, 32), 16, 24)
        state = {}
        for name, value in pack.items():
            if name.startswith("fpn:"):
                state[str(our_name("fpn_neck." + name[4:])).removeprefix("namer.")] = value
        self.namer.load_state_dict({**state, "roi_conv.weight": pack["head:roi_conv.0.conv.weight"]})

    def masks(self, pack: dict[str, Tensor]) -> Tensor:
        of_image = torch.repeat_interleave(torch.arange(2), pack["counts"])
        _, masks = run_decoder(
            self.decoder,
            self.label_token,
            pack["img"][of_image],
            pack["image_pe"],
            pack["sparse"],
            pack["dense"][:, :, None, None],
        )
        return masks


@pytest.mark.parametrize("seed", [0, 1])
def test_head(seed: int) -> None:
    pack = read(f"clip2sam_head_s{seed}")
    head = Head(pack)
    masks = head.masks(pack)
    close(masks, pack["masks"], atol=5e-5)
    pyramid = head.namer.pyramid([pack[f"clip_feat{index}"] for index in range(4)])
    for index, level in enumerate(pyramid):
        close(level, pack[f"fpn{index}"])
    assert region_levels(pack["rois"], 4, 4).tolist() == pack["roi_levels"].tolist()
    close(head.namer.pool(pyramid, pack["rois"]), pack["roi_feats"])
    embedding = head.namer(pyramid, pack["rois"])
    close(embedding, pack["roi_mean"])
    logits = name_logits(embedding, pack["text_embed_KPD"], float(pack["logit_scale"]))
    close(logits, pack["cls_pred"][:, 0], atol=5e-5)

    labels = pack["labels"]
    classes = 2.0 * label_loss(logits, labels)
    close(classes, pack["p512_loss_cls"])
    for count in (512, 12544):
        if f"p{count}_points" not in pack:
            continue
        predicted = read_points(masks[:, 0], pack[f"p{count}_points"])
        target = read_points(pack["gt_masks"].float(), pack[f"p{count}_points"])
        if count == 512:
            close(predicted, pack["sampled_pred"][:, 0], atol=1e-4)
            close(target, pack["sampled_gt"][:, 0])
        entropy, dice = mask_losses(predicted, target)
        close(5.0 * entropy.view(1), pack[f"p{count}_loss_mask"])
        close(5.0 * dice.view(1), pack[f"p{count}_loss_dice"])
        if count == 512:
            (classes + 5.0 * entropy + 5.0 * dice).backward(retain_graph=True)
            close(head.namer.roi_conv.weight.grad, pack["grad_roi_conv"], rtol=1e-3, atol=1e-4)
            close(head.decoder.mask_tokens.weight.grad, pack["grad_mask_tokens"], rtol=1e-3, atol=1e-4)
            close(head.label_token.grad, pack["grad_label_token"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_boxes_of_predicted_masks(seed: int) -> None:
    pack, source = read(f"clip2sam_genbox_s{seed}"), read(f"clip2sam_head_s{seed}")
    head = Head(source)
    boxes = boxes_of(pack["masks"][:, 0] > 0) * 4
    close(boxes, pack["gen_boxes"])
    pyramid = head.namer.pyramid([source[f"clip_feat{index}"][:1] for index in range(4)])
    rois = torch.nn.functional.pad(boxes, (1, 0))
    logits = name_logits(head.namer(pyramid, rois), source["text_embed_KPD"], float(source["logit_scale"]))
    close(logits, pack["cls_pred"][:, 0], atol=5e-5)


# ---------------------------------------------------------------------------------------------------------- fusion


@pytest.mark.parametrize("seed", [0, 1])
def test_fusion(seed: int) -> None:
    pack = read(f"fusion_s{seed}")
    pool = AttentionPool2d(int(pack["spatial_dim"]), 16, int(pack["heads"]), 24)
    pool.load_state_dict(weights(pack, "attnpool:"))
    tower = ModifiedResNet([1, 1, 1, 1], 24, 4, image_size=96, width=8)
    tower.attnpool = pool
    clip = ClipPyramid(tower, TowerConfig())
    rois = torch.nn.functional.pad(pack["boxes"], (1, 0))
    embedding = clip.region_embeddings(pack["clip_feat"], rois)
    close(embedding, torch.nn.functional.normalize(pack["clip_embed"], dim=-1))
    head = pack["head_logit"][:, 0]
    opinion = name_logits(embedding, pack["text_embed_KPD"])
    close(opinion, pack["out_cliponly"][:, 0], rtol=1e-3, atol=1e-3)  # the reference's factor is rounded otherwise
    assert opinion[:, :-1].argmax(1).tolist() == pack["label_cliponly"].tolist()
    assert head[:, :-1].argmax(1).tolist() == pack["label_headonly"].tolist()

    opinion = pack["out_cliponly"][:, 0]
    seen = torch.tensor([True, False, True, True, True])  # mask 1 is a single pixel
    split = pack["indicator"]
    both = fuse_scores(head, opinion, split == 1, seen)
    both[:, :-1].masked_fill_(split == 0, -1000)  # the reference's score of names that take no part
    close(both, pack["out_both"][:, 0], atol=1e-4)
    assert both[:, :-1].argmax(1).tolist() == pack["label_both"].tolist()
    nobody_knows = fuse_scores(head, opinion, None, seen)
    close(nobody_knows, pack["out_nosplit"][:, 0], atol=1e-4)
    assert nobody_knows[:, :-1].argmax(1).tolist() == pack["label_nosplit"].tolist()


def test_fusion_does_not_underflow_as_the_reference_does() -> None:
    pack = read("fusion_underflow")
    assert bool(pack["out"].isnan().any())
    found = fuse_scores(pack["head_logit"][:, 0], pack["clip_logit"][:, 0], torch.arange(12) < 6)
    assert bool(torch.isfinite(found).all())
    assert found[0].tolist() == [0.0, *[-200.0] * 12]


# --------------------------------------------------------------------------------------------------- smaller parts


@pytest.mark.parametrize("seed", [0, 1])
def test_prompt_encoder(seed: int) -> None:
    pack = read(f"prompt_encoder_s{seed}")
    config = SamConfig(image_size=128, patch_size=16, prompt_width=256, mask_channels=16)
    encoder = build_prompt_encoder(config)
    encoder.load_state_dict(weights(pack, "w:"))
    boxes, dense = encoder(None, pack["boxes"], None)
    close(boxes, pack["box_sparse"])
    close(dense[0, :, 0, 0], pack["dense_vec"])
    points, _ = encoder((pack["points"], torch.ones(4, 1)), None, None)
    close(points, pack["point_sparse"])
    close(encoder.get_dense_pe(), pack["dense_pe"])


@pytest.mark.parametrize("seed", [0, 1])
def test_clip_resnet(seed: int) -> None:
    pack = read(f"clip_resnet_s{seed}")
    state = weights(pack, "w:")
    depths = [len({name.split(".")[1] for name in state if name.startswith(f"layer{k}.")}) for k in (1, 2, 3, 4)]
    width = state["conv3.weight"].shape[0]
    tower = ModifiedResNet(depths, 24, width * 32 // 64, image_size=96, width=width)
    tower.load_state_dict(state)
    clip = ClipPyramid(tower, TowerConfig())
    for index, level in enumerate(clip(pack["x"])):
        close(level, pack[f"layer{index + 1}"], atol=1e-4)
    close(tower(pack["x"]), pack["out"], atol=1e-4)


def test_masks_to_boxes() -> None:
    pack = read("misc")
    masks = torch.cat([pack["masks"] > 0, torch.zeros(1, 40, 56, dtype=torch.bool)])
    close(boxes_of(masks), pack["mask2bbox"])


# ------------------------------------------------------------------------------------------------------- manifests


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_published_tensor_has_its_place(path: Path) -> None:
    manifest: dict[str, Any] = json.loads(path.read_text())
    found = account_ovsam_tensors(manifest)
    assert found.unaccounted == ()
    assert len(found.used) + len(found.ignored) == len(manifest)
    assert {name for name in found.ignored if "label_mlp" not in name} == set()
    with torch.device("meta"):
        ours = OvSam(published(RN50X16)).state_dict()
    for name, our in found.used.items():
        assert list(ours[our].shape) == manifest[name][0], (name, our)
    if "sam2clip" not in path.name:
        assert set(found.used.values()) == set(ours)


def test_metric_and_centre_points() -> None:
    pack, other = read("ins_cls_iou_metric"), read("misc")
    labels, found = pack["gt_labels"].tolist(), pack["pred_labels"].tolist()
    metrics = PointingMetrics()
    ious = mask_ious((pack["gt_masks"] > 0).flatten(1), pack["pred_masks"].bool().flatten(1))
    novel = set(pack["novel"].tolist())
    start = 0
    for count in pack["counts"].tolist():  # image by image, one of them without instances
        rows = slice(start, start + count)
        metrics.add(ious[rows], found[rows], labels[rows], [label in novel for label in labels[rows]])
        start += count
    summary = metrics.summary()
    for ours, theirs in (("all", "expected"), ("base", "expected_base"), ("novel", "expected_novel")):
        iou, accuracy = pack["expected_miou" if ours == "all" else f"{theirs}_iou"], pack[f"{theirs}_score"]
        assert summary[f"iou_{ours}"] == pytest.approx(float(iou), abs=1e-4)
        assert summary[f"accuracy_{ours}"] == pytest.approx(float(accuracy) / 100, abs=1e-4)
    for mask, ours, theirs in zip(
        other["masks"].numpy(), centre_points(other["masks"] > 0), other["center_points_xy"][:, 0], strict=True
    ):  # of several equally deep pixels, the reference does not always take the first
        depth = mask_depth((mask > 0).astype(np.uint8))
        (x, y), (u, v) = ours.int().tolist(), theirs.tolist()
        assert depth[y, x] == pytest.approx(depth[v, u])


def test_masks_are_enlarged_without_their_padding() -> None:
    pack = read("misc")
    inside, original = (tuple(pack[name].tolist()) for name in ("input_size", "original_size"))
    encoded = EncodedImage(torch.zeros(0), inside, original, original)
    close(enlarge(pack["lowres"][:, 0], encoded, int(pack["pad_size"][0])), pack["postprocessed"][:, 0])

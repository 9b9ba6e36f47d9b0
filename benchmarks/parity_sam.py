"""SAM, OV-SAM and the text side on recordings of the released code: packs of `parity.py`.

A function of this module yields the compared quantities of a pack.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from parity_models import fill_rule, filled, sampled, statistics
from parity_packs import PACKS, Pack, Quantity, read
from reference import REFERENCE
from torch import Tensor
from torch.nn import functional as F

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
from ovd_models.prompts import prompts_of, split_synonyms
from ovd_models.sam.model import (
    EncodedImage,
    EverythingConfig,
    SamConfig,
    SamModel,
    build_mask_decoder,
    build_prompt_encoder,
    run_decoder,
    scale_prompts,
)
from ovd_models.sam.training import mask_ious
from ovd_models.segments import Prompts, boxes_of

PROMPTS: dict[str, tuple[list[int], list[int] | None, bool, bool]] = {
    "point1_multi": ([0], [1], False, True),
    "point1_single": ([0], [1], False, False),
    "point2_posneg": ([0, 1], [1, 0], False, True),
    "box": ([], None, True, False),
    "box_point": ([1], [0], True, False),
    "point_mask": ([0], [1], False, False),
}
"""Prompt of a SAM pack -> its points, their labels, whether it has the box, and whether several masks are predicted."""


def under(pack: Pack, prefix: str) -> Pack:
    """The arrays whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in pack.items() if name.startswith(prefix)}


def agree(name: str, ours: Sequence[object], theirs: Sequence[object]) -> Quantity:
    """How many of two lists' entries are equal, of how many."""
    return name, float(sum(a == b for a, b in zip(ours, theirs, strict=True))), float(len(theirs))


# -------------------------------------------------------------------------------------------------------------- SAM


@torch.no_grad()
def tiny_sam(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    weights = under(pack, "w:")
    decoder, encoder = "mask_decoder.transformer.layers.0.", "image_encoder."
    width, _, patch, _ = weights[f"{encoder}patch_embed.proj.weight"].shape
    heads = width // weights[f"{encoder}blocks.0.attn.rel_pos_h"].shape[1]
    depth = len({name.split(".")[2] for name in weights if name.startswith(f"{encoder}blocks.")})
    grid = weights[f"{encoder}pos_embed"].shape[1]
    spans = [(len(weights[f"{encoder}blocks.{block}.attn.rel_pos_h"]) + 1) // 2 for block in range(depth)]
    model = SamModel(
        SamConfig(
            image_size=patch * grid,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            window=min(spans),
            global_blocks=tuple(block for block, span in enumerate(spans) if span == grid),
            prompt_width=len(weights[f"{encoder}neck.0.weight"]),
            mask_channels=len(weights["prompt_encoder.mask_downscaling.3.weight"]),
            decoder_heads=4,
            decoder_mlp=len(weights[f"{decoder}mlp.lin1.weight"]),
            iou_width=len(weights["mask_decoder.iou_prediction_head.layers.0.weight"]),
        )
    ).eval()
    model.sam.load_state_dict(weights)
    image = pack["image"].permute(2, 0, 1)
    encoded = model.encode(image)
    yield "embedding", encoded.embedding, pack["embedding"]
    yield "input size", torch.tensor(encoded.input_size), pack["input_size"]
    yield "original size", torch.tensor(encoded.size), pack["original_size"]
    predictor = model.predictor(encoded)
    for name, (points, labels, box, several) in PROMPTS.items():
        found = predictor.predict(
            pack["points"][points].numpy() if points else None,
            None if labels is None else np.array(labels),
            pack["box"].numpy() if box else None,
            pack["mask_input_used"].numpy() if name == "point_mask" else None,
            multimask_output=several,
            return_logits=True,
        )
        for what, ours in zip(("masks_logits", "iou", "low"), found, strict=True):
            yield f"{name} {what}", torch.as_tensor(ours), pack[f"{name}_{what}"]
    by_box = model.segment(image, Prompts.create(boxes=pack["batch_boxes"].numpy()))
    yield "masks of boxes", by_box.low_res, pack["sam_forward_low"][:, 0]
    yield "IoUs of boxes", by_box.ious, pack["sam_forward_iou"][:, 0]
    corners = scale_prompts(pack["batch_boxes"].view(-1, 2, 2), encoded)
    yield "scaled boxes", corners.view(-1, 4), pack["batch_boxes_transformed"]
    found = model.everything(image, EverythingConfig(points_per_side=4, min_iou=-9, min_stability=0.0))
    yield "IoUs of all masks", found.ious, pack["amg_iou"]
    yield "areas of all masks", found.masks.flatten(1).sum(1), pack["amg_area"]
    corner, size = pack["amg_bbox"].split(2, dim=1)  # with inclusive edges
    yield "boxes of all masks", found.boxes, torch.cat((corner, corner + size + 1), dim=1)


# ----------------------------------------------------------------------------------------------------- OV-SAM, parts


def adapter(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    height, width = (int(side) // 16 for side in pack["hw"])
    channels = tuple(pack[f"in{index}"].shape[1] for index in range(4))
    config = SamConfig(
        patch_size=16,
        width=pack["pre"].shape[-1],
        heads=int(pack["num_heads"]),
        window=int(pack["window"]),
        prompt_width=pack["out"].shape[1],
    )
    model = Sam2Clip(channels, (4, 8, 16, 32), config, 5, (height, width))
    model.load_state_dict(under(pack, "w:"))
    levels = [pack[f"in{index}"] for index in range(4)]
    hidden = model.fused(levels)
    yield "fused levels", hidden, pack["pre"]
    for index, block in enumerate(model.blocks):
        hidden = block(hidden)
        yield f"block {index}", hidden, pack[f"block{index}"]
    found = model(levels)
    yield "features", found, pack["out"]
    loss = feature_distillation_loss(found, pack["target"], torch.ones(len(found), height, width))
    yield "loss", loss, pack["mse"]
    loss.backward()
    last = model.patch_embeds[3]
    assert isinstance(last, LevelProjection)
    yield "gradient neck", model.neck[0].weight.grad, pack["grad_neck0"]
    yield "gradient level encoding", model.level_encoding.weight.grad, pack["grad_level"]
    yield "gradient last projection", last.projection.weight.grad, pack["grad_patch3"]
    yield "gradient positions", model.blocks[4].attn.rel_pos_h.grad, pack["grad_relpos4"]


class Head:
    """The tiny head of a pack: decoder, label token and label branch."""

    def __init__(self, pack: Pack) -> None:
        parts = under(pack, "head:")
        decoder = under(parts, "mask_decoder.")
        config = SamConfig(
            image_size=16 * pack["img"].shape[-1],
            patch_size=16,
            prompt_width=pack["img"].shape[1],
            decoder_heads=8,
            decoder_mlp=len(decoder["transformer.layers.0.mlp.lin1.weight"]),
        )
        self.decoder = build_mask_decoder(config, num_multimask=0)
        del self.decoder.iou_token, self.decoder.iou_prediction_head
        self.decoder.load_state_dict(decoder)
        self.label_token = torch.nn.Parameter(parts["label_token.weight"])
        channels = tuple(pack[f"clip_feat{index}"].shape[1] for index in range(4))
        embed_dim, pyramid = parts["roi_conv.0.conv.weight"].shape[:2]
        self.namer = RegionNamer(channels, (4, 8, 16, 32), pyramid, embed_dim)
        state = {
            str(our_name(f"fpn_neck.{name}")).removeprefix("namer."): value
            for name, value in under(pack, "fpn:").items()
        }
        self.namer.load_state_dict({**state, "roi_conv.weight": parts["roi_conv.0.conv.weight"]})

    def masks(self, pack: Pack) -> Tensor:
        """Mask logits of the pack's prompts."""
        rows = torch.repeat_interleave(torch.arange(len(pack["counts"])), pack["counts"])
        dense = pack["dense"][:, :, None, None]
        image, sparse = pack["img"][rows], pack["sparse"]
        return run_decoder(self.decoder, self.label_token, image, pack["image_pe"], sparse, dense)[1]


def naming_head(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    head = Head(pack)
    masks = head.masks(pack)
    yield "masks", masks, pack["masks"]
    pyramid = head.namer.pyramid([pack[f"clip_feat{index}"] for index in range(4)])
    for index, level in enumerate(pyramid):
        yield f"pyramid {index}", level, pack[f"fpn{index}"]
    yield "levels of regions", region_levels(pack["rois"], 4, 4), pack["roi_levels"]
    yield "pooled regions", head.namer.pool(pyramid, pack["rois"]), pack["roi_feats"]
    embedding = head.namer(pyramid, pack["rois"])
    yield "region embeddings", embedding, pack["roi_mean"]
    logits = name_logits(embedding, pack["text_embed_KPD"], float(pack["logit_scale"]))
    yield "logits", logits, pack["cls_pred"][:, 0]
    classes = 2.0 * label_loss(logits, pack["labels"])
    for key in sorted(name for name in pack if re.fullmatch(r"p\d+_points", name)):
        count = key.removesuffix("_points")
        predicted = read_points(masks[:, 0], pack[key])
        target = read_points(pack["gt_masks"].float(), pack[key])
        entropy, dice = mask_losses(predicted, target)
        yield f"{count} label loss", classes, pack[f"{count}_loss_cls"]
        yield f"{count} mask loss", 5.0 * entropy.view(1), pack[f"{count}_loss_mask"]
        yield f"{count} dice loss", 5.0 * dice.view(1), pack[f"{count}_loss_dice"]
        if count == "p512":
            yield "masks at points", predicted, pack["sampled_pred"][:, 0]
            yield "true masks at points", target, pack["sampled_gt"][:, 0]
            (classes + 5.0 * entropy + 5.0 * dice).backward(retain_graph=True)
            yield "gradient region projection", head.namer.roi_conv.weight.grad, pack["grad_roi_conv"]
            yield "gradient mask token", head.decoder.mask_tokens.weight.grad, pack["grad_mask_tokens"]
            yield "gradient label token", head.label_token.grad, pack["grad_label_token"]


def box_of_mask(path: Path) -> Iterator[Quantity]:
    pack, source = read(path), read(path.with_stem(path.stem.replace("genbox", "head")))
    head = Head(source)
    boxes = boxes_of(pack["masks"][:, 0] > 0) * 4
    yield "boxes", boxes, pack["gen_boxes"]
    pyramid = head.namer.pyramid([source[f"clip_feat{index}"][:1] for index in range(4)])
    embedding = head.namer(pyramid, F.pad(boxes, (1, 0)))
    logits = name_logits(embedding, source["text_embed_KPD"], float(source["logit_scale"]))
    yield "logits", logits, pack["cls_pred"][:, 0]


def fusion(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    channels, embed_dim = pack["roi_feat"].shape[1], pack["clip_embed"].shape[1]
    tower = ModifiedResNet([1, 1, 1, 1], embed_dim, 4, image_size=96, width=channels // 2)
    tower.attnpool = AttentionPool2d(int(pack["spatial_dim"]), channels, int(pack["heads"]), embed_dim)
    tower.attnpool.load_state_dict(under(pack, "attnpool:"))
    clip = ClipPyramid(tower, TowerConfig())
    embedding = clip.region_embeddings(pack["clip_feat"], F.pad(pack["boxes"], (1, 0)))
    yield "CLIP's region embeddings", embedding, F.normalize(pack["clip_embed"], dim=-1)
    head, clip_logits = pack["head_logit"][:, 0], name_logits(embedding, pack["text_embed_KPD"])
    yield "CLIP's logits", clip_logits, pack["out_cliponly"][:, 0]
    yield agree("CLIP's labels", clip_logits[:, :-1].argmax(1).tolist(), pack["label_cliponly"].tolist())
    yield agree("the head's labels", head[:, :-1].argmax(1).tolist(), pack["label_headonly"].tolist())
    # A mask that vanishes when it is resized to CLIP's last level leaves the decision to the head.
    small = F.interpolate(pack["mask_logits"], pack["clip_feat"].shape[-2:], mode="bilinear")
    seen, split = (small > 0).flatten(1).any(1), pack["indicator"]
    for what, is_base in (("both", split == 1), ("nosplit", None)):
        fused = fuse_scores(head, pack["out_cliponly"][:, 0], is_base, seen)
        if what == "both":
            fused[:, :-1].masked_fill_(split == 0, -1000)  # the reference's score of names outside both splits
        yield f"fused scores, {what}", fused, pack[f"out_{what}"][:, 0]
        yield agree(f"fused labels, {what}", fused[:, :-1].argmax(1).tolist(), pack[f"label_{what}"].tolist())


def underflow(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    head, theirs = pack["head_logit"][:, 0], pack["out"][:, 0]
    fused = fuse_scores(head, pack["clip_logit"][:, 0], torch.arange(head.shape[1] - 1) < (head.shape[1] - 1) // 2)
    yield "values that are not finite, of ours", float((~fused.isfinite()).sum()), 0.0
    both = theirs.isfinite()
    yield "finite values", fused[both], theirs[both]


def prompt_encoder(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    width, side = pack["dense_pe"].shape[1:3]
    masks = len(pack["w:mask_downscaling.3.weight"])
    encoder = build_prompt_encoder(
        SamConfig(image_size=16 * side, patch_size=16, prompt_width=width, mask_channels=masks)
    )
    encoder.load_state_dict(under(pack, "w:"))
    boxes, dense = encoder(None, pack["boxes"], None)
    points, _ = encoder((pack["points"], torch.ones(pack["points"].shape[:2])), None, None)
    yield "boxes", boxes, pack["box_sparse"]
    yield "no mask", dense[0, :, 0, 0], pack["dense_vec"]
    yield "points", points, pack["point_sparse"]
    yield "positions", encoder.get_dense_pe(), pack["dense_pe"]


def clip_resnet(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    state = under(pack, "w:")
    depths = [len({name.split(".")[1] for name in state if name.startswith(f"layer{k}.")}) for k in (1, 2, 3, 4)]
    width, embed_dim = len(state["conv3.weight"]), pack["out"].shape[1]
    tower = ModifiedResNet(depths, embed_dim, width // 2, image_size=pack["x"].shape[-1], width=width)
    tower.load_state_dict(state)
    for index, level in enumerate(ClipPyramid(tower, TowerConfig())(pack["x"])):
        yield f"level {index + 1}", level, pack[f"layer{index + 1}"]
    yield "embedding", tower(pack["x"]), pack["out"]


def masks_and_boxes(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    masks = pack["masks"] > 0
    yield "boxes of masks", boxes_of(F.pad(masks, (0, 0, 0, 0, 0, 1))), pack["mask2bbox"]
    for number, (mask, ours, theirs) in enumerate(
        zip(pack["masks"].numpy(), centre_points(masks), pack["center_points_xy"][:, 0], strict=True)
    ):  # of several equally deep pixels, the reference does not always take the first
        depth = mask_depth((mask > 0).astype(np.uint8))
        (x, y), (u, v) = ours.int().tolist(), theirs.tolist()
        yield f"depth of centre {number}", float(depth[y, x]), float(depth[v, u])
    inside, original = (tuple(pack[name].tolist()) for name in ("input_size", "original_size"))
    encoded = EncodedImage(torch.zeros(0), inside, original, original)
    yield (
        "enlarged masks",
        enlarge(pack["lowres"][:, 0], encoded, int(pack["pad_size"][0])),
        pack["postprocessed"][:, 0],
    )


def pointing_metric(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    labels, found, novel = pack["gt_labels"].tolist(), pack["pred_labels"].tolist(), set(pack["novel"].tolist())
    ious = mask_ious((pack["gt_masks"] > 0).flatten(1), pack["pred_masks"].bool().flatten(1))
    metrics, start = PointingMetrics(), 0
    for count in pack["counts"].tolist():
        rows = slice(start, start + count)
        metrics.add(ious[rows], found[rows], labels[rows], [label in novel for label in labels[rows]])
        start += count
    summary = metrics.summary()
    for split, iou, accuracy in (
        ("all", "expected_miou", "expected_score"),
        ("base", "expected_base_iou", "expected_base_score"),
        ("novel", "expected_novel_iou", "expected_novel_score"),
    ):
        yield f"IoU {split}", summary[f"iou_{split}"], pack[iou]
        yield f"accuracy {split}", summary[f"accuracy_{split}"], pack[accuracy] / 100


# -------------------------------------------------------------------------------------------------- OV-SAM, the whole


def split_of(data: str) -> tuple[str, Tensor, Tensor]:
    """The released class of a data set, [K] whether a name is base, and [K] whether it is in a split."""
    if data == "coco":
        novel = (4, 5, 15, 16, 19, 20, 25, 27, 31, 36, 41, 43, 55, 57, 66, 71, 76)
        unused = (9, 10, 11, 12, 32, 34, 35, 38, 40, 52, 58, 60, 67, 77, 78)
        classes = torch.arange(80)
        return "CocoOVDataset", ~torch.isin(classes, torch.tensor(novel)), ~torch.isin(classes, torch.tensor(unused))
    categories = json.loads((REFERENCE / "data/lvis/lvis_v1_categories.json").read_text())
    base = torch.tensor([entry["frequency"] != "r" for entry in sorted(categories, key=lambda entry: entry["id"])])
    return "LVISV1Dataset", base, torch.ones_like(base)


def filled_ovsam(manifest: str, special: str) -> OvSam:
    """The model of a manifest with the rule's weights."""
    entries = json.loads((PACKS / "manifests" / f"{manifest}.json").read_text())
    state = {}
    for name, ours in account_ovsam_tensors(entries).used.items():
        shape, dtype = entries[name]
        state[ours] = torch.zeros(shape, dtype=torch.int64) if dtype == "int64" else filled(name, shape, special)
    model = OvSam(published(RN50X16))
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def whole_ovsam(path: Path) -> Iterator[Quantity]:
    pack, data = read(path), path.stem.split("_")[1]
    model = filled_ovsam(f"ovsam_{path.stem}_point", path.stem)
    dataset, is_base, in_split = split_of(data)
    counts = json.loads((PACKS / "goldens/text/ovsam_descriptions.json").read_text())[dataset]
    text = fill_rule().value(f"text_embed.RN50x16_{dataset}", (counts["classes"], counts["P"], 768))
    text_KPD = F.normalize(torch.from_numpy(text), dim=-1)
    (resized,) = (name for name in pack if name.startswith("resized_"))
    pixels, _ = model.preprocess([pack[resized].permute(2, 0, 1)])
    levels = model.clip(pixels)
    embedding, pyramid = model.adapter(levels), model.namer.pyramid(levels)
    for index, (level, entry) in enumerate(zip(levels, pyramid, strict=True)):
        yield from summarised(f"clip{index}", level, pack)
        yield from summarised(f"fpn{index}", entry, pack)
    yield from summarised("neck", embedding, pack)
    boxes, points = pack["boxes"].float(), pack["points"].float()
    height, width = pack[resized].shape[:2]
    (original,) = (name for name in pack if name.startswith("image_rgb_"))
    original_size = tuple(pack[original].shape[:2])
    encoded = EncodedImage(embedding, (height, width), original_size, original_size)
    for kind in ("point", "box"):
        prompt = (None, boxes, None) if kind == "box" else ((points, torch.ones(points.shape[:2])), None, None)
        sparse, dense = model.prompt_encoder(*prompt)
        low, _ = model.decode(embedding.expand(len(boxes), -1, -1, -1), sparse, dense)
        slices = pack[f"{kind}_lowres_slice"]
        yield f"{kind} masks", torch.stack([sampled(row, slices.shape[1]) for row in low]), slices
        rois = F.pad(model.rois_of(low, boxes if kind == "box" else None), (1, 0))
        head = name_logits(model.namer(pyramid, rois), text_KPD)
        # The reference gives the annotated boxes to CLIP whatever was prompted.
        clip = name_logits(model.clip.region_embeddings(levels[-1], F.pad(boxes, (1, 0))), text_KPD)
        yield f"{kind} head logits", head, pack[f"{kind}_head_logit"][:, 0]
        yield f"{kind} CLIP logits", clip, pack[f"{kind}_clip_logit"][:, 0]
        # The reference uses CLIP only where the mask survives plain bilinear resizing to CLIP's last level.
        seen = (F.interpolate(low[:, None], levels[-1].shape[-2:], mode="bilinear") > 0).flatten(1).any(1)
        fused = fuse_scores(head, clip, is_base, seen)
        fused[:, :-1].masked_fill_(~in_split, -1000)
        yield f"{kind} fused scores", fused, pack[f"{kind}_fused"][:, 0]
        yield agree(f"{kind} labels", fused[:, :-1].argmax(1).tolist(), pack[f"{kind}_labels"].tolist())
        masks = enlarge(low, encoded, 1024) > 0
        bits = np.unpackbits(pack[f"{kind}_mask_bits"].numpy())[: masks.numel()]
        share = (masks.flatten() == torch.from_numpy(bits).bool()).double().mean()
        yield f"{kind} share of equal mask pixels", share, 1.0


def summarised(name: str, ours: Tensor, pack: Pack) -> Iterator[Quantity]:
    """Samples and statistics of a large tensor; the sum relative to the sum of magnitudes, since it cancels."""
    yield f"{name} samples", sampled(ours, len(pack[f"{name}_slice"])), pack[f"{name}_slice"]
    found, theirs = statistics(ours), pack[f"{name}_stats"]
    yield f"{name} sum", found[0] / theirs[1], theirs[0] / theirs[1]
    yield f"{name} statistics", found[1:], theirs[1:]


# -------------------------------------------------------------------------------------------------------------- text


def descriptions(path: Path) -> Iterator[Quantity]:
    recorded = json.loads(path.read_text())
    templates = [prompt.replace("@", "{}") for prompt in prompts_of("@", "ovsam")]
    digest = hashlib.sha256("\n".join(templates).encode()).hexdigest()
    yield "templates", float(len(templates)), float(recorded["n_templates"])
    yield agree("digest of the templates", [digest], [recorded["templates_sha256"]])
    examples = recorded["split_examples"]
    yield agree("synonyms", [split_synonyms(name) for name in examples], list(examples.values()))

"""Parts of our CoDet on the recorded inputs of the released one: the small packs of `parity.py`.

A function of this module yields the compared quantities of a pack.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from reference import REFERENCE
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image

from ovd_models.codet.alignment import LearnedAggregation, guidance_weights
from ovd_models.detectors.centernet import (
    CenterNetConfig,
    CenterNetHead,
    centre_losses,
    centre_targets,
    decode_proposals,
    flatten_levels,
)
from ovd_models.detectors.centernet2 import combine_scores
from ovd_models.detectors.resizing import Selection, select_detections
from ovd_models.losses import caption_loss, concept_loss, cosine_logits, federated_classes, sigmoid_loss

PACKS = REFERENCE / "parity"
Pack = dict[str, Tensor]
Quantity = tuple[str, Tensor | float, Tensor | float]
"""Name, ours, theirs."""


def read(path: Path) -> Pack:
    """The numeric arrays of a pack."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind in "fiub"}


def concept_table(path: Path) -> Tensor:
    """[C, D] unit rows of the concepts that a pack of the same seed was recorded with."""
    (seed,) = re.findall(r"_(s\d+)", path.stem)
    return F.normalize(read(path.with_name(f"align_zs_{seed}.npz"))["zs_raw"], dim=1)


def centernet(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    config = CenterNetConfig(post_nms=(60, 30))
    head = CenterNetHead(pack["feat_p3"].shape[1], 5, 4)
    names = {"tower": "bbox_tower", "distances": "bbox_pred", "heat": "agn_hm"}
    state = {"scales": torch.cat([pack[f"w:centernet_head.scales.{level}.scale"] for level in range(5)])}
    for ours in head.state_dict():
        if ours != "scales":
            part, rest = ours.split(".", 1)
            state[ours] = pack[f"w:centernet_head.{names[part]}.{rest}"]
    head.load_state_dict(state)
    levels = [pack[f"feat_p{level}"].requires_grad_() for level in range(3, 8)]
    heat, distances = head(levels)
    for level in range(5):
        yield f"heat logits p{level + 3}", heat[level], pack[f"agn_l{level}"]
        yield f"distances p{level + 3}", distances[level], pack[f"reg_l{level}"]
    boxes = [pack[f"gt_boxes_{image}"] for image in range(len(pack["feat_p3"]))]
    targets = centre_targets(boxes, [tuple(level.shape[-2:]) for level in heat], config)
    yield "centres", targets.centres.sort().values, pack["pos_inds"].sort().values
    yield "target heat", targets.heat, pack["heatmap"][:, 0]
    regress = pack["reg_targets"].amax(1) >= 0
    yield "points that learn a box", targets.regress, regress
    yield "target distances", targets.distances[regress], pack["reg_targets"][regress]
    losses = centre_losses(flatten_levels(heat)[:, 0], flatten_levels(distances), targets, config)
    for ours, theirs in (("box", "loc"), ("positive", "agn_pos"), ("negative", "agn_neg")):
        yield f"loss {ours}", losses[f"centre_{ours}"], pack[f"loss_centernet_{theirs}"]
    sum(losses.values()).backward()
    yield "gradient p3", levels[0].grad[:, :4], pack["grad_feat_p3"]
    yield "gradient heat", head.heat.weight.grad, pack["grad_agn_hm_w"]
    yield "gradient distances", head.distances.weight.grad, pack["grad_bbox_pred_w"]
    for mode in ("train", "test"):
        for image, found in enumerate(
            zip(*decode_proposals(heat, distances, config, training=mode == "train"), strict=True)
        ):
            order = pack[f"{mode}_scores_{image}"].argsort(descending=True)
            yield f"{mode} boxes", found[0], pack[f"{mode}_boxes_{image}"][order]
            yield f"{mode} scores", found[1], pack[f"{mode}_scores_{image}"][order]


def fedloss(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    count = int(pack["C"])
    labels = pack["gt_classes"].where(pack["gt_classes"] < count, -1)
    torch.manual_seed(int(re.findall(r"_s(\d+)", path.stem)[0]))
    chosen = federated_classes(labels, pack["freq_weight"], int(pack["num_sample_cats"]))
    # A set: recorded are the classes that occur, then those drawn, in the order of the draw.
    yield "classes", chosen.nonzero()[:, 0], pack["inds"][pack["inds"] < count].sort().values
    many = federated_classes(torch.arange(15), pack["freq_weight"], int(pack["num_sample_cats"]))
    yield "more classes than places", many.nonzero()[:, 0], pack["inds_more_than_budget"].sort().values


def boxloss(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    count = pack["scores"].shape[1] - 1
    labels = pack["gt_classes"].where(pack["gt_classes"] < count, -1)
    drawn = torch.zeros(count + 1, dtype=torch.bool).index_fill(0, pack["fed_inds"], True)[:-1]
    for variant, counted in (("plain", None), ("fed", drawn), ("ignore_zero", pack["freq_image_count"] > 0)):
        scores = pack["scores"].clone().requires_grad_()
        loss = sigmoid_loss(scores[:, :-1], labels, counted)
        loss.backward()
        yield f"{variant} class loss", loss, pack[f"{variant}_loss_cls"]
        yield f"{variant} class gradient", scores.grad, pack[f"{variant}_grad_scores"]
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    targets_R4 = coder.encode_single(pack["gt_boxes"], pack["proposal_boxes"])
    yield "coded boxes", targets_R4, pack["target_deltas"]
    yield "decoded boxes", coder.decode_single(pack["deltas"], pack["proposal_boxes"]), pack["applied"]
    deltas, objects = pack["deltas"].clone().requires_grad_(), labels >= 0
    loss = F.l1_loss(deltas[objects], targets_R4[objects], reduction="sum") / len(labels)
    loss.backward()
    yield "box loss", loss, pack["plain_loss_box_reg"]
    yield "box gradient", deltas.grad, pack["plain_grad_deltas"]


def inference(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    height, width = pack["image_size"].tolist()
    scores = combine_scores(pack["stage_scores"], pack["proposal_scores"])
    yield "scores", scores, pack["combined_scores"]
    boxes = clip_boxes_to_image(pack["boxes"], (height, width))
    for prefix, limits, used in (("out", "", scores), ("b", "b_", pack["mean_scores"])):
        threshold, limit = float(pack[f"{limits}thr"]), int(pack[f"{limits}topk"])
        found = select_detections(boxes, used[:, :-1], Selection(float(pack["nms"]), threshold, limit))
        for what, ours in zip(("boxes", "scores", "classes"), found, strict=True):
            yield f"{prefix} {what}", ours, pack[f"{prefix}_{what}"]


def zeroshot(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    concepts = concept_table(path)
    names, other = F.normalize(pack["det_raw"], dim=1), F.normalize(pack["classifier_override"], dim=1)
    regions = F.linear(pack["x"], pack["linear_weight"], pack["linear_bias"])
    # The released logits end with a background column, which is always 0.
    yield "caption training", F.pad(cosine_logits(regions, concepts, 50.0), (0, 1)), pack["out_train_caption"]
    yield "box training", F.pad(cosine_logits(regions, names, 50.0), (0, 1)), pack["out_train_box"]
    yield "evaluation", F.pad(cosine_logits(regions, names, 50.0), (0, 1)), pack["out_eval"]
    yield "other names", cosine_logits(regions, other, 50.0), pack["out_override"]
    yield "prototypes", F.pad(cosine_logits(pack["prototype_in"], concepts, 50.0), (0, 1)), pack["out_no_linear"]


def alignment(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    concepts = concept_table(path)
    size, count = int(pack["g"]), int(pack["N"])
    x, weight = pack["x"].requires_grad_(), pack["linear_weight"].requires_grad_()
    aggregation = LearnedAggregation(size, count)
    keys = {
        "hidden.weight": "fc1_weight",
        "hidden.bias": "fc1_bias",
        "score.weight": "fc2_weight",
        "score.bias": "fc2_bias",
    }
    aggregation.load_state_dict({ours: pack[theirs] for ours, theirs in keys.items()})
    features = F.linear(x, weight, pack["linear_bias"])
    rows = features.split((pack["counts"] + 1).tolist())  # each image's proposals, then the image itself
    regions = pad_sequence([F.pad(row[:-1], (0, 0, 0, count + 1 - len(row))) for row in rows], batch_first=True)
    chosen = pack["chosen_concept"]
    own = concepts[chosen]
    guidance = guidance_weights(own, torch.zeros(own.shape[1])) if pack["guided"] else torch.ones_like(own)
    aligned = aggregation(regions.view(-1, size, *regions.shape[1:]), guidance)
    prototypes = aligned.prototype.flatten(0, 1)
    logits = cosine_logits(prototypes, concepts, float(pack["temperature"]))
    yield "features", features, pack["feats"]
    yield "attention", aligned.attention.flatten(0, 1), pack["simi_weights"]
    yield "prototypes", prototypes, pack["prototype"]
    yield "logits", F.pad(logits, (0, 1)), pack["logits"]
    losses = group_losses(pack, logits, chosen.repeat_interleave(size), torch.stack([row[-1] for row in rows]))
    for what, ours, theirs in zip(("region loss", "caption loss"), losses, ("region", "caption"), strict=True):
        yield what, ours, pack[f"{theirs}_loss_per_image"]
    loss = pack["image_loss_weight"] * (losses[0].mean() + pack["caption_weight"] * losses[1].mean())
    loss.backward()
    yield "loss", loss, pack["image_loss"]
    yield "gradient x", x.grad, pack["grad_x"]
    yield "gradient linear", weight.grad, pack["grad_linear_weight"]
    yield "gradient fc1", aggregation.hidden.weight.grad, pack["grad_fc1_weight"]
    yield "gradient fc2", aggregation.score.weight.grad, pack["grad_fc2_weight"]


def group_losses(pack: Pack, logits: Tensor, concept: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Region-word loss with the released background column, a constant ln 2, and image-text loss of every image."""
    counted = torch.ones(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool)
    if pack["fed"]:
        counted = torch.zeros_like(counted).scatter(1, pack["fed_inds"], True)
    captions = F.normalize(pack["caption_feats_with_rank"][:, :-1], dim=1)
    same_rank = pack["caption_feats_with_rank"][:, -1] == pack["rank"]
    own = torch.nonzero(same_rank)[:, 0]
    region = [concept_loss(logits[[i]], concept[[i]], ~counted[[i], :-1]) + math.log(2) for i in range(len(logits))]
    caption = [caption_loss(images[[i]], captions, own[[i]], same_rank, 50.0) for i in range(len(logits))]
    return torch.stack(region), torch.stack(caption)

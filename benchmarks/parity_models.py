"""Our full-size CoDet models on the recorded inputs of the released ones: the large packs of `parity.py`.

A function of this module yields the compared quantities of a pack.
"""

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from parity_packs import PACKS, Pack, Quantity, group_losses, read
from reference import REFERENCE
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, clip_boxes_to_image

from ovd_models.codet.alignment import guidance_weights
from ovd_models.codet.model import CoDet
from ovd_models.detectors.centernet2 import CenterNet2
from ovd_models.detectors.masks import paste_masks
from ovd_models.importers.codet import (
    TEXT_PREFIX,
    Release,
    import_text_encoder,
    recognise_release,
    released_names,
    translate_state,
)
from ovd_models.losses import caption_loss, cosine_logits
from ovd_models.vocabulary import Vocabulary

COCO_CONCEPTS = "cococap_clip_a+cname.npy"
SAME_CONCEPT = 0.999
"""Cosine of guidance weights and a name's; those of any two names of LVIS are below 0.98."""


def text_encoder(path: Path) -> Iterator[Quantity]:
    pack = read(path)
    manifest = json.loads((PACKS / "manifests" / "codet_ovcoco_r50c4.json").read_text())
    state = {
        key.removeprefix(TEXT_PREFIX): filled(key, shape, "")
        for key, (shape, _) in manifest.items()
        if key.startswith(TEXT_PREFIX)
    }
    state["positional_embedding"] = state["positional_embedding"] * 0.3
    encoder = import_text_encoder(state, path.stem)
    captions = np.load(path)["captions"].tolist()
    yield "tokens", encoder.tokenizer(captions), pack["tokens"]
    yield "features", encoder.embed_captions(captions), F.normalize(pack["features"], dim=1)


@functools.cache
def fill_rule() -> ModuleType:
    """The module that gives the packs' models their weights."""
    spec = importlib.util.spec_from_file_location("fill", PACKS / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(name: str, shape: list[int], special: str) -> Tensor:
    """The weight that the packs' rule gives to a released name."""
    fill = fill_rule()
    array = fill.value(name, tuple(shape))
    for pattern, scale, shift in fill.SPECIAL.get(special, []):
        if re.search(pattern, name):
            array = array * np.float32(scale) + np.float32(shift)
    return torch.from_numpy(array)


def manifest_shapes(manifest: str) -> dict[str, list[int]]:
    entries = json.loads((PACKS / "manifests" / f"{manifest}.json").read_text())
    left_out = re.compile(r"text_encoder|zs_weight|detection_weight|base\.fc|weight_transform")
    return {name: shape for name, (shape, _) in entries.items() if not left_out.search(name)}


def manifest_release(manifest: str) -> Release:
    return recognise_release(manifest_shapes(manifest), manifest)


def filled_model(manifest: str, special: str, size: tuple[int, int]) -> CoDet:
    """The model of a manifest with the rule's weights, for images that are not to be resized."""
    release = manifest_release(manifest)
    part = "centernet2" if release.config.architecture == "centernet2" else "detector"
    sized = dataclasses.replace(getattr(release.config, part), min_size=min(size), max_size=max(size))
    release = dataclasses.replace(release, config=dataclasses.replace(release.config, **{part: sized}))
    state = {name: filled(name, shape, special) for name, shape in manifest_shapes(manifest).items()}
    model = CoDet(release.config)
    model.load_state_dict(translate_state(state, model, release, manifest))
    return model.eval()


def statistics(values: Tensor) -> Tensor:
    """What the packs keep of large tensors: sum, sum of magnitudes, deviation, least and greatest."""
    x = values.detach().double()
    return torch.stack([x.sum(), x.abs().sum(), x.std(), x.min(), x.max()])


def sampled(values: Tensor, count: int) -> Tensor:
    """`count` values at even distances."""
    return values.detach().flatten()[torch.from_numpy(np.linspace(0, values.numel() - 1, count).astype(np.int64))]


def embedded(file: str) -> Tensor:
    rows = np.load(REFERENCE / "data" / "lvis" / file).astype(np.float32)
    return F.normalize(torch.from_numpy(rows), dim=1)


def paired(ours: Tensor, scores: Tensor, theirs: Tensor, their_scores: Tensor) -> Iterator[Quantity]:
    """Proposals are sets: each of theirs is compared with the nearest of ours in place and score, and the reverse."""
    width = float(theirs.max())
    entries = [torch.column_stack((box / width, score)) for box, score in ((theirs, their_scores), (ours, scores))]
    distance = torch.cdist(entries[0], entries[1])
    nearest, back = distance.argmin(1), distance.argmin(0)
    yield "proposals", ours[nearest], theirs
    yield "proposal scores", scores[nearest], their_scores
    yield "proposals, the reverse", ours, theirs[back]
    yield "proposal scores, the reverse", scores, their_scores[back]


@torch.no_grad()
def ovcoco(path: Path) -> Iterator[Quantity]:
    pack, names = read(path), embedded("coco_clip_vitb32_a_name.npy")
    model = filled_model(f"codet_{path.stem}", path.stem, tuple(pack["hw"].tolist()))
    detector = model.detector
    image = pack["image"].permute(2, 0, 1).flip(0)  # recorded as blue, green, red
    batch = detector.preprocess([image])
    yield "pixels", statistics(batch.tensors), pack["preprocessed_stats"]
    features = detector.features(batch)
    yield "res4", sampled(features["0"], 2048), pack["feat_res4_slice"]
    boxes = detector.propose(batch, features).boxes[0]
    nearest = box_iou(pack["prop_boxes"], boxes).argmax(1)
    yield "proposals", boxes[nearest], pack["prop_boxes"]
    regions = detector.region_features(features, [pack["prop_boxes"]])
    yield "box deltas", detector.box_deltas(regions), pack["deltas"]
    logits = F.pad(cosine_logits(detector.projection(regions), names, 50.0), (0, 1))
    yield "logits", sampled(logits, 8192), pack["logits_slice"]
    yield "logit statistics", statistics(logits), pack["logits_stats"]
    yield from detections(model, image, names, pack, 0.05, 100)


def detections(
    model: CoDet, image: Tensor, names: Tensor, pack: Pack, threshold: float, limit: int
) -> Iterator[Quantity]:
    vocabulary = Vocabulary(tuple(map(str, range(len(names)))), names)
    (found,) = model.detect([image], vocabulary, score_threshold=threshold, max_detections=limit)
    yield "detected classes", found.labels, pack["det_classes"]
    yield "detected boxes", found.boxes, pack["det_boxes"]
    yield "detection scores", found.scores, pack["det_scores"]
    yield "boxes at twice the size", found.boxes * 2, pack["post_boxes"]


@torch.no_grad()
def ovlvis(path: Path) -> Iterator[Quantity]:
    pack, names = read(path), embedded("lvis_v1_clip_vitb32_a_name.npy")
    model = filled_model(f"codet_{path.stem}", path.stem, tuple(pack["hw"].tolist()))
    detector = model.detector
    assert isinstance(detector, CenterNet2)
    image = pack["image"].permute(2, 0, 1)
    batch = detector.preprocess([image])
    yield "pixels", statistics(batch.tensors), pack["preprocessed_stats"]
    features = detector.features(batch)
    for level, values in enumerate(features.values(), start=8 - len(features)):  # the last one is P7
        theirs = pack[f"feat_p{level}_slice"]
        yield f"p{level}", sampled(values, len(theirs)), theirs
    proposals = detector.propose(batch, features)
    yield from paired(proposals.boxes[0], proposals.scores[0], pack["prop_boxes"], pack["prop_scores"])
    for index, output in enumerate(detector.cascade(features, [pack["prop_boxes"]], batch.image_sizes)):
        logits = F.pad(cosine_logits(output.embeddings, names, 50.0), (0, 1))
        yield f"stage {index} logits", sampled(logits, 8192), pack[f"stage{index}_logits_slice"]
        yield f"stage {index} logit statistics", statistics(logits), pack[f"stage{index}_logits_stats"]
        yield f"stage {index} deltas", output.deltas, pack[f"stage{index}_deltas"]
        yield f"stage {index} boxes", detector.stages[index].refined(output)[0], pack[f"stage{index}_boxes"]
    yield from detections(model, image, names, pack, 0.02, 300)
    masks = detector.mask_logits(features, [pack["det_boxes"]]).sigmoid()
    yield "masks", masks[: len(pack["det_masks_slice"])], pack["det_masks_slice"]
    yield "mask statistics", statistics(masks), pack["det_masks_stats"]
    height, width = (2 * side for side in pack["hw"].tolist())
    areas = paste_masks(masks, pack["post_boxes"], height, width).sum((1, 2))
    yield "mask areas", areas, pack["post_mask_area"]


def caption_ovlvis(path: Path) -> Iterator[Quantity]:
    pack, whole = read(path), path.stem.removeprefix("caption_")
    count, size = len(pack["top_boxes_0"]) - 1, int(pack["g"])
    concepts = F.normalize(filled("cc3m_zs_standin", [512, 4706], "").T, dim=1)
    model = filled_model(f"codet_{whole}", whole, tuple(pack["images"].shape[1:3])).train()
    detector = model.detector
    assert isinstance(detector, CenterNet2)
    batch = detector.preprocess(list(pack["images"].permute(0, 3, 1, 2)))
    features = detector.features(batch)
    proposals = detector.propose(batch, features)
    for image, (boxes, scores) in enumerate(zip(proposals.boxes, proposals.scores, strict=True)):
        inside = clip_boxes_to_image(boxes[:count], batch.image_sizes[image])
        theirs = pack[f"top_boxes_{image}"][:-1], pack[f"top_scores_{image}"][:-1]
        yield from paired(inside, scores[:count], *theirs)
    # The MLP depends on the ranks of proposals, so theirs are used from here on, in their order.
    outputs = detector.cascade(features, [pack[f"top_boxes_{image}"] for image in range(size)], batch.image_sizes)
    total, chosen = torch.zeros(()), torch.full((size,), 77)
    for stage, output in enumerate(outputs):
        rows = output.embeddings.view(size, count + 1, -1)
        regions = rows[None, :, :-1]
        aligned = model.aggregations[stage](regions, torch.ones(1, regions.shape[-1]))
        yield f"stage {stage} attention", aligned.attention[0], pack[f"st{stage}_weights"]
        yield f"stage {stage} prototypes", aligned.prototype[0], pack[f"st{stage}_prototype"]
        recorded = {"fed": True, "fed_inds": pack["fed_inds"][stage * size : (stage + 1) * size], "rank": 0}
        recorded["caption_feats_with_rank"] = F.pad(pack["caption_feats"], (0, 1))
        region, caption = group_losses(
            recorded, cosine_logits(aligned.prototype[0], concepts, 50.0), chosen, rows[:, -1]
        )
        yield f"stage {stage} region loss", region, pack[f"st{stage}_region_loss"]
        yield f"stage {stage} caption loss", caption, pack[f"st{stage}_caption_loss"]
        loss = 0.2 * (region.mean() + caption.mean())
        yield f"stage {stage} loss", loss, pack[f"loss:image_loss_stage{stage}"]
        total = total + loss
    total.backward()
    yield from gradients(model, f"codet_{whole}", pack)


def gradients(model: CoDet, manifest: str, pack: Pack) -> Iterator[Quantity]:
    """Statistics and samples of the recorded gradients, scaled to the greatest of each tensor."""
    release = manifest_release(manifest)
    parameters = {
        theirs: parameter for ours, parameter in model.named_parameters() for theirs in released_names(ours, release)
    }
    for key, theirs in pack.items():
        if key.startswith("grad:") and not key.endswith("fc2.bias"):  # a softmax ignores it: rounding noise
            gradient = parameters[key.removeprefix("grad:")].grad
            assert gradient is not None
            ours = torch.cat((statistics(gradient), sampled(gradient, len(theirs) - 5)))
            scale = theirs[3:5].abs().max()
            yield f"gradient {key.removeprefix('grad:')}", ours[3:] / scale, theirs[3:] / scale


def coco_concepts() -> Tensor | None:
    """[634, D] unit rows of the concepts of OV-COCO's captions, a published file; None where it is not at hand."""
    path = REFERENCE / "data" / "lvis" / COCO_CONCEPTS
    return embedded(COCO_CONCEPTS) if path.is_file() else None


def caption_ovcoco(path: Path) -> Iterator[Quantity]:
    pack, whole = read(path), path.stem.removeprefix("caption_")
    count, size = len(pack["top_boxes_0"]) - 1, int(pack["g"])
    groups, table = len(pack["images"]) // size, coco_concepts()
    model = filled_model(f"codet_{whole}", whole, tuple(pack["images"].shape[1:3])).train()
    detector = model.detector
    batch = detector.preprocess(list(pack["images"].permute(0, 3, 1, 2).flip(1)))
    features = detector.features(batch)
    for image, boxes in enumerate(detector.propose(batch, features).boxes):
        theirs = pack[f"top_boxes_{image}"][:-1]
        yield f"proposals of image {image}", boxes[:count][box_iou(theirs, boxes[:count]).argmax(1)], theirs
    given = [pack[f"top_boxes_{image}"] for image in range(groups * size)]
    rows = detector.projection(detector.region_features(features, given)).view(groups * size, count + 1, -1)
    captions = F.normalize(pack["caption_feats"], dim=1)
    same_rank = torch.ones(len(rows), dtype=torch.bool)
    caption = torch.stack(
        [caption_loss(rows[[i], -1], captions, torch.tensor([i]), same_rank, 50.0) for i in range(len(rows))]
    )
    yield "caption loss", caption, pack["st0_caption_loss"]
    regions = rows[:, :-1].view(groups, size, count, -1)
    if table is None:
        # A group's 512 weights are solved for from its 1,024 recorded similarities; that one set of weights explains
        # them all is what is checked, and what follows from them.
        guidance = torch.empty(groups, regions.shape[-1])
        for group, pair in enumerate(F.normalize(regions.detach(), dim=-1).double()):
            products = torch.einsum("ad,bd->abd", *pair).flatten(0, 1)
            recorded = pack["st0_simi_slice"][size * group].double()
            weights = torch.linalg.lstsq(products, recorded[:, None], driver="gelsd").solution[:, 0]
            yield f"similarities of group {group}", products @ weights, recorded
            guidance[group] = weights
            yield from known_concept(group, guidance[group])
    else:
        chosen = shared_labels(pack["labels"].view(groups, size, -1))
        guidance = model.guidance(chosen, table)
    aligned = model.aggregations[0](regions, guidance)
    prototypes = aligned.prototype.flatten(0, 1)
    yield "attention", aligned.attention.flatten(0, 1), pack["st0_weights"]
    yield "prototypes", prototypes, pack["st0_prototype"]
    config, region = model.config, pack["st0_region_loss"]
    if table is not None:
        kinds = {"fed": False, "rank": 0, "caption_feats_with_rank": F.pad(pack["caption_feats"], (0, 1))}
        concept = chosen.repeat_interleave(size)
        region, _ = group_losses(kinds, cosine_logits(prototypes, table, 50.0), concept, rows[:, -1])
        yield "region loss", region, pack["st0_region_loss"]
    loss = config.concept_weight * region.mean() + config.caption_weight * caption.mean()
    yield "loss", loss, pack["loss:image_loss"]
    if table is not None:
        loss.backward()
        yield from gradients(model, f"codet_{whole}", pack)


def shared_labels(labels_GgL: Tensor) -> Tensor:
    """[G] the label that all images of a group have; -1 fills up."""
    common = [set.intersection(*(set(row.tolist()) for row in group)) - {-1} for group in labels_GgL]
    return torch.tensor([label for (label,) in common])


def known_concept(group: int, weights: Tensor) -> Iterator[Quantity]:
    """A group's guidance, if its concept is a name of LVIS, whose embeddings are at hand."""
    names = embedded("lvis_v1_clip_vitb32_a_name.npy")
    magnitude = F.normalize(names.abs(), dim=1) @ F.normalize(weights, dim=0)
    if magnitude.max() > SAME_CONCEPT:  # the rows have three digits, so single weights cannot be compared
        own = guidance_weights(names[magnitude.argmax()][None], torch.zeros(names.shape[1]))[0]
        yield f"guidance of group {group}, its cosine", F.cosine_similarity(own, weights, dim=0), 1.0

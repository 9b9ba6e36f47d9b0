import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from faster_coco_eval import mask as rle
from tiny_centernet2 import TINY_CENTERNET2
from torch.nn import functional as F
from torchvision.ops import box_iou

from ovd_models.batches import ConceptBatch, DetectionBatch
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.centernet2 import (
    CenterNet2,
    StageOutput,
    combine_scores,
    match_boxes,
    match_targets,
)
from ovd_models.detectors.eva import EvaConfig
from ovd_models.detectors.feature_pyramid import pool_regions
from ovd_models.detectors.masks import encode_masks, paste_masks
from ovd_models.detectors.resizing import resize_masks
from ovd_models.errors import InputError
from ovd_models.losses import federated_classes, sigmoid_loss
from ovd_models.vocabulary import Vocabulary

TINY = dataclasses.replace(
    TINY_CENTERNET2,
    embed_dim=16,
    min_size=64,
    max_size=128,
    rois_per_image=32,
)
MODEL = CoDetConfig(architecture="centernet2", centernet2=TINY, num_proposals=6)


def blocks() -> DetectionBatch:
    """Two pictures: a red and a blue square on grey."""
    images, boxes = [], []
    for colour, (x, y) in ((0, (8, 20)), (2, (24, 6))):
        image = torch.full((3, 64, 64), 110, dtype=torch.uint8)
        image[:, y : y + 28, x : x + 28] = 20
        image[colour, y : y + 28, x : x + 28] = 240
        images.append(image)
        boxes.append(torch.tensor([[x, y, x + 28.0, y + 28.0]]))
    return DetectionBatch(tuple(images), tuple(boxes), (torch.tensor([0]), torch.tensor([1])))


def groups() -> ConceptBatch:
    pictures = blocks().images
    mentioned = torch.zeros(4, 3, dtype=torch.bool)
    captions = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    return ConceptBatch(
        (pictures[0], pictures[0], pictures[1], pictures[1]), torch.tensor([0, 2]), mentioned, ("",) * 4, captions
    )


# ------------------------------------------------------------------------------------------------------ parts


def test_scores_are_the_root_of_the_mean_class_score_times_the_proposals() -> None:
    stages = torch.tensor([[[0.2, 0.6]], [[0.4, 0.0]]])
    assert combine_scores(stages, torch.tensor([0.3]))[0].tolist() == pytest.approx([0.3, 0.3])


def test_a_region_takes_the_class_of_the_box_that_it_overlaps_enough() -> None:
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]]), "labels": torch.tensor([4, 7])}
    regions = torch.tensor([[20.0, 0, 30, 8], [0, 0, 10, 5], [50, 50, 60, 60]])  # overlap 0.8 of the second, 0.5, none
    labels, boxes = match_targets(regions, truth, 0.6)
    assert labels.tolist() == [7, -1, -1]
    assert boxes[0].tolist() == [20, 0, 30, 10]
    assert match_boxes(regions, truth["boxes"], 0.5).tolist() == [1, 0, -1]
    nobody = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert match_targets(regions, nobody, 0.6)[0].tolist() == [-1, -1, -1]


def test_federated_classes_are_those_that_occur_and_draws_up_to_the_count() -> None:
    labels = torch.tensor([3, -1, 3, 5])
    weight = torch.tensor([0.0, 1, 1, 1, 0, 1, 1, 0])
    chosen = federated_classes(labels, weight, 5, torch.Generator().manual_seed(0))
    assert bool(chosen[[3, 5]].all())
    assert int(chosen.sum()) == 4  # background took a place
    assert not bool(chosen[[0, 4, 7]].any())  # of weight 0: never drawn
    assert federated_classes(labels, weight, 1).nonzero()[:, 0].tolist() == [3, 5]  # what occurs always counts
    assert int(federated_classes(labels[1:2], weight, 50).sum()) == 5  # no more than there are


def test_class_loss_leaves_out_the_classes_that_are_not_counted() -> None:
    logits, labels = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([0])
    counted = torch.tensor([True, False, True])
    assert torch.equal(sigmoid_loss(logits, labels, counted), sigmoid_loss(logits[:, [0, 2]], labels))


def test_regions_are_pooled_where_they_lie_without_a_shift() -> None:
    # A map that holds each cell's own centre: the mean over a region is the region's centre.
    x = (torch.arange(16) + 0.5) * 8
    level = torch.stack((x.expand(16, 16), x[:, None].expand(16, 16)))[None]
    box = torch.tensor([[20.0, 36.0, 52.0, 100.0]])
    pooled = pool_regions([level, F.avg_pool2d(level, 2)], (8, 16), [box], 2)
    assert pooled.mean((2, 3))[0].tolist() == pytest.approx([36, 68])


def test_large_regions_are_pooled_from_the_coarse_level() -> None:
    levels = [torch.zeros(2, 1, 64, 64), torch.ones(2, 1, 32, 32)]
    boxes = [torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([[0.0, 0, 230, 230], [0, 0, 0, 0]])]
    assert pool_regions(levels, (8, 16), boxes, 1).flatten().tolist() == [0, 1, 0]
    assert pool_regions(levels, (8, 16), [torch.zeros(0, 4)] * 2, 7).shape == (0, 1, 7, 7)


def test_a_full_mask_fills_its_box_and_nothing_else() -> None:
    masks = torch.stack((torch.ones(4, 4), torch.tensor([[1.0, 1, 0, 0]]).expand(4, 4)))
    pasted = paste_masks(masks, torch.tensor([[2.0, 3, 6, 5], [0, 0, 8, 4]]), 10, 12)
    wanted = torch.zeros(2, 10, 12, dtype=torch.bool)
    wanted[0, 3:5, 2:6] = True
    wanted[1, 0:4, 0:4] = True  # the left half
    assert torch.equal(pasted, wanted)
    flat = paste_masks(masks[:1], torch.tensor([[3.0, 3, 3, 9]]), 10, 12)
    assert not bool(flat.any())  # a box without an area
    assert paste_masks(torch.zeros(0, 4, 4), torch.zeros(0, 4), 10, 12).shape == (0, 10, 12)


def test_a_mask_pasted_into_its_box_is_that_of_the_whole_image() -> None:
    generator = torch.Generator().manual_seed(0)
    corner, side = torch.rand(2, 60, 2, generator=generator) * torch.tensor([30.0, 20])
    boxes = torch.cat([corner - 6, corner - 6 + side], 1)
    boxes[:3] = torch.tensor([[-20.0, -9, -3, 40], [40, 2, 50, 9], [4, 5, 4, 9]])  # outside, and without an area
    masks = torch.rand(60, 28, 28, generator=generator)
    x, y = torch.meshgrid(torch.arange(30) + 0.5, torch.arange(20) + 0.5, indexing="xy")
    for mask, box, found in zip(masks, boxes, paste_masks(masks, boxes, 20, 30), strict=True):
        width, height = (box[2:] - box[:2]).clamp(min=1e-6)
        grid = torch.stack([(x - box[0]) / width * 2 - 1, (y - box[1]) / height * 2 - 1], -1)
        assert torch.equal(F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5, found)


def test_pasting_a_mask_samples_its_box_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = []

    def grid_sample(values: torch.Tensor, grid: torch.Tensor, **settings: Any) -> torch.Tensor:
        sampled.append(tuple(grid.shape[1:3]))
        return real(values, grid, **settings)

    real = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", grid_sample)
    paste_masks(torch.ones(2, 4, 4), torch.tensor([[100.5, 50, 110, 55], [0, 0, 3, 4]]), 1000, 2000)
    assert sampled == [(7, 12), (5, 4)]


def test_regions_of_a_stage_are_the_refined_boxes_of_the_one_before() -> None:
    torch.manual_seed(0)
    model = CenterNet2(TINY).eval()
    batch = model.preprocess(blocks().images)
    boxes = [torch.tensor([[4.0, 4, 30, 40], [-9, 8, 70, 30]]), torch.zeros(0, 4)]
    outputs = model.cascade(model.features(batch), boxes, batch.image_sizes)
    assert [len(output.embeddings) for output in outputs] == [2, 2, 2]
    for before, after, stage in zip(outputs, outputs[1:], model.stages, strict=False):
        assert isinstance(before, StageOutput)
        assert torch.equal(stage.refined(before)[0].clamp(0, 64), after.boxes[0])
        assert not after.boxes[0].requires_grad


# -------------------------------------------------------------------------------------------------- whole model


def without_gradient(model: CoDet, losses: dict[str, torch.Tensor]) -> list[str]:
    model.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    return [name for name, value in model.named_parameters() if value.grad is None]


NAMES = [
    "centre_box", "centre_positive", "centre_negative",
    *(f"{name}_{stage}" for stage in range(3) for name in ("classes", "box")), "mask",
]  # fmt: skip


def test_one_forward_gives_the_losses_of_all_stages_and_every_parameter_a_gradient() -> None:
    torch.manual_seed(0)
    model = CoDet(MODEL)
    losses = model(blocks(), groups(), torch.eye(16)[:2], torch.eye(16)[:3])
    assert list(losses) == [*NAMES, "concept", "caption"]
    assert all(bool(torch.isfinite(value)) and value.ndim == 0 for value in losses.values())
    assert losses["mask"] == 0  # this batch has no masks
    assert without_gradient(model, losses) == []


def test_images_without_boxes_give_finite_losses_and_use_every_parameter() -> None:
    torch.manual_seed(0)
    model, batch = CoDet(MODEL), blocks()
    empty = dataclasses.replace(batch, boxes=(torch.zeros(0, 4),) * 2, labels=(torch.zeros(0, dtype=torch.int64),) * 2)
    losses = model(empty, None, torch.eye(16)[:2], None)
    assert list(losses) == NAMES
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert losses["box_0"] == losses["centre_box"] == 0
    assert without_gradient(model, losses) == []


def test_losses_stay_finite_in_half_precision() -> None:
    torch.manual_seed(0)
    model = CoDet(MODEL)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(blocks(), groups(), torch.eye(16)[:2], torch.eye(16)[:3])
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    exact = model(blocks(), groups(), torch.eye(16)[:2], torch.eye(16)[:3])
    for name in ("centre_box", "centre_negative"):
        assert losses[name].item() == pytest.approx(exact[name].item(), rel=0.1)


def test_true_masks_train_the_mask_head() -> None:
    torch.manual_seed(0)
    model, batch = CenterNet2(TINY), blocks()
    images = model.preprocess(batch.images)
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 20:48, 8:36] = True
    targets = [
        {"boxes": batch.boxes[0], "labels": batch.labels[0], "masks": masks},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]},
    ]
    features = model.features(images)
    losses = model.detection_losses(images, features, model.propose(images, features), targets, torch.eye(16)[:2])
    losses["mask"].backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in model.mask_head.parameters())


def test_the_mask_loss_of_a_region_compares_with_the_true_mask_inside_it() -> None:
    torch.manual_seed(0)
    model = CenterNet2(TINY).eval()
    images = model.preprocess(blocks().images[:1])
    features = model.features(images)
    # The true mask is the left half of the region: 14 of 28 columns.
    region, masks = torch.tensor([[8.0, 20, 36, 48]]), torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, :, :22] = True
    target = {"boxes": region, "labels": torch.tensor([0]), "masks": masks}
    goal = torch.zeros(1, 28, 28)
    goal[..., :14] = 1
    expected = F.binary_cross_entropy_with_logits(model.mask_logits(features, [region]), goal)
    assert model._mask_loss(features, [region], [target]).item() == pytest.approx(expected.item(), rel=1e-5)
    missed = torch.tensor([[40.0, 0, 60, 10]])
    assert model._mask_loss(features, [missed], [target]) == 0


def test_the_federated_loss_never_draws_classes_that_no_image_shows() -> None:
    torch.manual_seed(0)
    model, batch, text = CenterNet2(TINY).eval(), blocks(), F.normalize(torch.randn(30, 16), dim=1)
    images = model.preprocess(batch.images)
    features = model.features(images)
    targets = [{"boxes": box, "labels": label} for box, label in zip(batch.boxes, batch.labels, strict=True)]
    proposals = model.propose(images, features)
    every = model.detection_losses(images, features, proposals, targets, text)
    model.set_image_counts(torch.tensor([1.0, 1.0] + [0.0] * 28))
    shown = model.detection_losses(images, features, proposals, targets, text)
    for stage in range(3):  # of the 30 classes, 2 count
        assert shown[f"classes_{stage}"] < every[f"classes_{stage}"] / 5


def test_every_stage_has_its_learned_aggregation() -> None:
    torch.manual_seed(0)
    model = CoDet(dataclasses.replace(MODEL, aggregation="learned", guidance="none", group_size=2))
    losses = model(blocks(), groups(), torch.eye(16)[:2], torch.eye(16)[:3])
    assert bool(torch.isfinite(losses["concept"]))
    assert without_gradient(model, losses) == []
    assert len(model.aggregations) == 3
    with pytest.raises(InputError, match="group_size: 0"):
        CoDet(dataclasses.replace(MODEL, aggregation="learned"))
    with pytest.raises(InputError, match='guidance: "support", expected'):
        CoDet(dataclasses.replace(MODEL, aggregation="learned", group_size=2))


def test_any_image_gives_detections_inside_itself() -> None:
    torch.manual_seed(0)
    model = CoDet(MODEL).eval()
    images = [torch.randint(0, 255, (3, 50, 90), dtype=torch.uint8), torch.zeros(3, 1, 300, dtype=torch.uint8)]
    words = Vocabulary(("red", "blue"), torch.eye(16)[:2])
    for found, image in zip(model.detect(images, words, score_threshold=0.0, max_detections=7), images, strict=True):
        assert (found.height, found.width) == tuple(image.shape[1:])
        assert len(found) <= 7
        assert bool((found.boxes >= 0).all())
        assert bool((found.boxes <= torch.tensor([found.width, found.height] * 2)).all())
    assert len(model.detect(images[:1], words, score_threshold=1.0)[0]) == 0


def test_detections_have_masks_inside_their_boxes_if_masks_are_learned() -> None:
    torch.manual_seed(0)
    words = Vocabulary(("red", "blue"), torch.eye(16)[:2])
    images = [blocks().images[0], torch.zeros(3, 40, 90, dtype=torch.uint8)]
    for found in CoDet(MODEL).eval().detect(images, words, score_threshold=0.0, max_detections=5):
        assert found.masks is not None
        assert len(found.masks) == len(found)
        for counts, box in zip(found.masks, found.boxes, strict=True):
            mask = torch.from_numpy(rle.decode({"size": [found.height, found.width], "counts": counts.encode()}))
            y, x = torch.nonzero(mask, as_tuple=True)
            assert bool((x + 1 > box[0]).all() and (y + 1 > box[1]).all())
            assert bool((x < box[2]).all() and (y < box[3]).all())
    plain = CoDet(dataclasses.replace(MODEL, centernet2=dataclasses.replace(TINY, mask_convs=0))).eval()
    assert plain.detect(images, words)[0].masks is None


def test_distinct_objects_overlap_no_other_and_have_their_own_masks() -> None:
    torch.manual_seed(0)
    model = CoDet(MODEL).eval()
    (encoded,) = model.encode([blocks().images[0]])
    words = Vocabulary(tuple("abcdefgh"), torch.eye(16)[:8])
    find = partial(model.find, encoded, words, score_threshold=0.0, max_detections=100)
    pairs, objects = find(), find(distinct=True)
    assert len(objects.distinct()) == len(objects)
    assert len(pairs.distinct()) < len(pairs)
    assert objects.masks is not None
    assert len(objects.masks) == len(objects)


def test_encoded_masks_are_the_pasted_ones() -> None:
    probability = torch.rand(40, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2.0, 1, 17, 12]]).repeat(40, 1) + torch.arange(40)[:, None] / 10
    pasted = paste_masks(probability, boxes, 20, 30)
    for counts, mask in zip(encode_masks(probability, boxes, 20, 30), pasted, strict=True):
        decoded = rle.decode({"size": [20, 30], "counts": counts.encode()})
        assert torch.equal(torch.from_numpy(decoded).bool(), mask)
    assert encode_masks(probability[:0], boxes[:0], 20, 30) == ()


def test_masks_of_a_batch_train_the_mask_head() -> None:
    torch.manual_seed(0)
    model, batch = CoDet(MODEL), blocks()
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 20:48, 8:36] = True
    with_masks = dataclasses.replace(batch, masks=(masks, torch.zeros(1, 64, 64, dtype=torch.bool)))
    losses = model(with_masks, None, torch.eye(16)[:2], None)
    assert losses["mask"] > 0
    assert model(batch, None, torch.eye(16)[:2], None)["mask"] == 0


def test_masks_are_resized_with_their_picture_by_hand() -> None:
    mask = torch.tensor([[[True, False], [False, False]]])
    # The image of 2 x 2 pixels was widened by two columns.
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(resize_masks(mask, (2, 4), (4, 8))[0], expected)
    assert resize_masks(mask[:0], (2, 4), (4, 8)).shape == (0, 4, 8)


def test_a_name_scores_as_its_best_synonym() -> None:
    torch.manual_seed(0)
    model, images = CoDet(MODEL).eval(), blocks().images
    alone = model.detect(images, Vocabulary(("red",), torch.eye(16)[:1]), score_threshold=0.0, max_detections=5)
    rows = torch.cat((torch.eye(16)[:1], -torch.eye(16)[:1]))
    both = Vocabulary(("red",), rows, owners=torch.tensor([0, 0]))
    for one, two in zip(alone, model.detect(images, both, score_threshold=0.0, max_detections=5), strict=True):
        assert bool((two.scores >= one.scores - 1e-6).all())
        assert two.names == ("red",)


def test_a_transformer_can_be_the_backbone() -> None:
    torch.manual_seed(0)
    small = EvaConfig(width=32, depth=3, heads=2, hidden=40, trained_grid=4, drop_path=0.0)
    for config in (
        dataclasses.replace(TINY, backbone="eva02", eva=small, strides=(4, 8, 16, 32)),
        dataclasses.replace(
            TINY,
            backbone="swin",
            backbone_options={
                **{"patch_size": [4, 4], "window_size": [7, 7], "embed_dim": 16},
                **{"depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "stochastic_depth_prob": 0.0},
            },
        ),
    ):  # fmt: skip
        model = CoDet(dataclasses.replace(MODEL, centernet2=config))
        losses = model(blocks(), groups(), torch.eye(16)[:2], torch.eye(16)[:3])
        assert without_gradient(model, losses) == []


@pytest.mark.slow
def test_two_images_are_overfitted() -> None:
    torch.manual_seed(0)
    text, batch = torch.eye(16)[:2], blocks()
    model = CoDet(MODEL)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(120):
        losses = model(batch, None, text, None)
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
    found = model.eval().detect(batch.images, Vocabulary(("red", "blue"), text), score_threshold=0.3)
    for image, box, label in zip(found, batch.boxes, batch.labels, strict=True):
        assert image.labels[:1].tolist() == label.tolist()
        assert float(box_iou(image.boxes[:1], box)) > 0.7

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d, box_iou, nms

from ovd_models.detectors import sampling
from ovd_models.detectors.rcnn import (
    RCNN,
    ProposalNetwork,
    RCNNConfig,
    StridedAnchors,
    sample_regions,
)
from ovd_models.detectors.resizing import ResizedImages, Selection, select_detections
from ovd_models.detectors.sampling import suppress
from ovd_models.errors import InputError
from ovd_models.export.tracing import select_traced
from ovd_models.preprocess import add_edge
from ovd_models.vocabulary import Vocabulary

CONFIG = RCNNConfig(
    backbone_options={"channels": [8, 16, 24, 32], "stem_width": 8},
    pyramid_channels=16,
    head_width=32,
    embed_dim=16,
    min_size=64,
    max_size=128,
    pre_nms=60,
    post_nms=30,
)


def words(count: int) -> Vocabulary:
    rows = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
    return Vocabulary(tuple(f"name {n}" for n in range(count)), F.normalize(rows, dim=1))


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    coarse = torch.randint(0, 255, (1, 3, 5, 5), generator=torch.Generator().manual_seed(seed)).float()
    return F.interpolate(coarse, (height, width), mode="bilinear")[0].to(torch.uint8)


@pytest.fixture
def detector() -> RCNN:
    torch.manual_seed(0)
    return RCNN(CONFIG).eval()


def test_detections_are_in_the_image_sorted_and_of_the_vocabulary(detector: RCNN) -> None:
    images = [noise(64, 96), noise(150, 70, 1), noise(31, 33, 2)]
    found = detector.detect(images, words(4), score_threshold=0.0, max_detections=9)
    for image, entry in zip(images, found, strict=True):
        assert (entry.height, entry.width) == tuple(image.shape[1:])
        assert 0 < len(entry) <= 9
        assert entry.names == words(4).names
        assert entry.scores.tolist() == sorted(entry.scores.tolist(), reverse=True)
        assert bool((entry.boxes[:, :2] >= 0).all() and (entry.boxes[:, :2] <= entry.boxes[:, 2:]).all())
        assert float(entry.boxes[:, 2].max()) <= entry.width
        assert float(entry.boxes[:, 3].max()) <= entry.height


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_blank_image_has_no_detections(detector: RCNN, value: int) -> None:
    found = detector.detect([torch.full((3, 64, 64), value, dtype=torch.uint8)], words(3), score_threshold=1.0)
    assert len(found[0]) == 0
    assert found[0].boxes.shape == (0, 4)
    assert found[0].to_list() == []


def test_one_name_is_enough(detector: RCNN) -> None:
    found = detector.detect([noise(64, 64)], words(1), score_threshold=0.0)
    assert set(found[0].labels.tolist()) == {0}


def test_boxes_are_those_of_the_original_image(detector: RCNN) -> None:
    # Pictures of twice and three times the size are reduced to the same 64 px: the same boxes, scaled.
    small = noise(64, 96)
    for factor in (2, 3):
        large = small.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        first, second = (detector.detect([image], words(3), score_threshold=0.0)[0] for image in (small, large))
        matched = box_iou(second.boxes / factor, first.boxes).amax(1)
        assert float(matched[:20].min()) > 0.6
        assert float(matched[:20].mean()) > 0.9
        assert (second.width, second.height) == (96 * factor, 64 * factor)


def test_an_image_is_detected_alike_alone_and_in_a_batch_of_its_size(detector: RCNN) -> None:
    images = [noise(64, 96, seed) for seed in range(3)]
    together = detector.detect(images, words(3), score_threshold=0.0)
    for image, expected in zip(images, together, strict=True):
        alone = detector.detect([image], words(3), score_threshold=0.0)[0]
        assert torch.allclose(alone.scores, expected.scores, atol=1e-5)
        assert torch.allclose(alone.boxes, expected.boxes, atol=1e-2)


def test_boxes_are_exact_under_autocast(detector: RCNN) -> None:
    # bfloat16 knows every fourth pixel only beyond 512.
    batch = detector.preprocess([torch.zeros(3, 64, 1024, dtype=torch.uint8)])
    batch = dataclasses.replace(batch, image_sizes=[(64, 1024)])
    annotated = torch.tensor([[901.0, 11.0, 914.0, 23.0]])
    with torch.autocast("cpu", torch.bfloat16):
        proposals = detector.train().propose(batch, detector.features(batch))
        sample = sample_regions(detector.roi, proposals.boxes, [{"boxes": annotated, "labels": torch.tensor([0])}])
    assert {value.dtype for value in (*proposals.boxes, *proposals.anchors, proposals.deltas)} == {torch.float32}
    assert annotated[0].tolist() in sample.boxes[0].tolist()


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1), (3, 200)])
def test_extreme_images_are_detected(detector: RCNN, shape: tuple[int, int]) -> None:
    found = detector.detect([torch.zeros(3, *shape, dtype=torch.uint8)], words(2), score_threshold=0.0)[0]
    assert (found.height, found.width) == shape
    assert bool(torch.isfinite(found.boxes).all())
    assert float(found.boxes[:, 2].max()) <= shape[1]
    assert float(found.boxes[:, 3].max()) <= shape[0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((100, 200), (100, 200)),  # ordinary: as it is
        ((1, 1000), (16, 1000)),  # ceil(2 * 1000 / 128) = 16 rows
        ((1000, 3), (1000, 16)),
        ((15, 1000), (16, 1000)),
        ((16, 1000), (16, 1000)),
    ],
)
def test_long_images_are_widened_at_their_end(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    image = torch.full((3, *shape), 9, dtype=torch.uint8)
    wide = add_edge(image, 128, pixels=2)
    assert tuple(wide.shape[1:]) == expected
    assert bool((wide[:, : shape[0], : shape[1]] == 9).all())
    assert int(wide.sum()) == int(image.sum())
    assert min(expected) * 128 / max(*expected, 128) >= 1


def slow_select(
    boxes: Tensor, scores: Tensor, threshold: float, nms: float, limit: int
) -> list[tuple[list[float], float, int]]:
    """Greedy suppression within each class, one candidate after the other."""
    kept: list[tuple[list[float], float, int]] = []
    for label in range(scores.shape[1]):
        order = sorted(range(len(boxes)), key=lambda row: -float(scores[row, label]))
        chosen: list[int] = []
        for row in order:
            overlaps = [float(box_iou(boxes[row : row + 1], boxes[other : other + 1])) for other in chosen]
            if scores[row, label] > threshold and all(overlap <= nms for overlap in overlaps):
                chosen.append(row)
        kept += [(boxes[row].tolist(), float(scores[row, label]), label) for row in chosen]
    return sorted(kept, key=lambda entry: -entry[1])[:limit]


@pytest.mark.parametrize(("threshold", "limit"), [(0.0, 500), (0.5, 10), (0.9, 3), (1.0, 5)])
def test_selection_equals_a_slow_loop(threshold: float, limit: int) -> None:
    generator = torch.Generator().manual_seed(4)
    corner, side = torch.rand(25, 2, generator=generator) * 40, 8 + torch.rand(25, 2, generator=generator) * 30
    boxes, scores = torch.cat([corner, corner + side], 1), torch.rand(25, 4, generator=generator)
    found_boxes, found_scores, labels = select_detections(boxes, scores, Selection(0.4, threshold, limit))
    expected = slow_select(boxes, scores, threshold, 0.4, limit)
    assert len(found_scores) == len(expected)
    assert torch.allclose(found_scores, torch.tensor([score for _, score, _ in expected]))
    assert labels.tolist() == [label for _, _, label in expected]
    assert torch.allclose(found_boxes, torch.tensor([box for box, _, _ in expected]).view(-1, 4))


def test_selection_of_nothing_is_empty() -> None:
    boxes, scores, labels = select_detections(torch.zeros(0, 4), torch.zeros(0, 3), Selection(0.5, 0.1, 10))
    assert boxes.shape == (0, 4)
    assert (len(scores), len(labels)) == (0, 0)


def test_distinct_selection_keeps_the_best_class_of_each_object_whatever_else_an_object_scores() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 20], [1, 0, 21, 20], [30, 30, 50, 50]])
    scores = torch.linspace(0.9, 0.6, 5_000).repeat(3, 1)
    scores[1] -= 0.01
    scores[2] = 0.0
    scores[2, 7] = 0.3
    found, kept, labels = select_detections(boxes, scores, Selection(0.5, 0.1, 2, distinct=True))
    assert found.tolist() == boxes[[0, 2]].tolist()
    assert kept.tolist() == pytest.approx([0.9, 0.3])
    assert labels.tolist() == [0, 7]
    for several in (scores[:0], scores[:, :0]):
        assert len(select_detections(boxes[: len(several)], several, Selection(0.5, 0.1, 2, distinct=True))[0]) == 0


def test_many_candidates_lose_only_hopeless_ones() -> None:
    # 3,000 disjoint boxes and a limit of 5: the 5 best are kept although only 100 candidates are compared.
    start = torch.arange(3000.0)[:, None] * 10
    boxes = torch.cat([start, start * 0, start + 5, start * 0 + 5], 1)
    scores = torch.rand(3000, 1, generator=torch.Generator().manual_seed(0))
    _, kept, _ = select_detections(boxes, scores, Selection(0.5, 0.0, 5))
    assert torch.equal(kept, scores[:, 0].topk(5).values)


def test_candidates_are_added_until_enough_survive() -> None:
    # 300 boxes of one object score above four other objects, and 5 detections have only 100 candidates.
    start = torch.cat([torch.rand(300, generator=torch.Generator().manual_seed(0)), torch.arange(1, 5) * 50.0])[:, None]
    boxes = torch.cat([start, start * 0, start + 40, start * 0 + 40], 1)
    scores = torch.linspace(0.9, 0.1, 304)[:, None]
    assert len(select_detections(boxes[:300], scores[:300], Selection(0.5, 0.0, 5))[0]) == 1
    found, kept, _ = select_detections(boxes, scores, Selection(0.5, 0.0, 5))
    assert found[:, 0].tolist() == [start[0].item(), 50, 100, 150, 200]
    assert torch.equal(kept, scores[[0, 300, 301, 302, 303], 0])


def test_boxes_without_an_area_are_no_detections() -> None:
    boxes = torch.tensor([[0.0, 5, 0, 9], [0, 5, 0, 9], [3, 7, 9, 7], [1, 1, 4, 4]])
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    for found, kept, _ in (
        select_detections(boxes, scores, Selection(0.5, 0.1, 2)),
        select_traced(boxes, scores, torch.tensor(0.1), 0.5, 2),
    ):
        assert (found.tolist(), kept.tolist()) == ([[1, 1, 4, 4]], [pytest.approx(0.6)])


def test_overlaps_are_exact_with_22_000_names() -> None:
    # The last names' boxes are 22,000 images apart, where float32 has steps of 2 px.
    boxes = torch.tensor([[1320, 0, 1330, 10.0], [1323.42, 0, 1333.42, 10], [0, 0, 10, 10], [3.16, 0, 13.16, 10]])
    apart, close = box_iou(boxes, boxes)[[0, 2], [1, 3]].tolist()
    assert apart < 0.5 < close
    scores = torch.zeros(4, 22_000)
    scores[:2, 21_999] = scores[2:, 21_998] = torch.tensor([0.9, 0.8])
    expected = {(0, 21_999), (1, 21_999), (2, 21_998)}
    for found, _, labels in (
        select_detections(boxes, scores, Selection(0.5, 0.1, 10)),
        select_traced(boxes, scores, torch.tensor(0.1), 0.5, 10),
    ):
        rows = (found[:, None] == boxes).all(-1).int().argmax(1)
        assert set(zip(rows.tolist(), labels.tolist(), strict=True)) == expected


@pytest.mark.parametrize("apart", [0, 10_000])
def test_suppression_within_groups_equals_a_loop_over_them(apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "APART", apart)
    corner, side = torch.rand(2, 3000, 2, generator=torch.Generator().manual_seed(3)) * 100
    boxes, scores = torch.cat([corner - 150, corner - 150 + side], 1), torch.rand(3000)
    groups = torch.arange(3000) % 40
    kept = suppress(boxes, scores, groups, 0.3)
    rows = [torch.nonzero(groups == group).squeeze(1) for group in range(40)]
    assert sorted(kept.tolist()) == sorted(torch.cat([row[nms(boxes[row], scores[row], 0.3)] for row in rows]).tolist())
    assert torch.equal(scores[kept], scores[kept].sort(descending=True).values)
    assert len(suppress(boxes[:0], scores[:0], groups[:0], 0.3)) == 0


def test_boxes_left_of_the_image_suppress_none_of_the_next_group() -> None:
    boxes = torch.tensor([[299.0, 299, 804, 804], [-506, -506, -1, -1]])  # a step of 805 px would lay one on the other
    assert suppress(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.9).tolist() == [0, 1]


def test_no_parameter_belongs_to_a_name(detector: RCNN) -> None:
    # The class loss depends on the rows it is given alone: nothing in the detector stands for another name.
    names = [name for name, _ in detector.named_parameters()]
    shapes = [tuple(value.shape) for value in detector.parameters()]
    assert not [name for name in names if "class" in name or ("logit" in name and "rpn" not in name)]
    detector.train()
    for count in (2, 7):
        before = {name: value.clone() for name, value in detector.state_dict().items()}
        batch = detector.preprocess([noise(64, 64)])
        features = detector.features(batch)
        target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
        proposals = detector.propose(batch, features)
        losses = detector.detection_losses(batch, features, proposals, [target], words(count).embeddings)
        assert all(bool(torch.isfinite(value)) for value in losses.values())
        assert set(before) == set(detector.state_dict())
    assert shapes == [tuple(value.shape) for value in detector.parameters()]


def test_only_the_class_loss_depends_on_the_names(detector: RCNN) -> None:
    text = words(3).embeddings.clone().requires_grad_()
    batch = detector.preprocess([noise(64, 64)])
    features = detector.features(batch)
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
    losses = detector.detection_losses(batch, features, detector.propose(batch, features), [target], text)
    assert [name for name, value in losses.items() if _depends(value, text)] == ["classes"]


def _depends(value: Tensor, leaf: Tensor) -> bool:
    (gradient,) = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)
    return gradient is not None


# --------------------------------------------------------------------------------------------------- backbones

RESNET = RCNNConfig(
    backbone="resnet18", backbone_options={}, strides=(4, 8, 16, 32), anchor_sizes=(16, 32, 64, 128), freeze_norm=True
)


def test_objectness_by_overlap_takes_no_anchor_for_background() -> None:
    config = dataclasses.replace(CONFIG, objectness="overlap", rpn_batch_size=4096)
    network = ProposalNetwork(config).train()
    images = network.preprocess([noise(64, 64), noise(64, 64, 1)])
    proposals = network.propose(images, network.features(images))
    annotated = torch.tensor([[10.0, 12.0, 40.0, 41.0]])
    targets = [{"boxes": annotated}, {"boxes": annotated[:0]}]
    iou_A = box_iou(proposals.anchors[0], annotated).amax(1)
    near_A = iou_A >= torch.minimum(torch.tensor(0.3), iou_A.max())
    assert 0 < int(near_A.sum()) < len(near_A)

    def gradient(logit_A: Tensor) -> Tensor:
        """Of the logits of both images, which have the same values: [2, anchors]."""
        logits = logit_A.repeat(2)[:, None].requires_grad_()
        losses = network.proposal_losses(dataclasses.replace(proposals, objectness=logits), targets)
        return torch.autograd.grad(losses["objectness"], logits)[0].view(2, -1)

    first, without_boxes = gradient(torch.zeros(len(iou_A)))
    assert torch.equal(first != 0, near_A)
    assert not without_boxes.any()
    assert torch.allclose(gradient(iou_A.logit(1e-6)), torch.zeros(2, len(iou_A)), atol=1e-6)


def test_an_unknown_objectness_is_refused() -> None:
    with pytest.raises(InputError, match="objectness: 'iou', expected one of label, overlap"):
        dataclasses.replace(CONFIG, objectness="iou")  # type: ignore[arg-type]


def test_frozen_norms_have_no_parameters_and_never_change() -> None:
    detector = RCNN(RESNET).train()
    norms = [module for module in detector.backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(norms) == 20
    assert not [name for name, _ in detector.backbone.named_parameters() if "bn" in name]
    before = norms[0].running_mean.clone()
    detector.features(detector.preprocess([noise(64, 64)]))
    assert torch.equal(norms[0].running_mean, before)


def test_an_unknown_stride_is_refused() -> None:
    with pytest.raises(ValueError):
        RCNN(dataclasses.replace(CONFIG, strides=(4, 7)))


@pytest.mark.parametrize("side", [736, 800, 1024])
def test_the_coarsest_anchors_are_64_pixels_apart_whatever_the_images_size(side: int) -> None:
    anchors = StridedAnchors(((32,), (64,), (128,), (256,), (512,)), (4, 8, 16, 32, 64))
    cells = [-(-side // stride) for stride in (4, 8, 16, 32, 64)]
    images = ResizedImages(torch.zeros(1, 3, side, side), *[[(side, side)]] * 3)
    found = anchors(images, [torch.zeros(1, 1, cell, cell) for cell in cells])[0]
    last = found[-3 * cells[-1] ** 2 :]
    centres = (last[:, 0] + last[:, 2]) / 2
    assert sorted(set(centres.round().tolist())) == [64.0 * cell for cell in range(cells[-1])]

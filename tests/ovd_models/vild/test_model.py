import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

from ovd_models.batches import DetectionBatch, StoredRegions
from ovd_models.checkpoints import load_model, save_checkpoint
from ovd_models.codet.model import CoDet
from ovd_models.detectors.masks import encode_masks, paste_masks
from ovd_models.detectors.rcnn import ProposalNetwork, RCNNConfig, build_box_head
from ovd_models.detectors.region_query import RegionQuery
from ovd_models.detectors.region_scores import Scoring
from ovd_models.errors import InputError
from ovd_models.predictors import load
from ovd_models.vild.model import Variant, ViLD, ViLDConfig
from ovd_models.vocabulary import EmbeddingTable, Vocabulary

SMALL = RCNNConfig(
    backbone_options={"channels": [8, 16, 24, 32], "stem_width": 8},
    pyramid_channels=16,
    head_width=32,
    embed_dim=16,
    min_size=64,
    max_size=128,
    rpn_batch_size=32,
    pre_nms=60,
    post_nms=30,
    rois_per_image=16,
)


def text(count: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


def config(variant: Variant, **detector: object) -> ViLDConfig:
    names = ("name 0", "name 1") if variant == "supervised" else ()
    return ViLDConfig(
        detector=dataclasses.replace(SMALL, **detector),  # type: ignore[arg-type]
        variant=variant,
        supervised_names=names,
    )


def scene(seed: int, *, boxes: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A dark picture with a bright red and a bright blue square: pixels, boxes, labels, masks."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 40, (3, 64, 64), generator=generator, dtype=torch.uint8)
    found = torch.tensor([[6.0, 8, 26, 28], [36, 30, 58, 52]])
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    for row, channel in enumerate((0, 2)):
        x0, y0, x1, y1 = found[row].int().tolist()
        image[channel, y0:y1, x0:x1] = 230
        masks[row, y0:y1, x0:x1] = True
    keep = slice(None) if boxes else slice(0, 0)
    return image, found[keep], torch.tensor([0, 1])[keep], masks[keep]


def batch_of(*entries: tuple[Tensor, Tensor, Tensor, Tensor], valid: bool = True, masks: bool = True) -> DetectionBatch:
    """Stored regions are the two squares, their embeddings the rows 4 and 5 of eight words; and one of padding."""
    images, boxes, labels, shapes = zip(*entries, strict=True)
    stored = torch.tensor([[6.0, 8, 26, 28], [36, 30, 58, 52], [0, 0, 0, 0]]).expand(len(images), -1, -1)
    rows = torch.cat([text(8)[4:6], torch.zeros(1, 16)]).expand(len(images), -1, -1)
    flags = torch.tensor([valid, valid, False]).expand(len(images), -1)
    regions = StoredRegions(stored.clone(), rows.clone(), flags.clone())
    return DetectionBatch(images, boxes, labels, shapes if masks else None, regions)


EXPECTED = {
    "supervised": {"classes"},
    "text": {"classes"},
    "image": {"image"},
    "vild": {"classes", "image"},
    "ensemble": {"classes", "image"},
}


@pytest.mark.parametrize("variant", get_args(Variant))
def test_each_variant_has_its_losses_and_all_gradients(variant: Variant) -> None:
    torch.manual_seed(0)
    model = ViLD(config(variant)).train()
    losses = model(batch_of(scene(0), scene(1)), text(8), torch.arange(8) < 2)
    assert set(losses) == {"objectness", "rpn_box", "box"} | EXPECTED[variant]
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    # An `image` detector has no classes to learn; nothing else may be left out, or parallel workers would wait.
    assert without == []


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_batch_without_boxes_or_valid_regions_still_has_finite_losses(variant: Variant) -> None:
    model = ViLD(config(variant, masks=True, head_convs=1)).train()
    batch = batch_of(scene(0, boxes=False), scene(1, boxes=False), valid=False)
    losses = model(batch, text(8), torch.arange(8) < 2)
    torch.stack(list(losses.values())).sum().backward()
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert losses.get("image", torch.zeros(())).item() == 0
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_only_the_distillation_loss_trains_the_image_head() -> None:
    torch.manual_seed(0)
    model = ViLD(config("ensemble")).train()
    losses = model(batch_of(scene(0)), text(8), torch.arange(8) < 2)
    own = [value for name, value in model.named_parameters() if name.startswith("image_")]
    others = [*model.detector.roi.parameters(), *model.detector.projection.parameters(), model.background]
    for name, loss in losses.items():
        reached = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
        assert all((gradient is not None) == (name == "image") for gradient in reached)
    reached = torch.autograd.grad(losses["image"], others, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in reached)


def test_one_head_sees_both_kinds_of_region_at_once() -> None:
    # Its batch norm is shared: one pass over 16 + 3 regions an image, not two.
    torch.manual_seed(0)
    model = ViLD(config("vild", head_convs=1)).train()
    sizes = []
    model.detector.roi.box_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    model(batch_of(scene(0), scene(1)), text(8), torch.arange(8) < 2)
    assert len(sizes) == 1
    assert sizes[0] <= 2 * (16 + 3)


def test_stored_boxes_follow_the_resizing_of_their_image() -> None:
    model = ViLD(config("ensemble"))
    large = scene(0)[0].repeat_interleave(2, 1).repeat_interleave(2, 2)  # 128 px, reduced to 64
    batch = dataclasses.replace(batch_of(scene(0)), images=(large,))
    images = model.detector.preprocess(batch.images)
    (found,) = model._stored_boxes(batch, images)
    assert torch.allclose(found[:2], torch.tensor([[3.0, 4, 13, 14], [18, 15, 29, 26]]))
    assert found[2].tolist() == [0, 0, 64, 64]  # what is not valid looks at the whole image


def test_distillation_weight_scales_its_loss_alone() -> None:
    losses = []
    for weight in (0.5, 2.0):
        torch.manual_seed(0)
        model = ViLD(dataclasses.replace(config("ensemble"), image_weight=weight)).train()
        torch.manual_seed(1)
        losses.append(model(batch_of(scene(0)), text(8), torch.arange(8) < 2))
    for name, value in losses[0].items():
        assert float(losses[1][name]) == pytest.approx(float(value) * (4 if name == "image" else 1), rel=1e-5)


def test_a_batch_without_regions_or_masks_is_refused() -> None:
    batch = batch_of(scene(0), masks=False)
    with pytest.raises(InputError, match="no stored regions"):
        ViLD(config("vild"))(dataclasses.replace(batch, regions=None), text(8))
    with pytest.raises(InputError, match="no masks"):
        ViLD(config("text", masks=True))(batch, text(8))
    with pytest.raises(InputError, match="distance: 'l3', expected one of l1, l2"):
        ViLDConfig(distance="l3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="variant: 'best'"):
        config("best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="supervised_names"):
        ViLD(ViLDConfig(variant="supervised"))


def overfit(variant: Variant, steps: int = 150, **detector: object) -> ViLD:
    """Two images, of which names 0 and 1 are annotated; stored embeddings call the same squares words 4 and 5."""
    torch.manual_seed(0)
    model = ViLD(dataclasses.replace(config(variant, **detector), scoring=Scoring(objectness=0.5))).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = batch_of(scene(0), scene(1))
    for _ in range(steps):
        loss = torch.stack(list(model(batch, text(8), torch.arange(8) < 2).values())).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model.eval()


def best_labels(model: ViLD, rows: list[int], image_share: float = 0.4) -> list[int]:
    """The best of these words for each square of the first image; the distilled head has this share in them."""
    vocabulary = Vocabulary(tuple(f"name {row}" for row in rows), text(8)[rows])
    scoring = Scoring(objectness=0.5, unknown_image=image_share)
    (found,) = model.detect([scene(0)[0]], vocabulary, score_threshold=0.0, scoring=scoring)
    labels = []
    for box in scene(0)[1]:
        near = box_iou(box[None], found.boxes)[0] > 0.5
        assert bool(near.any())
        labels.append(rows[int(found.labels[near][found.scores[near].argmax()])])
    return labels


def test_two_images_are_learned_with_names_masks_and_distilled_words() -> None:
    model = overfit("ensemble", masks=True)
    assert best_labels(model, [0, 1]) == [0, 1]
    assert best_labels(model, [4, 5], image_share=1.0) == [4, 5]  # never annotated: the teacher alone named them
    (found,) = model.detect([scene(0)[0]], Vocabulary(("name 0", "name 1"), text(8)[:2]), score_threshold=0.3)
    assert found.masks is not None
    assert len(found.masks) == len(found) > 0
    row = int((box_iou(found.boxes, scene(0)[1][:1])[:, 0]).argmax())
    mask = rle.decode({"size": [64, 64], "counts": found.masks[row]}).astype(bool)
    truth = scene(0)[3][0].numpy()
    assert (mask & truth).sum() / (mask | truth).sum() > 0.7
    assert found.filter(min_score=2.0).masks == ()


def test_a_supervised_detector_never_finds_other_names() -> None:
    model = overfit("supervised", steps=60)
    vocabulary = Vocabulary(("name 7", "name 1", "name 0"), text(3))
    (found,) = model.detect([scene(0)[0]], vocabulary, score_threshold=0.0)
    assert set(found.labels.tolist()) == {1, 2}
    assert found.names == vocabulary.names
    (nothing,) = model.detect([scene(0)[0]], Vocabulary(("name 7",), text(1)), score_threshold=0.0)
    assert len(nothing) == 0
    with pytest.raises(InputError, match="no attributes or children"):
        model.detect([scene(0)[0]], RegionQuery(vocabulary, attributes=Vocabulary(("red",), text(1))))


@pytest.mark.parametrize("variant", get_args(Variant))
def test_recorded_regions_give_the_same_detections(variant: Variant) -> None:
    torch.manual_seed(0)
    model = ViLD(config(variant)).eval()
    images = [scene(0)[0], scene(1)[0][:, :40]]
    vocabulary = Vocabulary(("name 0", "name 1", "c"), text(3), torch.tensor([True, True, False]))
    records = model.record_regions(images)
    for scoring in (Scoring(), Scoring(objectness=0.5, novel_image=0.9, temperature=9.0)):
        direct = model.detect(images, vocabulary, score_threshold=0.01, scoring=scoring)
        cached = model.find_in_records(records, RegionQuery(vocabulary), score_threshold=0.01, scoring=scoring)
        for one, two in zip(direct, cached, strict=True):
            assert torch.equal(one.boxes, two.boxes)
            assert torch.equal(one.scores, two.scores)
            assert torch.equal(one.labels, two.labels)


def test_distinct_objects_overlap_no_other_and_have_their_own_masks() -> None:
    torch.manual_seed(0)
    model = ViLD(config("text", masks=True)).eval()
    (encoded,) = model.encode([scene(0)[0]])
    vocabulary = Vocabulary(tuple("abcdefgh"), text(8))
    find = partial(model.find, encoded, vocabulary, score_threshold=0.0, max_detections=100)
    pairs, objects = find(), find(distinct=True)
    assert len(objects.distinct()) == len(objects)
    assert len(pairs.distinct()) < len(pairs)
    assert objects.masks is not None
    assert len(objects.masks) == len(objects)


def test_temperature_is_a_matter_of_scoring_alone() -> None:
    model = ViLD(config("ensemble")).eval()
    record = model.record_regions([scene(0)[0]])[0]
    assert record.text is not None and record.image is not None
    assert torch.allclose(record.text.norm(dim=1), torch.ones(len(record.text)))
    assert torch.allclose(record.image.norm(dim=1), torch.ones(len(record.image)))


@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (1, 1), (64, 64)])
def test_blank_and_extreme_images_are_detected(shape: tuple[int, int]) -> None:
    model = ViLD(config("ensemble", masks=True)).eval()
    (found,) = model.detect(
        [torch.zeros(3, *shape, dtype=torch.uint8)], Vocabulary(("a",), text(1)), score_threshold=0.0
    )
    assert (found.height, found.width) == shape
    assert found.masks is not None
    assert len(found.masks) == len(found)


# ------------------------------------------------------------------------------------------------------------ heads


def test_the_papers_head_has_four_convolutions_and_two_layers_all_with_batch_norm() -> None:
    head = build_box_head(16, 32, 4)
    kinds = [type(module) for module in head.modules()]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == 4
    assert kinds.count(nn.Linear) == kinds.count(nn.BatchNorm1d) == 2
    assert head(torch.randn(5, 16, 7, 7)).shape == (5, 32)
    assert not any(layer.bias is not None for layer in head.modules() if isinstance(layer, nn.Conv2d))


def test_a_pasted_mask_fills_its_box_and_nothing_else() -> None:
    logits = torch.full((1, 28, 28), 9.0)
    logits[0, :, 14:] = -9.0  # the left half
    (mask,) = paste_masks(logits.sigmoid(), torch.tensor([[4.0, 2, 24, 12]]), 20, 30)
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[2:12, 4:14] = True
    assert torch.equal(mask, expected)
    assert paste_masks(logits[:0], torch.zeros(0, 4), 20, 30).shape == (0, 20, 30)
    assert encode_masks(logits[:0], torch.zeros(0, 4), 20, 30) == ()
    (counts,) = encode_masks(logits.sigmoid(), torch.tensor([[4.0, 2, 24, 12]]), 20, 30)
    assert np.array_equal(rle.decode({"size": [20, 30], "counts": counts}), expected.numpy())


def test_a_coarser_level_serves_proposals_alone() -> None:
    network = ProposalNetwork(dataclasses.replace(SMALL, anchor_sizes=(16, 32, 64, 96)))
    features = network.features(network.preprocess([scene(0)[0]]))
    assert list(features) == ["0", "1", "2", "pool"]
    ((boxes, scores),) = network.find_proposals([scene(0)[0]], 7)
    assert len(boxes) == len(scores) <= 7
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_proposals_learn_without_labels() -> None:
    network = ProposalNetwork(SMALL)
    batch = batch_of(scene(0))
    torch.manual_seed(0)
    one = network(batch)
    torch.manual_seed(0)
    two = network(dataclasses.replace(batch, labels=(torch.tensor([77, 99]),)))
    assert set(one) == {"objectness", "rpn_box"}
    assert all(float(one[name]) == float(two[name]) for name in one)


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_checkpoint_gives_the_same_detections(tmp_path: Path, variant: Variant) -> None:
    torch.manual_seed(0)
    model = ViLD(config(variant, masks=True)).eval()
    names = ("name 0", "name 1", "name 2")
    splits = {"name 0": "base", "name 1": "base", "name 2": "novel"}
    save_checkpoint(model, EmbeddingTable(names, text(3), "test"), tmp_path, splits=splits, run={})
    detector = load(tmp_path)
    assert (detector.method, detector.vocabulary) == ("vild", names)
    found = detector.detect(scene(0)[0], score_threshold=0.01)
    flags = torch.tensor([True, True, False])
    (expected,) = model.detect([scene(0)[0]], Vocabulary(names, text(3), flags), score_threshold=0.01)
    assert torch.equal(found.scores, expected.scores)
    assert found.masks == expected.masks
    assert load_model(tmp_path, ViLD).config == model.config
    with pytest.raises(InputError, match="checkpoint of method 'vild', expected 'codet'"):
        load_model(tmp_path, CoDet)
    assert len(detector.propose([scene(0)[0]], 5)[0][0]) == 5


def test_the_learned_background_is_a_direction() -> None:
    model = ViLD(config("text"))
    assert model.background.shape == (16,)
    assert 0.001 < float(model.background.std()) < 0.03
    features = torch.randn(4, 16)
    expected = F.normalize(features, dim=1) @ F.normalize(model.background, dim=0) * 3
    assert torch.allclose(model._background_logits(features, 3.0), expected, atol=1e-6)
    assert math.isfinite(float(model._background_logits(torch.zeros(1, 16), 3.0)))

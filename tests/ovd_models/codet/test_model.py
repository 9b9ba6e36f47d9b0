import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_area, box_iou

from ovd_models.batches import ConceptBatch, DetectionBatch
from ovd_models.codet.alignment import Aggregation
from ovd_models.codet.model import CoDet, CoDetConfig, Supervision
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.errors import InputError
from ovd_models.vocabulary import Vocabulary

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
CONFIG = CoDetConfig(detector=SMALL, num_proposals=6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=-1)


# ------------------------------------------------------------------------------------------------------ model


def blocks(seed: int = 0, count: int = 2) -> DetectionBatch:
    """Grey images with one bright square each: class 0 is red, class 1 is blue."""
    generator = torch.Generator().manual_seed(seed)
    images, boxes, labels = [], [], []
    for number in range(count):
        image = torch.full((3, 64, 64), 110, dtype=torch.uint8)
        x, y = torch.randint(4, 28, (2,), generator=generator).tolist()
        image[:, y : y + 28, x : x + 28] = 20
        image[0 if number % 2 == 0 else 2, y : y + 28, x : x + 28] = 240
        images.append(image)
        boxes.append(torch.tensor([[x, y, x + 28.0, y + 28.0]]))
        labels.append(torch.tensor([number % 2]))
    return DetectionBatch(tuple(images), tuple(boxes), tuple(labels))


def groups(captions: bool = True) -> ConceptBatch:
    images = blocks(seed=5, count=4).images
    images = tuple(images[index] for index in (0, 2, 1, 3))
    mentioned = torch.zeros(4, 3, dtype=torch.bool)
    mentioned[:2, 0], mentioned[2:, 2], mentioned[3, 0] = True, True, True
    rows = unit(4, 16, seed=8) if captions else None
    return ConceptBatch(images, torch.tensor([0, 2]), mentioned, ("red", "red", "blue", "red and blue"), rows)


def without_gradient(model: CoDet, losses: dict[str, Tensor]) -> list[str]:
    model.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    return [name for name, value in model.named_parameters() if value.grad is None]


def test_one_joint_forward_gives_six_finite_losses_and_every_parameter_a_gradient() -> None:
    torch.manual_seed(0)
    model = CoDet(CONFIG)
    losses = model(blocks(), groups(), unit(2, 16), unit(3, 16, seed=1))
    assert list(losses) == ["objectness", "rpn_box", "classes", "box", "concept", "caption"]
    assert all(bool(torch.isfinite(value)) and value.ndim == 0 for value in losses.values())
    assert without_gradient(model, losses) == []


def test_box_supervision_alone_leaves_no_parameter_unused() -> None:
    torch.manual_seed(0)
    model = CoDet(CONFIG)
    losses = model(blocks(), None, unit(2, 16), None)
    assert list(losses) == ["objectness", "rpn_box", "classes", "box"]
    assert without_gradient(model, losses) == []


@pytest.mark.parametrize("kind", ["boxes", "captions"])
def test_the_learned_aggregation_has_a_gradient_in_every_kind_of_step(kind: str) -> None:
    torch.manual_seed(0)
    learned = dataclasses.replace(CONFIG, aggregation="learned", guidance="none", group_size=2, caption_weight=0.0)
    model = CoDet(learned)
    batches = (blocks(), None) if kind == "boxes" else (None, groups())
    losses = model(*batches, unit(2, 16), unit(3, 16, seed=1))
    assert without_gradient(model, losses) == []


def test_a_batch_whose_images_have_no_boxes_still_uses_every_parameter() -> None:
    torch.manual_seed(0)
    model, batch = CoDet(CONFIG), blocks()
    empty = dataclasses.replace(batch, boxes=(torch.zeros(0, 4),) * 2, labels=(torch.zeros(0, dtype=torch.int64),) * 2)
    losses = model(empty, groups(), unit(2, 16), unit(3, 16, seed=1))
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert losses["box"].item() == losses["rpn_box"].item() == 0
    assert without_gradient(model, losses) == []


def test_an_image_without_a_box_trains_beside_one_with_boxes() -> None:
    torch.manual_seed(0)
    model, batch = CoDet(CONFIG), blocks()
    mixed = dataclasses.replace(
        batch,
        boxes=(torch.zeros(0, 4), batch.boxes[1]),
        labels=(torch.zeros(0, dtype=torch.int64), batch.labels[1]),
    )
    losses = model(mixed, None, unit(2, 16), None)
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert losses["box"] > 0


def test_without_captions_embedded_there_is_no_caption_loss() -> None:
    torch.manual_seed(0)
    model = CoDet(CONFIG)
    assert "caption" not in model(blocks(), groups(captions=False), unit(2, 16), unit(3, 16, seed=1))
    off = CoDet(dataclasses.replace(CONFIG, caption_weight=0.0))
    assert "caption" not in off(blocks(), groups(), unit(2, 16), unit(3, 16, seed=1))


def test_losses_are_weighted_by_the_config() -> None:
    torch.manual_seed(0)
    model = CoDet(CONFIG).eval()
    twice = CoDet(dataclasses.replace(CONFIG, concept_weight=0.4, caption_weight=0.2)).eval()
    twice.load_state_dict(model.state_dict())
    arguments = (blocks(), groups(), unit(2, 16), unit(3, 16, seed=1))
    first, second = model(*arguments), twice(*arguments)
    assert second["concept"].item() == pytest.approx(2 * first["concept"].item(), rel=1e-5)
    assert second["caption"].item() == pytest.approx(4 * first["caption"].item(), rel=1e-5)


def test_guidance_is_centred_on_all_concepts_unless_the_config_says_otherwise() -> None:
    torch.manual_seed(0)
    model = CoDet(CONFIG).eval()
    concepts = F.normalize(unit(3, 16, seed=1) + 3 * unit(1, 16, seed=9), dim=1)  # much in common
    losses = []
    for centred in (True, False):
        model.config = dataclasses.replace(CONFIG, guidance="dimensions", centre_guidance=centred)
        losses.append(model(blocks(), groups(), unit(2, 16), concepts)["concept"].item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


def test_a_co_mentioned_concept_is_not_pushed_away() -> None:
    torch.manual_seed(0)
    model, batch = CoDet(CONFIG).eval(), groups()
    concepts = unit(3, 16, seed=1).requires_grad_()
    plain = dataclasses.replace(batch, mentioned=torch.zeros_like(batch.mentioned))
    both = [model(blocks(), entry, unit(2, 16), concepts)["concept"].item() for entry in (plain, batch)]
    assert both[1] < both[0]  # one negative less, each a positive number
    alone = dataclasses.replace(batch, mentioned=torch.ones_like(batch.mentioned))
    guided = dataclasses.replace(CONFIG, guidance="none")
    model.config = guided
    model(blocks(), alone, unit(2, 16), concepts)["concept"].backward()
    assert concepts.grad is not None
    assert bool((concepts.grad[[0, 2]].abs().sum(1) > 0).all())  # the groups' own
    assert bool((concepts.grad[1] == 0).all())  # mentioned by all, of no group


def test_mentioned_concepts_may_be_negatives_and_the_loss_may_sample_concepts() -> None:
    batch, many = groups(), unit(500, 16, seed=1)
    mentioned = torch.zeros(4, 500, dtype=torch.bool)
    mentioned[:, :3] = batch.mentioned
    batch = dataclasses.replace(batch, mentioned=mentioned)

    def loss(**changes: Any) -> float:
        torch.manual_seed(0)
        model = CoDet(dataclasses.replace(CONFIG, **changes)).eval()
        return model(blocks(), batch, unit(2, 16), many)["concept"].item()

    assert loss(mentioned_are_negatives=True) > loss()  # image 3 mentions both concepts
    assert loss(sampled_concepts=500) == loss()
    # At the start every logit is near 0 or of random sign, so the loss is about in proportion to the concepts.
    assert loss(sampled_concepts=50) < 0.2 * loss()


SUPERVISIONS: dict[Supervision, list[str]] = {
    "region_region": ["concept", "caption"],
    "region_text": ["concept", "caption"],
    "max_size": ["concept", "caption"],
    "captions": ["caption"],
    "boxes": [],
}


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_the_config_chooses_what_captions_teach(supervision: Supervision) -> None:
    torch.manual_seed(0)
    model = CoDet(dataclasses.replace(CONFIG, supervision=supervision))
    losses = model(blocks(), groups(), unit(2, 16), unit(3, 16, seed=1))
    assert list(losses) == ["objectness", "rpn_box", "classes", "box", *SUPERVISIONS[supervision]]
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert without_gradient(model, losses) == []


@pytest.mark.parametrize("aggregation", ["maximum", "top_k", "attention", "learned"])
def test_every_aggregation_trains(aggregation: Aggregation) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, aggregation=aggregation, group_size=2, caption_weight=0.0)
    model = CoDet(dataclasses.replace(config, guidance="none" if aggregation == "learned" else "support"))
    losses = model(blocks(), groups(), unit(2, 16), unit(3, 16, seed=1))
    assert losses["concept"] > 0
    assert without_gradient(model, losses) == []


def test_the_largest_proposal_gets_the_attention_of_max_size() -> None:
    torch.manual_seed(0)
    model = CoDet(dataclasses.replace(CONFIG, supervision="max_size"))
    for group in model.explain(groups(), unit(3, 16, seed=1)):
        for box, attention in zip(group.boxes, group.attention, strict=True):
            assert box_area(box)[attention.argmax()] == box_area(box).max()
            assert attention.sum() == 1


def test_a_step_of_captions_alone_uses_every_parameter() -> None:
    torch.manual_seed(0)
    model = CoDet(CONFIG)
    losses = model(None, groups(), unit(2, 16), unit(3, 16, seed=1))
    assert list(losses) == ["concept", "caption"]
    assert without_gradient(model, losses) == []
    box_branch = model.detector.box_deltas[0].weight.grad  # type: ignore[index, union-attr]
    assert bool((box_branch == 0).all())


def test_captioned_images_may_be_smaller_than_those_with_boxes() -> None:
    torch.manual_seed(0)
    model = CoDet(dataclasses.replace(CONFIG, caption_sizes=(32, 64)))
    assert model.detector.preprocess(blocks().images).image_sizes == [(64, 64)] * 2
    assert model._preprocess_captioned(groups().images).image_sizes == [(32, 32)] * 4
    losses = model(blocks(), groups(), unit(2, 16), unit(3, 16, seed=1))
    assert list(losses) == ["objectness", "rpn_box", "classes", "box", "concept", "caption"]
    assert without_gradient(model, losses) == []
    for group in model.explain(groups(), unit(3, 16, seed=1)):
        assert max(float(entry.max()) for entry in group.boxes) > 32  # in pixels of the images
    with pytest.raises(InputError, match="expected a shorter and a longer side"):
        CoDet(dataclasses.replace(CONFIG, caption_sizes=(32,)))


def test_images_without_a_proposal_have_no_concept_loss() -> None:
    torch.manual_seed(0)
    model = CoDet(CONFIG)
    nothing = [torch.zeros(0, 4)] * 4
    model._best_proposals = lambda proposals, images: nothing  # type: ignore[method-assign]
    losses = model(blocks(), groups(), unit(2, 16), unit(3, 16, seed=1))
    assert losses["concept"] == 0
    assert losses["caption"] > 0
    assert without_gradient(model, losses) == []


def test_a_caption_without_known_concepts_is_trained_with_its_groups() -> None:
    torch.manual_seed(0)
    model, batch = CoDet(CONFIG), groups()
    silent = dataclasses.replace(batch, mentioned=torch.zeros_like(batch.mentioned))
    assert bool(torch.isfinite(model(blocks(), silent, unit(2, 16), unit(3, 16, seed=1))["concept"]))


def test_an_explanation_gives_the_attention_and_does_not_change_the_model() -> None:
    torch.manual_seed(0)
    model, batch = CoDet(CONFIG), groups()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.explain(batch, unit(3, 16, seed=1))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(found) == 2
    for group in found:
        counts = [len(entry) for entry in group.boxes]
        assert [len(entry) for entry in group.attention] == counts
        assert max(counts) <= CONFIG.num_proposals
        assert group.similarity.shape == (sum(counts), sum(counts))
        assert torch.allclose(group.similarity, group.similarity.T, atol=1e-5)
        assert all(entry.sum().item() == pytest.approx(1, abs=1e-5) for entry in group.attention)
        assert all(bool((entry >= 0).all() and (entry <= 64).all()) for entry in group.boxes)


def test_two_images_are_overfitted() -> None:
    torch.manual_seed(0)
    text = torch.eye(16)[:2]
    model, batch = CoDet(CONFIG), blocks()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(60):
        loss = torch.stack(list(model(batch, groups(), text, torch.eye(16)[:3]).values())).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert sum(history[-5:]) < sum(history[:5]) / 5
    model.eval()
    found = model.detect(batch.images, Vocabulary(("red", "blue"), text), score_threshold=0.3)
    for image, box, label in zip(found, batch.boxes, batch.labels, strict=True):
        assert image.labels[:1].tolist() == label.tolist()
        assert float(box_iou(image.boxes[:1], box)) > 0.5

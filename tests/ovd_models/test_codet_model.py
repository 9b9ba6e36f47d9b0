import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from ovd_models.batches import ConceptBatch, DetectionBatch
from ovd_models.codet import Alignment, CoDet, CoDetConfig, LearnedAggregation, align, guidance_weights
from ovd_models.rcnn import RCNNConfig
from ovd_models.vocabulary import Vocabulary

TAU = 0.1
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


def some_valid() -> Tensor:
    """[2, 3, 5]: full, partly padded and, in group 1, one image without any proposal."""
    counts = torch.tensor([[5, 3, 1], [4, 0, 5]])
    return torch.arange(5) < counts[..., None]


def slow_align(region: Tensor, valid: Tensor, guidance: Tensor, temperature: float) -> Alignment:
    """The definition, one image and one proposal after the other."""
    groups, size, count, width = region.shape
    attention, prototype = torch.zeros(groups, size, count), torch.zeros(groups, size, width)
    for g in range(groups):
        for q in range(size):
            mine = [a for a in range(count) if valid[g, q, a]]
            if not mine:
                continue
            scores = []
            for a in mine:
                best = []
                for s in range(size):
                    theirs = [b for b in range(count) if valid[g, s, b]]
                    if s == q or not theirs:
                        continue
                    best.append(
                        max(
                            sum(
                                float(guidance[g, k] * x[k] * y[k])
                                for x, y in [(F.normalize(region[g, q, a], dim=0), F.normalize(region[g, s, b], dim=0))]
                                for k in range(width)
                            )
                            for b in theirs
                        )
                    )
                scores.append(sum(best) / len(best) if best else 0.0)
            top = max(scores)
            exponentials = [math.exp((score - top) / temperature) for score in scores]
            for a, exponential in zip(mine, exponentials, strict=True):
                attention[g, q, a] = exponential / sum(exponentials)
                prototype[g, q] += attention[g, q, a] * region[g, q, a]
    return Alignment(attention, prototype)


# -------------------------------------------------------------------------------------------------- alignment


def test_alignment_by_hand() -> None:
    # One group of two images in two dimensions; image 0 has proposals along x and y, image 1 one along x.
    region = torch.tensor([[[[2.0, 0.0], [0.0, 3.0]], [[5.0, 0.0], [0.0, 0.0]]]])
    valid = torch.tensor([[[True, True], [True, False]]])
    found = align(region, valid, torch.ones(1, 2), 1.0)
    # Image 0: similarities 1 and 0, softmax(1, 0) = (e, 1) / (e + 1). Image 1: one proposal, all attention.
    e = math.e / (math.e + 1)
    assert torch.allclose(found.attention, torch.tensor([[[e, 1 - e], [1.0, 0.0]]]))
    assert torch.allclose(found.prototype, torch.tensor([[[2 * e, 3 * (1 - e)], [5.0, 0.0]]]))


def test_alignment_equals_a_slow_loop() -> None:
    region, guidance = normal(2, 3, 5, 4), normal(2, 4, seed=1).abs()
    slow, fast = slow_align(region, some_valid(), guidance, TAU), align(region, some_valid(), guidance, TAU)
    assert torch.allclose(fast.attention, slow.attention, atol=1e-5)
    assert torch.allclose(fast.prototype, slow.prototype, atol=1e-5)


def test_the_learned_aggregation_scores_each_row_of_the_similarity_matrix() -> None:
    torch.manual_seed(0)
    region, guidance = normal(2, 3, 5, 4), normal(2, 4, seed=1).abs()
    aggregation = LearnedAggregation(3, 5)
    torch.nn.init.normal_(aggregation.score.weight)
    found, unit_region = aggregation(region, guidance), F.normalize(region, dim=-1)
    for g in range(2):
        for q, supports in enumerate(((1, 2), (0, 2), (0, 1))):
            rows = torch.stack(
                [
                    torch.cat([unit_region[g, s] @ (guidance[g] * unit_region[g, q, a]) for s in supports])
                    for a in range(5)
                ]
            )
            scores = aggregation.score(F.relu(aggregation.hidden(rows)))[:, 0]
            assert torch.allclose(found.attention[g, q], scores.softmax(0), atol=1e-6)
            assert torch.allclose(found.prototype[g, q], scores.softmax(0) @ region[g, q], atol=1e-5)


@pytest.mark.parametrize(("group", "count"), [(2, 1), (8, 3)])
def test_any_group_size_and_number_of_proposals_will_do(group: int, count: int) -> None:
    region, valid = normal(1, group, count, 4), torch.ones(1, group, count, dtype=torch.bool)
    slow, fast = (one(region, valid, torch.ones(1, 4), TAU) for one in (slow_align, align))
    assert torch.allclose(fast.attention, slow.attention, atol=1e-5)


def test_the_order_of_images_does_not_matter() -> None:
    region, valid, guidance, order = normal(2, 3, 5, 4), some_valid(), normal(2, 4).abs(), [2, 0, 1]
    expected = align(region, valid, guidance, TAU)
    found = align(region[:, order], valid[:, order], guidance, TAU)
    assert torch.allclose(found.attention, expected.attention[:, order], atol=1e-6)
    assert torch.allclose(found.prototype, expected.prototype[:, order], atol=1e-6)


def test_the_order_of_proposals_does_not_matter() -> None:
    region, valid, guidance, order = normal(2, 3, 5, 4), some_valid(), normal(2, 4).abs(), [3, 0, 4, 1, 2]
    expected = align(region, valid, guidance, TAU)
    found = align(region[:, :, order], valid[:, :, order], guidance, TAU)
    assert torch.allclose(found.attention, expected.attention[:, :, order], atol=1e-6)
    assert torch.allclose(found.prototype, expected.prototype, atol=1e-6)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    region, valid, guidance = normal(2, 3, 5, 4), some_valid(), normal(2, 4).abs()
    expected = align(region, valid, guidance, TAU)
    changed = torch.where(valid[..., None], region, 1e3 * normal(2, 3, 5, 4, seed=9))
    wider, more = F.pad(changed, (0, 0, 0, 2), value=7.0), F.pad(valid, (0, 2))
    found = align(wider, more, guidance, TAU)
    assert torch.allclose(found.attention[..., :5], expected.attention, atol=1e-6)
    assert bool((found.attention[..., 5:] == 0).all())
    assert torch.allclose(found.prototype, expected.prototype, atol=1e-5)


def test_attention_sums_to_one_where_there_is_a_proposal() -> None:
    found = align(normal(2, 3, 5, 4), some_valid(), torch.ones(2, 4), TAU)
    assert torch.allclose(found.attention.sum(-1), torch.tensor([[1.0, 1, 1], [1, 0, 1]]))
    assert bool((found.attention[~some_valid()] == 0).all())


def test_an_image_without_proposals_leaves_the_others_finite() -> None:
    for counts in ([[0, 2, 3]], [[0, 0, 3]], [[0, 0, 0]]):
        region = normal(1, 3, 3, 4).requires_grad_()
        valid = torch.arange(3) < torch.tensor(counts)[..., None]
        found = align(region, valid, torch.ones(1, 4), TAU)
        found.prototype.square().sum().backward()
        assert region.grad is not None
        assert bool(torch.isfinite(found.prototype).all() and torch.isfinite(region.grad).all())
        assert bool((found.prototype[~valid.any(-1)] == 0).all())
        assert bool((region.grad[~valid] == 0).all())


def test_a_batch_without_any_proposal_gives_zero_prototypes() -> None:
    found = align(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, dtype=torch.bool), torch.ones(1, 4), TAU)
    assert torch.equal(found.prototype, torch.zeros(1, 2, 4))


def test_an_image_whose_group_has_nothing_looks_at_all_its_proposals_alike() -> None:
    valid = torch.tensor([[[True, True, True, True], [False] * 4]])
    found = align(normal(1, 2, 4, 8), valid, torch.ones(1, 8), TAU)
    assert torch.allclose(found.attention[0, 0], torch.full((4,), 0.25))


def test_the_planted_shared_object_gets_the_attention() -> None:
    # 5 groups of 4 images with 8 random proposals; one of each image is the group's object, slightly changed.
    region, shared, noise = normal(5, 4, 8, 64), normal(5, 1, 64, seed=1), normal(5, 4, 64, seed=2)
    place = torch.randint(0, 8, (5, 4), generator=torch.Generator().manual_seed(3))
    region[torch.arange(5)[:, None], torch.arange(4), place] = shared + 0.3 * noise
    found = align(region, torch.ones(5, 4, 8, dtype=torch.bool), torch.ones(5, 64), TAU)
    assert torch.equal(found.attention.argmax(-1), place)
    assert float(found.attention.amax(-1).min()) > 0.8
    assert float(F.cosine_similarity(found.prototype, shared.expand(-1, 4, -1), dim=-1).min()) > 0.9


def test_guidance_chooses_between_two_shared_objects() -> None:
    # Both images show object x and object y equally; the concept's embedding lies along x, then along y.
    region = torch.eye(4)[None, None, :2].repeat(1, 2, 1, 1)
    valid = torch.ones(1, 2, 2, dtype=torch.bool)
    for axis in (0, 1):
        text = torch.eye(4)[axis : axis + 1]
        guided = align(region, valid, guidance_weights(text, torch.zeros(4)), TAU)
        assert guided.attention.argmax(-1).tolist() == [[axis, axis]]
        assert float(guided.attention.amax()) > 0.99


def test_gradients_reach_the_query_and_its_supports() -> None:
    region = normal(1, 3, 4, 8).requires_grad_()
    found = align(region, torch.ones(1, 3, 4, dtype=torch.bool), torch.ones(1, 8), TAU)
    found.prototype[0, 0].square().sum().backward()
    assert region.grad is not None
    assert bool((region.grad[0, 0].abs().sum(-1) > 0).all())  # every proposal of the query
    assert bool((region.grad[0, 1:].abs().sum((-2, -1)) > 0).all())  # and each support


# --------------------------------------------------------------------------------------------------- guidance


def test_guidance_by_hand() -> None:
    text, centre = torch.tensor([[0.5, -0.1, 0.2]]), torch.tensor([0.1, 0.1, 0.1])
    # |0.4|, |-0.2|, |0.1| sum to 0.7; times 3 dimensions
    assert torch.allclose(guidance_weights(text, centre), torch.tensor([[0.4, 0.2, 0.1]]) * 3 / 0.7)


def test_guidance_averages_one_and_ignores_what_all_concepts_share() -> None:
    text = unit(20, 64)
    plain = guidance_weights(text, text.mean(0))
    assert torch.allclose(plain.mean(1), torch.ones(20), atol=1e-5)
    common = torch.zeros(64)
    common[[3, 40]] = 5.0  # two outlier dimensions, as CLIP's text embeddings have
    shifted = text + common
    assert torch.allclose(guidance_weights(shifted, shifted.mean(0)), plain, atol=1e-4)
    uncentred = guidance_weights(shifted, torch.zeros(64))
    assert float(torch.corrcoef(uncentred).mean()) > 0.9 > 0.2 > float(torch.corrcoef(plain).mean())


def test_guidance_of_the_mean_concept_is_finite() -> None:
    assert torch.equal(guidance_weights(torch.ones(1, 4), torch.ones(4)), torch.zeros(1, 4))


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
        model.config = dataclasses.replace(CONFIG, centre_guidance=centred)
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
    guided = dataclasses.replace(CONFIG, text_guidance=False)
    model.config = guided
    model(blocks(), alone, unit(2, 16), concepts)["concept"].backward()
    assert concepts.grad is not None
    assert bool((concepts.grad[[0, 2]].abs().sum(1) > 0).all())  # the groups' own
    assert bool((concepts.grad[1] == 0).all())  # mentioned by all, of no group


def test_two_images_are_learnt_by_heart() -> None:
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

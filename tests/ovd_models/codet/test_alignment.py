import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.codet.alignment import (
    Aggregation,
    Alignment,
    LearnedAggregation,
    align,
    guidance_weights,
    largest_proposal,
    nearest_to_text,
)

TAU = 0.1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def some_valid() -> Tensor:
    """[2, 3, 5]: full, partly padded and, in group 1, one image without any proposal."""
    counts = torch.tensor([[5, 3, 1], [4, 0, 5]])
    return torch.arange(5) < counts[..., None]


def slow_align(
    region: Tensor, valid: Tensor, guidance: Tensor, temperature: float, answer: Callable[[list[float]], float] = max
) -> Alignment:
    """The definition, one image and one proposal after the other; `answer` is what a support says about a proposal."""
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
                        answer(
                            [
                                sum(
                                    float(guidance[g, k] * x[k] * y[k])
                                    for x, y in [
                                        (F.normalize(region[g, q, a], dim=0), F.normalize(region[g, s, b], dim=0))
                                    ]
                                    for k in range(width)
                                )
                                for b in theirs
                            ]
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


def mean_of_two_greatest(similarities: list[float]) -> float:
    best = sorted(similarities)[-2:]
    return sum(best) / len(best)


def softmax_mean(similarities: list[float]) -> float:
    weights = [math.exp(value / TAU) for value in similarities]
    return sum(weight * value for weight, value in zip(weights, similarities, strict=True)) / sum(weights)


ANSWERS: dict[Aggregation, Callable[[list[float]], float]] = {
    "maximum": max,
    "top_k": mean_of_two_greatest,
    "attention": softmax_mean,
}


@pytest.mark.parametrize("aggregation", ANSWERS)
def test_every_aggregation_equals_its_slow_loop(aggregation: Aggregation) -> None:
    region, guidance = normal(2, 3, 5, 4), normal(2, 4, seed=1).abs()
    slow = slow_align(region, some_valid(), guidance, TAU, ANSWERS[aggregation])
    fast = align(region, some_valid(), guidance, TAU, aggregation=aggregation, top_k=2)
    assert torch.allclose(fast.attention, slow.attention, atol=1e-5)
    assert torch.allclose(fast.prototype, slow.prototype, atol=1e-5)


@pytest.mark.parametrize("aggregation", ANSWERS)
def test_gradients_equal_finite_differences(aggregation: Aggregation) -> None:
    region, valid = normal(2, 3, 5, 4), some_valid()
    direction, step = normal(2, 3, 5, 4, seed=7), 1e-3

    def value(moved: Tensor) -> Tensor:
        return align(moved, valid, torch.ones(2, 4), 0.5, aggregation=aggregation, top_k=2).prototype.square().sum()

    leaf = region.clone().requires_grad_()
    value(leaf).backward()
    assert leaf.grad is not None
    slope = (value(region + step * direction) - value(region - step * direction)) / (2 * step)
    assert float((leaf.grad * direction).sum()) == pytest.approx(float(slope), rel=5e-3)


def test_one_of_top_k_is_the_maximum_and_more_than_there_are_is_the_mean() -> None:
    region, valid, guidance = normal(2, 3, 5, 4), some_valid(), torch.ones(2, 4)
    one = align(region, valid, guidance, TAU, aggregation="top_k", top_k=1)
    assert torch.allclose(one.attention, align(region, valid, guidance, TAU).attention, atol=1e-6)
    every = slow_align(region, valid, guidance, TAU, lambda values: sum(values) / len(values))
    found = align(region, valid, guidance, TAU, aggregation="top_k", top_k=9)
    assert torch.allclose(found.attention, every.attention, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_takes_no_part(bad: float) -> None:
    region, guidance = normal(2, 3, 5, 4), torch.ones(2, 4)
    without = torch.ones(2, 3, 5, dtype=torch.bool)
    without[0, 1, 2] = False
    broken = region.clone()
    broken[0, 1, 2, 3] = bad
    broken.requires_grad_()
    found, expected = align(broken, torch.ones_like(without), guidance, TAU), align(region, without, guidance, TAU)
    assert torch.equal(found.attention, expected.attention)
    assert torch.equal(found.prototype, expected.prototype)
    found.prototype.sum().backward()
    assert broken.grad is not None
    assert bool(torch.isfinite(broken.grad).all())
    text, area = torch.ones(2, 4), torch.ones(2, 3, 5)
    for chosen in (nearest_to_text(broken, ~torch.zeros_like(without), text), largest_proposal(broken, without, area)):
        assert bool(torch.isfinite(chosen.prototype).all())
        assert chosen.attention[0, 1, 2] == 0


# -------------------------------------------------------------------------------------------------- baselines


def test_region_text_takes_the_proposal_nearest_to_the_name() -> None:
    # Unit features (1, 0), (0.6, 0.8) and, longer but further away, (0, 9) -> cosines with (0.8, 0.6): 0.8, 0.96, 0.6.
    region = torch.tensor([[[[1.0, 0.0], [0.6, 0.8], [0.0, 9.0]], [[0.0, 1.0], [2.0, 0.0], [0.8, 0.6]]]])
    valid = torch.tensor([[[True, True, True], [True, True, False]]])  # image 1: 0.6 and 0.8; the third is padding
    found = nearest_to_text(region, valid, torch.tensor([[0.8, 0.6]]))
    assert found.attention.tolist() == [[[0, 1, 0], [0, 1, 0]]]
    assert torch.equal(found.prototype, torch.tensor([[[0.6, 0.8], [2.0, 0.0]]]))


def test_max_size_takes_the_largest_proposal() -> None:
    region = torch.tensor([[[[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [2.0, 0.0]]]])
    valid = torch.tensor([[[True, True], [True, False]]])
    found = largest_proposal(region, valid, torch.tensor([[[4.0, 9.0], [1.0, 100.0]]]))
    assert found.attention.tolist() == [[[0, 1], [1, 0]]]
    assert torch.equal(found.prototype, torch.tensor([[[0.6, 0.8], [0.0, 1.0]]]))


def test_without_a_proposal_the_baselines_look_at_nothing() -> None:
    for count in (0, 2):
        region, valid = torch.zeros(1, 2, count, 4), torch.zeros(1, 2, count, dtype=torch.bool)
        for found in (
            nearest_to_text(region, valid, unit(1, 4)),
            largest_proposal(region, valid, torch.zeros(1, 2, count)),
        ):
            assert torch.equal(found.attention, torch.zeros(1, 2, count))
            assert torch.equal(found.prototype, torch.zeros(1, 2, 4))


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


def test_attention_is_uniform_if_no_other_image_has_a_proposal() -> None:
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
        for guided in (
            align(region, valid, guidance_weights(text, torch.zeros(4)), TAU),
            align(region, valid, torch.ones(1, 4), TAU, text_GD=text),
        ):
            assert guided.attention.argmax(-1).tolist() == [[axis, axis]]
            assert float(guided.attention.amax()) > 0.99


def test_a_name_counts_as_much_as_all_supports() -> None:
    region, text = normal(2, 3, 5, 4), F.normalize(normal(2, 4, seed=1), dim=-1)
    images = align(region, some_valid(), torch.ones(2, 4), TAU).attention
    name = torch.softmax(torch.einsum("gqad,gd->gqa", F.normalize(region, dim=-1), text) / TAU, dim=-1)
    both = images * name
    found = align(region, some_valid(), torch.ones(2, 4), TAU, text_GD=text)
    assert torch.allclose(found.attention, both / both.sum(-1, keepdim=True).clamp(min=1e-12), atol=1e-5)


def test_gradients_reach_the_query_and_its_supports() -> None:
    region = normal(1, 3, 4, 8).requires_grad_()
    found = align(region, torch.ones(1, 3, 4, dtype=torch.bool), torch.ones(1, 8), TAU)
    found.prototype[0, 0].square().sum().backward()
    assert region.grad is not None
    assert bool((region.grad[0, 0].abs().sum(-1) > 0).all())  # every proposal of the query
    assert bool((region.grad[0, 1:].abs().sum((-2, -1)) > 0).all())  # and each support


def test_attention_without_a_gradient_is_the_same_attention() -> None:
    region = normal(1, 3, 4, 8).requires_grad_()
    valid, guidance = torch.ones(1, 3, 4, dtype=torch.bool), torch.ones(1, 8)
    found = align(region, valid, guidance, TAU, gradient=False)
    assert torch.equal(found.attention, align(region, valid, guidance, TAU).attention)
    found.prototype[0, 0].sum().backward()
    assert region.grad is not None
    assert torch.allclose(region.grad[0, 0], found.attention[0, 0, :, None].expand(4, 8))
    assert not region.grad[0, 1:].any()


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

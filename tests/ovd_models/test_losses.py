import math
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from ovd_models.codet.model import gather_captions
from ovd_models.losses import (
    caption_loss,
    concept_loss,
    cosine_logits,
    distillation_loss,
    federated_classes,
    sampled_concepts,
    sigmoid_loss,
    softmax_loss,
)

LN2 = math.log(2)


def softplus(value: float) -> float:
    """Cross-entropy of a logit: softplus(-x) for target 1, softplus(x) for target 0."""
    return math.log1p(math.exp(value))


def test_logits_are_cosines_times_the_temperature() -> None:
    feature = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    # (3, 4) / 5 = (0.6, 0.8); a zero feature has no direction, so every cosine is 0.
    expected = torch.tensor([[30.0, 40.0, -30.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(cosine_logits(feature, text, 50.0), expected)


def test_sigmoid_loss_sums_classes_and_averages_regions() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.0, 1.0]])
    # region 0 is class 0: softplus(-2) + softplus(-1); region 1 is background: softplus(0) + softplus(1)
    expected = (softplus(-2) + softplus(-1) + softplus(0) + softplus(1)) / 2
    assert float(sigmoid_loss(logits, torch.tensor([0, -1]))) == pytest.approx(expected, abs=1e-6)


def test_sigmoid_loss_of_no_region_is_zero_with_a_gradient() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = sigmoid_loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None


def test_sigmoid_loss_equals_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator) * 4
    labels = torch.tensor([0, -1, 4, 4, 2, -1, 1])
    slow = sum(
        softplus(-x) if k == label else softplus(x)
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
        for k, x in enumerate(row)
    )
    assert float(sigmoid_loss(logits, labels)) == pytest.approx(slow / 7, rel=1e-5)


def test_concept_loss_leaves_ignored_concepts_out() -> None:
    logits = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]])
    concept = torch.tensor([0, 2])
    ignored = torch.tensor([[True, True, False], [False, False, False]])
    # image 0: own concept 0 counts although it is mentioned, 1 is ignored, 2 is negative;
    # image 1: 0 and 1 are negative, 2 is its own
    expected = (softplus(-1) + softplus(-3) + softplus(0.5) + softplus(0) + softplus(-4)) / 2
    assert float(concept_loss(logits, concept, ignored)) == pytest.approx(expected, abs=1e-6)


def test_only_the_own_concept_is_a_positive_and_ignored_ones_have_no_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 9, generator=generator).requires_grad_()
    concept = torch.tensor([0, 3, 3, 8, 1, 0])
    ignored = torch.rand(6, 9, generator=generator) < 0.4
    concept_loss(logits, concept, ignored).backward()
    gradient = logits.grad
    assert gradient is not None
    own = F.one_hot(concept, 9).bool()
    assert bool((gradient[own] < 0).all())
    assert bool((gradient[ignored & ~own] == 0).all())
    assert bool((gradient[~ignored & ~own] > 0).all())


def test_sampled_concepts_are_those_mentioned_and_others_up_to_the_number() -> None:
    torch.manual_seed(0)
    mentioned = torch.zeros(400, 20, dtype=torch.bool)
    mentioned[:, 3], mentioned[::2, 11] = True, True
    sampled = sampled_concepts(mentioned, 6)
    assert bool((sampled.sum(1) == 6).all())
    assert bool(sampled[mentioned].all())
    share = sampled[::2, torch.arange(20)[~mentioned[0]]].float().mean(0)  # 4 of 18 others
    assert float((share - 4 / 18).abs().max()) < 0.1
    assert sampled_concepts(mentioned[:1], 1).sum() == 2  # more are mentioned
    assert bool(sampled_concepts(mentioned[:1], 50).all())


def test_concept_loss_of_no_image_is_zero() -> None:
    empty = torch.zeros(0, 4)
    assert float(concept_loss(empty, torch.zeros(0, dtype=torch.int64), empty.bool())) == 0


def test_caption_loss_weighs_negatives_by_rank() -> None:
    image = torch.tensor([[2.0, 0.0]])
    caption = torch.eye(2)[[0, 1, 0]]
    own, same_rank = torch.tensor([1]), torch.tensor([True, True, False])
    # temperature 1: logits 1, 0, 1; own caption 1: softplus(0); same rank: 0.125 softplus(1); other: 1.25 softplus(1)
    expected = LN2 + (0.125 + 1.25) * softplus(1)
    assert float(caption_loss(image, caption, own, same_rank, 1.0)) == pytest.approx(expected, abs=1e-6)


def test_caption_loss_equals_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(3, 8, generator=generator)
    caption = F.normalize(torch.randn(6, 8, generator=generator), dim=1)
    own, same_rank = torch.tensor([3, 4, 5]), torch.arange(6) >= 3
    total = 0.0
    for b in range(3):
        for m in range(6):
            x = 50 * float(F.cosine_similarity(image[b], caption[m], dim=0))
            if m == int(own[b]):
                total += max(0.0, -x) + math.log1p(math.exp(-abs(x)))
            else:
                weight = 0.125 if bool(same_rank[m]) else 1.25
                total += weight * (max(0.0, x) + math.log1p(math.exp(-abs(x))))
    assert float(caption_loss(image, caption, own, same_rank, 50.0)) == pytest.approx(total / 3, rel=1e-4)


def test_captions_of_one_process_are_its_own() -> None:
    rows = torch.randn(3, 4)
    gathered, own, same_rank = gather_captions(rows)
    assert gathered is rows
    assert own.tolist() == [0, 1, 2]
    assert same_rank.tolist() == [True] * 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def gather_on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = torch.arange(6.0).view(2, 3) + 100 * rank
    torch.save(gather_captions(rows), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_captions_of_two_processes_are_gathered_in_rank_order(tmp_path: Path) -> None:
    mp.spawn(gather_on_rank, (free_port(), str(tmp_path)), nprocs=2)
    expected = torch.cat([torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3) + 100])
    for rank in range(2):
        gathered, own, same_rank = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(gathered, expected)
        assert own.tolist() == [2 * rank, 2 * rank + 1]
        assert same_rank.tolist() == [rank == 0, rank == 0, rank == 1, rank == 1]


# ------------------------------------------------------------------------------------------------------------ ViLD


def test_softmax_loss_by_hand() -> None:
    logits, background = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.0, 1.0])
    # Region 0 is name 0: log(e + 1 + 1) - 1. Region 1 is background: log(1 + e^2 + e) - 1.
    expected = (math.log(math.e + 2) - 1 + math.log(1 + math.e**2 + math.e) - 1) / 2
    assert float(softmax_loss(logits, background, torch.tensor([0, -1]))) == pytest.approx(expected)


def test_novel_names_carry_no_probability() -> None:
    logits, background = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.randn(6)
    labels, trained = torch.tensor([0, 2, -1, 3, -1, 0]), torch.tensor([True, False, True, True, False])
    logits.requires_grad_()
    masked = softmax_loss(logits, background, labels, trained)
    rows = torch.tensor([0, -1, 1, 2])[labels]  # the same names without the novel ones
    alone = softmax_loss(logits[:, trained], background, torch.where(labels < 0, -1, rows))
    assert masked.item() == pytest.approx(alone.item())
    (gradient,) = torch.autograd.grad(masked, logits)
    assert bool((gradient[:, ~trained] == 0).all())
    # The released code multiplies such logits by 0, which leaves exp(0) in the denominator for each of them.
    multiplied = softmax_loss(logits * trained, background, labels)
    assert multiplied.item() > masked.item()


def test_distillation_by_hand() -> None:
    student, teacher = torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # |0.6 - 1| + |0.8 - 0| = 1.2, and 0 for the second one.
    assert float(distillation_loss(student, teacher, torch.tensor([True, True]))) == pytest.approx(0.6)
    assert float(distillation_loss(student, teacher, torch.tensor([True, False]))) == pytest.approx(1.2)
    # 0.16 + 0.64, which is 2 - 2 * 0.6: twice the cosine distance.
    assert float(distillation_loss(student, teacher, torch.tensor([True, False]), "l2")) == pytest.approx(0.8)


def test_distillation_equals_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)
    valid = torch.tensor([True, False, True, True, False, True, True])
    total = 0.0
    for row in range(7):
        if valid[row]:
            one, two = student[row] / student[row].norm(), teacher[row] / teacher[row].norm()
            total += sum(abs(float(one[k] - two[k])) for k in range(5))
    assert float(distillation_loss(student, teacher, valid)) == pytest.approx(total / 5, rel=1e-5)


def test_rows_that_are_not_valid_have_no_effect() -> None:
    student = torch.randn(3, 4).requires_grad_()
    teacher, valid = torch.randn(3, 4), torch.tensor([True, False, True])
    changed = torch.where(valid[:, None], teacher, torch.full((3, 4), 1e4))
    same = [distillation_loss(student, rows, valid).item() for rows in (teacher, changed)]
    assert same[0] == same[1]
    distillation_loss(student, changed, valid).backward()
    assert student.grad is not None
    assert student.grad.abs().sum(1).gt(0).tolist() == [True, False, True]


def test_zeros_have_finite_losses_and_gradients() -> None:
    student = torch.zeros(2, 4, requires_grad=True)
    loss = distillation_loss(student, torch.eye(4)[:2], torch.tensor([True, True]))
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


def test_losses_of_nothing_are_zero_and_keep_their_gradient() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    nothing = distillation_loss(student, torch.randn(3, 4), torch.zeros(3, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0
    assert student.grad is not None
    assert bool((student.grad == 0).all())
    assert float(distillation_loss(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))) == 0
    assert float(softmax_loss(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, dtype=torch.int64))) == 0


def test_cosines_stay_exact_under_autocast() -> None:
    feature, text = torch.randn(6, 32), F.normalize(torch.randn(9, 32), dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = cosine_logits(feature, text, 100.0)
    assert torch.equal(found, cosine_logits(feature, text, 100.0))


@pytest.mark.parametrize("seed", range(4))
def test_federated_classes_are_those_that_a_multinomial_draw_adds(seed: int) -> None:
    """The released code's rule: the classes that occur, then as many drawn as are left of the budget."""
    weights = torch.rand(30, generator=torch.Generator().manual_seed(seed)) + 0.1
    labels = torch.tensor([4, 4, 17, -1])
    appeared = torch.tensor([4, 17, 30])
    left = F.pad(weights, (0, 1)).index_fill(0, appeared, 0.0)
    torch.manual_seed(seed)
    drawn = torch.multinomial(left, 10 - len(appeared), replacement=False)
    torch.manual_seed(seed)
    ours = federated_classes(labels, weights, 10)
    assert set(ours.nonzero()[:, 0].tolist()) == {4, 17, *drawn.tolist()}
    assert int(ours.sum()) == 9  # the background is the tenth

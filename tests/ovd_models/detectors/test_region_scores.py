import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.detectors.region_query import RegionQuery
from ovd_models.detectors.region_scores import (
    RegionRecord,
    Scoring,
    attribute_probabilities,
    child_probabilities,
    class_probabilities,
    detect_in_record,
    geometric_mean,
    image_exponents,
    score_labels,
    use_teacher,
)
from ovd_models.detectors.resizing import Selection
from ovd_models.vocabulary import Vocabulary

D = 8


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def words(count: int, base: list[bool] | None = None, seed: int = 5, kind: str = "name") -> Vocabulary:
    flags = None if base is None else torch.tensor(base)
    return Vocabulary(tuple(f"{kind} {n}" for n in range(count)), unit(count, D, seed=seed), flags)


def record(count: int = 4, *, text: bool = True, image: bool = True) -> RegionRecord:
    corner = 10.0 * torch.arange(count)[:, None]
    return RegionRecord(
        torch.cat([corner, corner, corner + 8, corner + 8], 1),
        torch.linspace(0.9, 0.3, count),
        unit(count, D, seed=1) if text else None,
        torch.linspace(-0.2, 0.4, count) if text else None,
        unit(count, D, seed=2) if image else None,
        100,
        100,
    )


def slow_softmax(values: list[float]) -> list[float]:
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def slow_probabilities(entry: RegionRecord, vocabulary: Vocabulary, scoring: Scoring, names: list[int]) -> Tensor:
    """The definition, one region and one name after the other."""
    found = torch.zeros(len(entry.boxes), len(names))
    for n in range(len(entry.boxes)):
        heads = []
        for rows, temperature in ((entry.text, scoring.temperature), (entry.image, scoring.image_temperature)):
            if rows is None:
                heads.append(None)
                continue
            logits = [temperature * float(rows[n] @ vocabulary.embeddings[k]) for k in names]
            if rows is entry.text and entry.background is not None:
                logits.append(temperature * float(entry.background[n]))
            heads.append(slow_softmax(logits))
        text, image = heads
        for column, k in enumerate(names):
            if text is None or image is None:
                found[n, column] = (text or image or [])[column]
                continue
            if vocabulary.is_base is None:
                exponent = scoring.unknown_image
            else:
                exponent = scoring.base_image if vocabulary.is_base[k] else scoring.novel_image
            found[n, column] = text[column] ** (1 - exponent) * image[column] ** exponent
    return found


@pytest.mark.parametrize("base", [None, [True, False, True, True, False]])
@pytest.mark.parametrize(("text", "image"), [(True, True), (True, False), (False, True)])
def test_probabilities_equal_a_slow_loop(base: list[bool] | None, text: bool, image: bool) -> None:
    entry, vocabulary = record(text=text, image=image), words(5, base)
    scoring = Scoring(temperature=7.0, image_temperature=4.0, unknown_image=0.25)
    expected = slow_probabilities(entry, vocabulary, scoring, list(range(5)))
    assert torch.allclose(class_probabilities(entry, vocabulary, scoring), expected, atol=1e-6)


def test_fusion_by_hand() -> None:
    # A base name leans on the text head: 0.8^(2/3) 0.1^(1/3) = 0.4; a novel one on the image head: 0.2.
    text, image = torch.tensor([[0.8, 0.8]]), torch.tensor([[0.1, 0.1]])
    vocabulary = words(2, [True, False])
    found = geometric_mean(text, image, image_exponents(vocabulary, Scoring()))
    assert torch.allclose(found, torch.tensor([[0.4, 0.2]]), atol=1e-6)


def test_without_a_base_flag_all_names_are_fused_alike() -> None:
    exponents = image_exponents(words(3), Scoring(unknown_image=0.4))
    assert torch.allclose(exponents, torch.full((3,), 0.4))


def test_the_background_takes_probability_from_the_text_head_alone() -> None:
    entry, vocabulary = record(), words(3)
    text = class_probabilities(dataclasses.replace(entry, image=None), vocabulary, Scoring(temperature=5.0))
    image = class_probabilities(dataclasses.replace(entry, text=None, background=None), vocabulary, Scoring())
    assert bool((text.sum(1) < 1).all())
    assert torch.allclose(image.sum(1), torch.ones(4))


def test_objectness_enters_as_a_geometric_mean() -> None:
    entry, query = record(), RegionQuery(words(3))
    plain, _ = score_labels(entry, query, Scoring())
    mean, _ = score_labels(entry, query, Scoring(objectness=0.5))
    assert torch.allclose(mean, (plain * entry.objectness[:, None]).sqrt(), atol=1e-6)
    alone, _ = score_labels(entry, query, Scoring(objectness=1.0))
    assert torch.allclose(alone, entry.objectness[:, None].expand(4, 3))


def test_attributes_are_independent_of_names() -> None:
    name, attribute = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.9, 0.1]])
    assert torch.allclose(attribute_probabilities(name, attribute), torch.tensor([[0.45, 0.225, 0.05, 0.025]]))
    query = RegionQuery(words(2), attributes=words(3, seed=9, kind="colour"))
    scores, labels = score_labels(record(), query, Scoring())
    assert labels[:3] == ("colour 0 name 0", "colour 0 name 1", "colour 1 name 0")
    plain, _ = score_labels(record(), RegionQuery(words(2)), Scoring())
    assert torch.allclose(scores.view(4, 3, 2).sum(1), plain, atol=1e-6)


def test_children_share_the_probability_of_their_parent() -> None:
    # Children 0 and 2 below parent 0, child 1 alone below parent 1.
    parent, logits = torch.tensor([[0.6, 0.3]]), torch.tensor([[1.0, 7.0, 0.0]])
    first = 0.6 * math.e / (math.e + 1)
    expected = torch.tensor([[first, 0.3, 0.6 - first]])
    assert torch.allclose(child_probabilities(parent, logits, torch.tensor([0, 1, 0])), expected)


def test_families_far_apart_keep_their_probability() -> None:
    # Siblings 190 below another family would vanish in float32.
    found = child_probabilities(
        torch.tensor([[0.5, 0.5]]), torch.tensor([[100.0, -90.0, -90.0]]), torch.tensor([0, 1, 1])
    )
    assert torch.allclose(found, torch.tensor([[0.5, 0.25, 0.25]]))


def test_labels_of_a_hierarchy_are_children_and_childless_names() -> None:
    query = RegionQuery(words(3), children=words(4, seed=8, kind="child"), parents=torch.tensor([2, 0, 2, 0]))
    scores, labels = score_labels(record(), query, Scoring())
    assert labels == ("name 1", "child 0", "child 1", "child 2", "child 3")
    plain, _ = score_labels(record(), RegionQuery(words(3)), Scoring())
    assert torch.allclose(scores[:, 0], plain[:, 1])
    assert torch.allclose(scores[:, [1, 3]].sum(1), plain[:, 2], atol=1e-6)


def test_the_teacher_on_crops_replaces_the_image_head() -> None:
    images = [torch.zeros(3, 100, 100, dtype=torch.uint8)]
    seen = unit(4, D, seed=11)
    (both,) = use_teacher([record(image=False)], images, lambda image, boxes: seen, keep_text=True)
    assert both.text is not None and both.image is seen
    (alone,) = use_teacher([record()], images, lambda image, boxes: seen, keep_text=False)
    assert alone.text is None and alone.background is None and alone.image is seen


def test_the_best_regions_by_objectness_are_kept_together() -> None:
    entry = dataclasses.replace(record(), objectness=torch.tensor([0.1, 0.9, 0.5, 0.7]))
    best = entry.top(2)
    assert torch.equal(best.objectness, torch.tensor([0.9, 0.7]))
    assert entry.text is not None and best.text is not None
    assert torch.equal(best.text, entry.text[[1, 3]])
    assert torch.equal(best.boxes, entry.boxes[[1, 3]])


def test_an_image_without_regions_has_no_detections() -> None:
    empty = record(0)
    query = RegionQuery(words(2), attributes=words(2, seed=9))
    found = detect_in_record(empty, query, Scoring(objectness=0.5), Selection(0.5, 0.0, 10))
    assert (len(found), found.boxes.shape, found.names[0]) == (0, (0, 4), "name 0 name 0")


def test_a_name_scores_as_its_best_synonym() -> None:
    entry, rows = record(), words(3).embeddings
    pair = Vocabulary(("a", "b"), rows, owners=torch.tensor([0, 0, 1]))
    logits = [4.0 * own @ rows.T for own in (entry.text, entry.image) if own is not None]
    text, image = (torch.stack([one[:, :2].amax(1), one[:, 2]], 1) for one in logits)
    assert entry.background is not None
    expected = torch.cat([text, 4.0 * entry.background[:, None]], 1).softmax(1)[:, :2] ** 0.6 * image.softmax(1) ** 0.4
    found = class_probabilities(entry, pair, Scoring(temperature=4.0, image_temperature=4.0))
    assert torch.allclose(found, expected, atol=1e-6)

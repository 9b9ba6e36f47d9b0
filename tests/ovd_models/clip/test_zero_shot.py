import math

import pytest
import torch
from torch.nn import functional as F

from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder
from ovd_models.clip.zero_shot import calibration_error, classify, fit_temperature, vocabulary_logits
from ovd_models.errors import InputError
from ovd_models.vocabulary import Vocabulary, build_vocabulary

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
NAMES = ["cat", "dog", "anchor"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return Clip(ClipConfig(embed_dim=16, text=TEXT)).eval()


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_best_names_come_first_with_probabilities(clip: Clip) -> None:
    vocabulary = build_vocabulary(ClipTextEncoder(clip.config, clip.model.text, "clip:test"), NAMES)
    images = pictures(300)  # more than are embedded at a time
    guesses = classify(clip, images, vocabulary, top=2, temperature=0.5)
    expected = (math.exp(2.7) * clip.encode_images(images) @ vocabulary.embeddings.T / 0.5).softmax(1)
    assert len(guesses) == 300
    for row in (0, 299):
        order = expected[row].argsort(descending=True)[:2].tolist()
        assert guesses[row].labels == tuple(NAMES[index] for index in order)
        assert guesses[row].scores == pytest.approx(expected[row][order].tolist(), rel=1e-4)
    assert sum(classify(clip, images[:1], vocabulary, top=9)[0].scores) == pytest.approx(1)


def test_one_name_of_a_million_is_found(clip: Clip) -> None:
    rows = F.normalize(torch.randn(1_000_000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    images = pictures(20)  # more than are looked at together
    planted = [7 + 40_000 * number for number in range(20)]
    rows[planted] = clip.encode_images(images).detach()
    names = tuple(f"thing {number}" for number in range(len(rows)))
    found = [guess.labels for guess in classify(clip, images, Vocabulary(names, rows), top=20)]
    # an untrained model's images are alike, so each finds its own among those of the others
    assert all(f"thing {row}" in labels for row, labels in zip(planted, found, strict=True))


def test_no_image_has_no_guess(clip: Clip) -> None:
    vocabulary = build_vocabulary(ClipTextEncoder(clip.config, clip.model.text, "clip:test"), NAMES)
    assert classify(clip, pictures(0), vocabulary) == []
    assert vocabulary_logits(clip, pictures(0), vocabulary).shape == (0, 3)


def test_the_best_synonym_gives_the_logit(clip: Clip) -> None:
    encoder = ClipTextEncoder(clip.config, clip.model.text, "clip:test")
    both = build_vocabulary(encoder, ["cat", "anchor"], synonyms={"cat": ["kitten"]}, merge="max")
    alone = [vocabulary_logits(clip, pictures(4), build_vocabulary(encoder, [name])) for name in ("cat", "kitten")]
    found = vocabulary_logits(clip, pictures(4), both)
    assert torch.allclose(found[:, 0], torch.cat(alone, 1).amax(1), atol=1e-5)


@pytest.mark.parametrize(("top", "temperature"), [(0, 1.0), (1, 0.0), (1, math.nan)])
def test_what_makes_no_sense_is_told(clip: Clip, top: int, temperature: float) -> None:
    vocabulary = build_vocabulary(ClipTextEncoder(clip.config, clip.model.text, "clip:test"), NAMES)
    with pytest.raises(InputError, match=r"expected (at least 1|more than 0)"):
        classify(clip, pictures(1), vocabulary, top=top, temperature=temperature)


# ------------------------------------------------------------------------------------------------------- calibration


def test_a_temperature_is_found_that_was_put_in() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 8, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)  # calibrated at T = 1
    for factor in (0.05, 1.0, 12.0):
        assert fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=0.05)
    overconfident = (logits * 12).softmax(1)
    assert calibration_error(overconfident, labels) > 0.1
    assert calibration_error(logits.softmax(1), labels) < 0.03


def test_two_answers_three_to_one_have_a_temperature_by_hand() -> None:
    # logits (2, 0), right in 3 of 4: likeliest where the sigmoid of 2 / T is 3/4, so T = 2 / ln 3
    logits, labels = torch.tensor([[2.0, 0.0]]).repeat(4, 1), torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, labels) == pytest.approx(2 / math.log(3), rel=1e-3)


def test_calibration_error_by_hand() -> None:
    # two bins: confidences 0.6 and 0.7, half right: |0.5 - 0.65| x 2/3; confidence 0.3 wrong: 0.3 x 1/3
    probabilities = torch.tensor([[0.6, 0.2, 0.2, 0.0], [0.7, 0.1, 0.1, 0.1], [0.3, 0.25, 0.25, 0.2]])
    labels = torch.tensor([0, 1, 1])
    assert calibration_error(probabilities, labels, bins=2) == pytest.approx(0.15 * 2 / 3 + 0.3 / 3, abs=1e-6)


@pytest.mark.parametrize("labels", [[], [0], [0, 3], [-1, 0]])
def test_labels_that_do_not_fit_are_told(labels: list[int]) -> None:
    scores, given = torch.full((2, 3), 1 / 3), torch.tensor(labels, dtype=torch.int64)
    for measure in (fit_temperature, calibration_error):
        with pytest.raises(InputError, match="calibration"):
            measure(scores, given)

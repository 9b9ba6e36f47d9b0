"""Zero-shot classification by CLIP, with calibrated probabilities.

B images, K names.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.clip.model import Clip, zero_shot_logits
from ovd_models.errors import InputError
from ovd_models.vocabulary import Vocabulary

BATCH = 256
"""Images embedded at a time."""
SCORES = 1 << 24
"""Logits in memory at a time, 64 MiB: with a million names, images are split into smaller batches."""
LOG_LIMIT = 6.9
"""A fitted temperature lies between 1/1000 and 1000."""


@dataclass(frozen=True)
class TopNames:
    """The most probable names of an image, best first."""

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    """Probabilities among all names of the vocabulary."""


def vocabulary_logits(model: Clip, images: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[B, 3, S, S] uint8 -> [B, K] scaled cosines, of a name's best synonym."""
    parts = [zero_shot_logits(model, part, vocabulary.embeddings) for part in torch.split(images, BATCH)]
    return vocabulary.strongest(torch.cat(parts))


def classify(
    model: Clip, images: Tensor, vocabulary: Vocabulary, *, top: int = 5, temperature: float = 1.0
) -> list[TopNames]:
    """The `top` names of each image.

    Args:
        model: in evaluation mode.
        images: [B, 3, S, S] uint8 RGB of the model's size.
        vocabulary: K names.
        top: names for each image, or all if there are fewer.
        temperature: divides the logits, see `fit_temperature`.

    Raises:
        InputError: `top` or `temperature` is not positive.
    """
    if top < 1:
        raise InputError(f"top: {top}, expected at least 1")
    if not temperature > 0:
        raise InputError(f"temperature: {temperature}, expected more than 0")
    results = []
    for part in torch.split(images, max(1, SCORES // len(vocabulary.embeddings))) if len(images) else ():
        probabilities_BK = (vocabulary_logits(model, part, vocabulary) / temperature).softmax(1)
        scores, rows = probabilities_BK.topk(min(top, len(vocabulary)), dim=1)
        results += [
            TopNames(tuple(vocabulary.names[index] for index in row), tuple(score))
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        ]
    return results


# ------------------------------------------------------------------------------------------------------- calibration


def fit_temperature(logits_BK: Tensor, labels_B: Tensor) -> float:
    """The T that maximises the likelihood of held-out labels under softmax(logits / T) (Guo et al. 2017, section 4.2).

    The negative log-likelihood has a single minimum in T, which a golden-section search of log T finds.

    Raises:
        InputError: there is no image, or a label is out of range.
    """
    _check(logits_BK, labels_B)

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits_BK.double() / math.exp(log_temperature), labels_B))

    section = (math.sqrt(5) - 1) / 2
    low, high = -LOG_LIMIT, LOG_LIMIT
    while high - low > 1e-5:
        left, right = high - section * (high - low), low + section * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)


def calibration_error(probabilities_BK: Tensor, labels_B: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| in equal bins of confidence, weighted by their images.

    Raises:
        InputError: there is no image, or a label is out of range.
    """
    _check(probabilities_BK, labels_B)
    confidence_B, guess_B = probabilities_BK.double().max(1)
    return calibration_error_of(confidence_B, guess_B == labels_B, bins)


def calibration_error_of(confidence_B: Tensor, right_B: Tensor, bins: int = 15) -> float:
    """`calibration_error` from the probability of each first guess, and whether it is right."""
    gap_B = right_B.double() - confidence_B.double()
    bin_B = (confidence_B.double() * bins).ceil().long().clamp(1, bins) - 1
    return float(gap_B.new_zeros(bins).index_add(0, bin_B, gap_B).abs().sum()) / len(right_B)


def _check(scores_BK: Tensor, labels_B: Tensor) -> None:
    if not len(labels_B) or len(scores_BK) != len(labels_B):
        raise InputError(f"calibration: {len(scores_BK)} images, {len(labels_B)} labels, expected as many of both")
    low, high = int(labels_B.min()), int(labels_B.max())
    if low < 0 or high >= scores_BK.shape[1]:
        raise InputError(f"calibration: labels {low} to {high}, expected 0 to {scores_BK.shape[1] - 1}")

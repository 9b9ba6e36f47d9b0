"""Zero-shot classification of a labelled set, as CLIP's paper measures it (Radford et al. 2021, section 3.1).

N examples, K names, D embedding width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ovd_models.clip.zero_shot import calibration_error, calibration_error_of, fit_temperature

CHUNK = 1 << 24
"""Logits in memory at a time."""
FIT_ON = 2000
"""Examples from which the temperature is fitted."""


@dataclass(frozen=True)
class Answers:
    """The names that a set's examples were given."""

    labels: Tensor
    """[N] the right ones."""
    ranked: Tensor
    """[N, k] the most probable ones, best first."""
    confidence: Tensor
    """[N] probability of the first one."""
    calibration_error: float
    temperature: float
    """Fitted to half of the examples; NaN for a single one."""
    calibration_error_fitted: float
    """Of the other half with that temperature."""

    @property
    def right(self) -> Tensor:
        """[N] bool: the first name is right."""
        return self.ranked[:, 0] == self.labels

    @property
    def top1(self) -> float:
        """Top-1 accuracy."""
        return float(self.right.double().mean())

    def numbers(self) -> dict[str, float]:
        """`top1`, `topk`, `mean_of_classes` (top-1 of each name, averaged), and calibration."""
        classes = [
            float(self.right[self.labels == label].double().mean()) for label in sorted(set(self.labels.tolist()))
        ]
        return {
            "top1": self.top1,
            "topk": float((self.ranked == self.labels[:, None]).any(1).double().mean()),
            "mean_of_classes": sum(classes) / len(classes),
            "calibration_error": self.calibration_error,
            "temperature": self.temperature,
            "calibration_error_fitted": self.calibration_error_fitted,
        }


def answer(features_ND: Tensor, names_KD: Tensor, labels_N: Tensor, *, scale: float, top: int) -> Answers:
    """Classify examples by the cosine of their features and the names' embeddings.

    Args:
        features_ND: unit rows.
        names_KD: unit rows.
        labels_N: the right name of each example.
        scale: of the logits: the CLIP's own.
        top: names kept for each example, or all if there are fewer.
    """
    ranked, confidence = [], []
    for rows in torch.split(features_ND, max(1, CHUNK // len(names_KD))):
        logits = scale * rows @ names_KD.T
        probabilities, best = logits.softmax(1).topk(min(top, len(names_KD)), dim=1)
        ranked.append(best)
        confidence.append(probabilities[:, 0])
    fitted, fit_error = float("nan"), float("nan")
    fit, test = _halves(len(labels_N))
    if len(fit) and len(test):
        fitted = fit_temperature(scale * features_ND[fit] @ names_KD.T, labels_N[fit])
        logits = scale / fitted * features_ND[test] @ names_KD.T
        fit_error = calibration_error(logits.softmax(1), labels_N[test])
    first, sure = torch.cat(ranked), torch.cat(confidence)
    error = calibration_error_of(sure, first[:, 0] == labels_N)
    return Answers(labels_N, first, sure, error, fitted, fit_error)


def _halves(count: int) -> tuple[Tensor, Tensor]:
    """Two halves of some examples, in a fixed random order, of at most `FIT_ON` each."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    half = count // 2
    return order[:half][:FIT_ON], order[half:][:FIT_ON]

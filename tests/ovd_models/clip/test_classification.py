import pytest
import torch

from ovd_models.clip.classification import answer
from ovd_models.clip.zero_shot import calibration_error


def test_top_names_and_accuracy_by_hand() -> None:
    # Three names along the axes; the second example is nearer to name 2 than to its own name 1.
    names = torch.eye(3)
    features = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.8], [0, 0, 1.0], [0.8, 0.6, 0]])
    labels = torch.tensor([0, 1, 2, 0])
    found = answer(features, names, labels, scale=10.0, top=2)
    assert found.ranked[:, 0].tolist() == [0, 2, 2, 0]
    assert found.ranked[1].tolist() == [2, 1]
    numbers = found.numbers()
    assert numbers["top1"] == pytest.approx(3 / 4)
    assert numbers["topk"] == pytest.approx(1.0)
    assert numbers["mean_of_classes"] == pytest.approx(2 / 3)
    probabilities = (10 * features @ names.T).softmax(1)
    assert numbers["calibration_error"] == pytest.approx(calibration_error(probabilities, labels))
    assert found.confidence.tolist() == pytest.approx(probabilities.max(1).values.tolist())


def test_a_fitted_temperature_calibrates_too_sure_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    names = torch.eye(4)
    labels = torch.randint(4, (4000,), generator=generator)
    noisy = torch.where(torch.rand(4000, generator=generator) < 0.6, labels, (labels + 1) % 4)
    found = answer(names[noisy], names, labels, scale=20.0, top=1).numbers()
    assert found["top1"] == pytest.approx(0.6, abs=0.03)
    assert found["calibration_error"] > 0.3
    assert found["calibration_error_fitted"] < 0.05
    assert found["temperature"] > 5


def test_one_example_and_one_name_have_no_temperature() -> None:
    found = answer(torch.eye(1), torch.eye(1), torch.tensor([0]), scale=1.0, top=5).numbers()
    assert found["top1"] == found["topk"] == 1
    assert found["temperature"] != found["temperature"]

import pytest
import torch
from pretend_device import DEVICE, pretended
from torch import Tensor, nn


def test_a_model_trains_on_the_device_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(5, 3)
    expected = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
    with pretended() as waits:
        moved = model.to(DEVICE)
        moved(inputs.to(DEVICE)).square().sum().backward()
        assert all(value.device == DEVICE for value in moved.parameters())
        found = [value.grad.cpu() for value in moved.parameters() if value.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(waits) == 4  # the copies to the CPU


def device_values() -> Tensor:
    return torch.tensor([3.0, 0.0, 1.0], device=DEVICE)


def test_tensors_of_two_devices_do_not_meet() -> None:
    with pretended():
        values = device_values()
        assert (values + torch.tensor(1.0)).tolist() == [4, 1, 2]
        assert values[torch.tensor([0, 2])].tolist() == [3, 1]
        for meet in (
            lambda: values + torch.ones(3),
            lambda: torch.cat([values, torch.ones(1)]),
            lambda: torch.where(values > 0, values, torch.ones(3)),
            lambda: torch.ones(3)[values.long()],
            lambda: nn.Linear(3, 1)(values),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                meet()


def test_numpy_needs_a_copy_to_the_cpu() -> None:
    with pretended():
        with pytest.raises(TypeError, match="pretend"):
            device_values().numpy()
        assert device_values().cpu().numpy().sum() == 4


def test_a_generator_of_the_cpu_does_not_fill_a_tensor_of_the_device() -> None:
    generator = torch.Generator()
    with pretended():
        assert torch.rand(3, generator=generator).to(DEVICE).device == DEVICE
        for draw in (
            lambda: torch.rand(3, generator=generator, device=DEVICE),
            lambda: torch.randperm(3, generator=generator, device=DEVICE),
            lambda: device_values().exponential_(generator=generator),
            lambda: torch.multinomial(device_values(), 1, generator=generator),
        ):
            with pytest.raises(RuntimeError, match="generator"):
                draw()


def test_autocast_follows_the_lists_of_cuda() -> None:
    with pretended(autocast=True):
        values, weight = torch.rand(2, 3, device=DEVICE), torch.rand(3, 3, device=DEVICE)
        product = values @ weight
        assert product.dtype == torch.bfloat16
        assert product.exp().dtype == product.softmax(-1).dtype == torch.float32
        assert torch.cat([product, values]).dtype == torch.float32
        assert product.relu().dtype == torch.bfloat16
        with pytest.raises(RuntimeError):  # an operator on no list takes one type only
            values.index_copy(0, torch.zeros(1, dtype=torch.int64, device=DEVICE), product[:1])
        with torch.autocast(DEVICE.type, enabled=False):
            assert (values @ weight).dtype == torch.float32


@pytest.mark.parametrize(
    ("count", "wait"),
    [
        (1, lambda values: values[0].item()),
        (1, lambda values: values.tolist()),
        (1, lambda values: values.cpu()),
        (1, lambda values: float(values.sum())),
        (1, lambda values: bool((values > 0).any())),
        (1, lambda values: torch.nonzero(values)),
        (1, lambda values: torch.where(values > 0)),
        (1, lambda values: values[values > 0]),
        (1, lambda values: torch.masked_select(values, values > 0)),
        (1, lambda values: torch.unique(values)),
        (1, lambda values: torch.repeat_interleave(values.long())),
        (1, lambda values: values.index_put((values > 0,), values[:2])),
        (0, lambda values: torch.repeat_interleave(values.long(), output_size=4)),
        (0, lambda values: values.masked_fill(values > 0, 0.0)),
        (0, lambda values: torch.where(values > 0, values, 0.0).topk(2)),
        (0, lambda values: values.to("cpu", non_blocking=True)),
        (0, lambda values: values[[0, 2]] + values.new_tensor([1, 2])),
    ],
)
def test_waits_of_the_host_are_counted(count: int, wait: object) -> None:
    with pretended() as waits:
        wait(device_values())  # type: ignore[operator]
    assert len(waits) == count
    assert all(entry.line.startswith("tests/test_pretend_device.py:") for entry in waits)

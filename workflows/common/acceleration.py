"""How a training uses its device: precision, compiled backbones, and copies of batches beside the computation."""

from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import torch
from ray.data.collate_fn import ArrowBatchCollateFn
from torch import Tensor, nn

from ovd_models.batches import TensorRecord
from workflows.common.optimisation import Precision

R = TypeVar("R", bound=TensorRecord)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of matrix products and convolutions in training."""
    chosen: str = precision
    if precision in ("auto", "fast"):
        native = precision == "fast" and torch.cpu.get_capabilities().get("avx512_bf16", False)
        chosen = "bf16" if device.type != "cpu" or native else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[chosen]


COMPILED = frozenset({"backbone", "pyramid", "image_encoder", "visual", "clip"})
"""Names of the modules that see whole images: most of a model's work, in few shapes."""


def compile_backbones(model: nn.Module) -> None:
    """Compile the outermost modules named in `COMPILED`, in place; weights keep their names."""
    for name, child in model.named_children():
        if name in COMPILED:
            child.compile()
        else:
            compile_backbones(child)


class PinnedCollate(ArrowBatchCollateFn):
    """A collate function whose batches are in pinned memory, from which a GPU copies while it computes."""

    def __init__(self, collate: Callable[[pa.Table], TensorRecord]) -> None:
        self.collate = collate

    def __call__(self, batch: pa.Table) -> Any:
        """The batch; runs in the threads that prepare batches ahead of the loop."""
        return self.collate(batch).map(Tensor.pin_memory)


class DeviceCopies:
    """Copies pinned batches to a GPU on a stream of their own, beside the kernels of the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batch: R) -> R:
        """The batch on the device, ready for the current stream."""
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device)
        current.wait_stream(self.stream)

        def used_by_current(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)  # its memory is free once the step has used it
            return tensor

        return moved.map(used_by_current)

"""ONNX files of traced models, and their check against PyTorch."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from ovd_models.errors import InputError

OPSET = 17
"""Version of ONNX's operators; runtimes since 2022 know it."""
TOLERANCE = 1e-4
DETECTIONS = ("boxes", "scores", "labels")
"""First outputs of a detector, best first."""
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """A model to be exported as one file."""

    name: str
    """Of the file, before `.onnx`."""
    model: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    """Input or output -> dimension -> name, for dimensions of any size."""
    examples: Sequence[tuple[Tensor, ...]]
    """Inputs of different sizes; the first is traced, all are compared."""
    eager: Callable[..., tuple[Tensor, ...]]
    """What the outputs are compared with: the same inputs through the library's own functions."""
    program: bool = True
    """Whether `torch.export` captures it; not where the number of regions depends on their values."""


def write_part(part: Part, folder: Path) -> float:
    """Export a part, and compare it with PyTorch on its examples; returns the largest relative difference.

    Raises:
        InputError: the difference exceeds `TOLERANCE`, or outputs differ in number; the file is removed.
    """
    path = folder / f"{part.name}.onnx"
    with torch.no_grad(), slow_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are constant here, such as strides
        torch.onnx.export(
            part.model.eval(),
            part.examples[0],
            path,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_axes={name: dict(axes) for name, axes in part.dynamic.items()},
            opset_version=OPSET,
            dynamo=False,  # torchvision's operators of varying numbers of boxes are registered for tracing
        )
    session = open_session(path)
    return check_outputs(part, path, lambda *inputs: map(torch.from_numpy, run_session(session, part, inputs)))


@contextmanager
def slow_attention() -> Iterator[None]:
    """Attention without the fused operator of inference, which has no exported form."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def open_session(path: str | Path, threads: int = 0) -> onnxruntime.InferenceSession:
    """A session on the CPU; 0 threads are all cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, part: Part, inputs: Sequence[Tensor]) -> list[Array]:
    """Outputs for inputs in the part's order."""
    feed = {name: np.asarray(value.numpy()) for name, value in zip(part.inputs, inputs, strict=True)}
    return list(session.run(None, feed))


def check_outputs(part: Part, path: Path, run: Callable[..., Iterable[Tensor]]) -> float:
    """The largest difference between an exported file and PyTorch over the part's examples.

    Differences of values beyond 1, such as coordinates and logits, are relative to the largest of the output.

    Args:
        part: that was exported.
        path: the file.
        run: its outputs for the part's inputs.

    Raises:
        InputError: the difference exceeds `TOLERANCE`, or outputs differ in shape; the file is removed.
    """
    worst = 0.0
    for inputs in part.examples:
        with torch.no_grad():
            expected = part.eager(*inputs)
        outputs = list(run(*inputs))
        if part.outputs[:3] == DETECTIONS:
            outputs = in_order_of(expected, outputs)
        for name, ours, theirs in zip(part.outputs, outputs, expected, strict=True):
            scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
            same = ours.shape == theirs.shape
            difference = float((ours - theirs).abs().max()) / scale if same and theirs.numel() else 0.0
            worst = max(worst, difference)
            if not same or not difference <= TOLERANCE:
                path.unlink()
                found = f"is {difference:.1e} off" if same else f"has shape {list(ours.shape)}"
                expected_of = f"to {TOLERANCE:g}" if same else str(list(theirs.shape))
                raise InputError(f"{path}: {name} {found}, expected PyTorch's {expected_of}")
    return worst


def in_order_of(expected: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Detections in the order of the expected ones, since rounding decides that of detections of almost equal scores.

    Args:
        expected: boxes [M, 4], scores [M], labels [M], and others with M rows.
        outputs: the same of an exported file.
    """
    if [value.shape for value in outputs] != [value.shape for value in expected] or not len(expected[0]):
        return list(outputs)
    (first_M6, second_M6) = (torch.column_stack([value.float() for value in of[:3]]) for of in (expected, outputs))
    nearest_M = torch.cdist(first_M6, second_M6, p=float("inf")).argmin(1)
    each_once = len(torch.unique(nearest_M)) == len(nearest_M)
    return [value[nearest_M] for value in outputs] if each_once else list(outputs)

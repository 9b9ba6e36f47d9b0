"""Programs of `torch.export`: whole graphs with their weights, for PyTorch without this library's code."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from ovd_models.export.files import Part, check_outputs, slow_attention


def write_program(part: Part, folder: Path) -> float:
    """Export a part as `NAME.pt2`, and compare it with PyTorch on its examples; returns the largest difference.

    Raises:
        InputError: as `write_part`.
    """
    path = folder / f"{part.name}.pt2"
    dynamic: tuple[Any, ...] = tuple(dict.fromkeys(part.dynamic.get(name, {}), Dim.AUTO) for name in part.inputs)
    if inspect.getfullargspec(part.model.forward).varargs is not None:  # all inputs are then one argument
        dynamic = (dynamic,)
    with torch.no_grad(), slow_attention():
        program = torch.export.export(part.model.eval(), part.examples[0], dynamic_shapes=dynamic, strict=False)
        torch.export.save(program, path)
    loaded = torch.export.load(path).module()

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            found = loaded(*inputs)
        return list(found) if isinstance(found, tuple) else [found]

    return check_outputs(part, path, run)

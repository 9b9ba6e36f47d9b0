"""8-bit versions of exported files: weights and activations as integers, scaled by what example images show."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor

from ovd_models.export.files import Part


class Examples(CalibrationDataReader):  # type: ignore[misc]
    """Inputs of a part, one at a time."""

    def __init__(self, part: Part, examples: Sequence[tuple[Tensor, ...]]) -> None:
        self.feeds: Iterator[dict[str, Any]] = (
            {name: value.numpy() for name, value in zip(part.inputs, example, strict=True)} for example in examples
        )

    def get_next(self) -> dict[str, Any] | None:
        """The next inputs by name; None after the last."""
        return next(self.feeds, None)


def quantise(part: Part, path: Path, target: Path, examples: Sequence[tuple[Tensor, ...]]) -> None:
    """Write an 8-bit version of an exported part.

    Convolutions and matrix products with constant weights get integers, per channel; everything else stays float32,
    such as the cosines with the names, whose digits decide between names.

    Args:
        part: that was exported.
        path: its file.
        target: the new file.
        examples: inputs whose activations decide the scales.
    """
    logging.getLogger().setLevel(logging.ERROR)  # it advises a further step that dynamic sizes do not allow
    quantize_static(
        str(path),
        str(target),
        Examples(part, examples),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )

"""Image files, and images inside tar shards, read for a stream."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from data_prep import storage
from ovd_models.images import decode_image


def read_image(uri: str, *, offset: int = 0, size: int | None = None) -> Image.Image:
    """Decode an image file, or the `size` bytes at `offset` of a shard, read as one range.

    Raises:
        InputError: the bytes are not a whole image.
    """
    content = storage.read_bytes(uri, offset=offset, size=size)
    return decode_image(content, uri if size is None else f"{uri}@{offset}")


def pixel_columns(pixels: Sequence[npt.NDArray[np.uint8]]) -> dict[str, Any]:
    """Columns `image` (raw bytes), `height` and `width` of arrays [H, W, 3]."""
    return {
        "image": pa.array([array.tobytes() for array in pixels], pa.binary()),
        "height": [array.shape[0] for array in pixels],
        "width": [array.shape[1] for array in pixels],
    }

"""Tiny models to serve, endpoints without Ray, pictures and requests."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from ovd_models.checkpoints import save_checkpoint
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, save_clip
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.ovsam.text_to_mask import TextToMask, TextToMaskModelConfig
from ovd_models.sam.model import SamConfig
from ovd_models.vild.model import ViLD
from ovd_models.vocabulary import EmbeddingTable
from workflows.serving.api import Endpoint
from workflows.serving.limits import Limits
from workflows.serving.opening import open_endpoint
from workflows.serving.settings import Settings

NAMES = ("anchor", "umbrella", "snowman")
LIMITS = Limits(
    max_queued=3,
    max_bytes=600_000,
    max_pixels=4_000_000,
    max_names=20,
    body_seconds=3.0,
    max_mask_pixels=8_000_000,
    max_vocabularies=3,
)
SMALL_SAM = SamConfig(image_size=64, patch_size=8, width=32, depth=1, heads=2, window=4, global_blocks=())


def table(width: int = 128) -> EmbeddingTable:
    """Random embeddings of `NAMES`."""
    rows = np.random.default_rng(0).normal(size=(len(NAMES), width))
    return EmbeddingTable.from_array(NAMES, rows.astype(np.float32), "table")


def save_detector(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_checkpoint(CoDet(CoDetConfig()), table(), folder, splits=dict.fromkeys(NAMES, "base"), run={})
    return folder


def save_segmenter(folder: Path) -> Path:
    torch.manual_seed(0)
    model = OvSam(OvSamConfig(sam=SMALL_SAM))
    save_checkpoint(model, table(), folder, splits=dict.fromkeys(NAMES, "base"), run={})
    return folder


def save_text_segmenter(folder: Path) -> Path:
    torch.manual_seed(0)
    model = TextToMask(TextToMaskModelConfig(sam=SMALL_SAM))
    save_checkpoint(model, table(), folder, splits=dict.fromkeys(NAMES, "base"), run={})
    return folder


def save_classifier(folder: Path) -> Path:
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), folder)
    return folder


def save_detector_of_any_name(folder: Path, detector: CoDet | ViLD | None = None) -> Path:
    """A detector, a CoDet unless given, with a text tower."""
    torch.manual_seed(0)
    clip = Clip(ClipConfig())
    encoder = ClipTextEncoder(clip.config, clip.model.text, "clip:tiny")
    detector = CoDet(CoDetConfig()) if detector is None else detector
    save_checkpoint(detector, encoder, folder, splits=dict.fromkeys(NAMES, "base"), run={})
    return folder


def endpoint(model: str | Path, storage: str | Path, **changes: Any) -> Endpoint:
    """An endpoint without Ray."""
    settings: dict[str, Any] = {
        "model": str(model), "storage": str(storage), "texts": True, "threads": 1, "device": "cpu", "max_batch": 8,
        "image_cache_mb": 64, "text_cache_mb": 8, "refresh_seconds": 0, "token_digest": "", "limits": LIMITS,
    }  # fmt: skip
    return open_endpoint(Settings(**settings | changes))


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def picture(width: int = 96, height: int = 64, seed: int = 1) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 12, 3), np.uint8)
    return encoded(Image.fromarray(pixels).resize((width, height)))


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any number of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def post(client: httpx.Client, route: str, content: bytes | None = None, **fields: Any) -> httpx.Response:
    files = {"image": ("picture.jpg", picture() if content is None else content, "image/jpeg")}
    return client.post(f"/v1/{route}", files=files, data=fields)


def problem(response: httpx.Response, status: int) -> str:
    """The detail of a well-formed problem."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["title"]
    assert "Traceback" not in response.text
    return str(body["detail"])

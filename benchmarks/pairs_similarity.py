"""Similarity of the images of both crawlers; runs in the environment with scikit-image, see pairs.py."""

import io
import json
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from skimage.metrics import structural_similarity

QUALITY = 95


def read_tars(folder: Path) -> dict[str, bytes]:
    """Image bytes by caption, which identifies the image."""
    images = {}
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, content in members.items():
            if name.endswith(".jpg"):
                images[members[name.removesuffix(".jpg") + ".txt"].decode()] = content
    return images


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    return float(structural_similarity(first, second, channel_axis=2, data_range=255))


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def from_full(path: Path, size: tuple[int, int]) -> np.ndarray:
    """An image as stored after decoding at full size; encoded as JPEG again, since both tools do so."""
    small = cv2.resize(cv2.imread(str(path)), size, interpolation=cv2.INTER_AREA)
    return pixels(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes())


def main() -> None:
    """Arguments: our tars, their tars, the original images, the number to compare. Prints JSON."""
    ours, theirs = read_tars(Path(sys.argv[1])), read_tars(Path(sys.argv[2]))
    pictures, count = Path(sys.argv[3]), int(sys.argv[4])
    scores: dict[str, list[float]] = {"theirs": [], "full_decode": []}
    sizes = [0, 0]
    for caption in sorted(ours.keys() & theirs.keys())[:count]:
        mine = pixels(ours[caption])
        full = from_full(pictures / f"{caption.split()[-1]}.jpg", (mine.shape[1], mine.shape[0]))
        scores["theirs"].append(ssim(mine, pixels(theirs[caption])))
        scores["full_decode"].append(ssim(mine, full))
        sizes = [sizes[0] + len(ours[caption]), sizes[1] + len(theirs[caption])]
    figures = {"size_ratio": sizes[0] / sizes[1], "ssim_images": len(scores["theirs"])}
    for name, values in scores.items():
        figures |= {f"ssim_{name}_mean": float(np.mean(values)), f"ssim_{name}_min": min(values)}
    print(json.dumps(figures))

"""Find things in a picture with exported files alone: python detect.py picture.jpg [NAME ...]."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main() -> None:
    """Print the boxes of a picture; without names, of the model's default vocabulary."""
    folder = Path(__file__).parent
    known, embeddings, weights = (np.load(folder / "names.npz")[key] for key in ("names", "embeddings", "image_weight"))
    names = sys.argv[2:] or known.tolist()
    rows = [known.tolist().index(name) for name in names]
    session = onnxruntime.InferenceSession(folder / "detector.onnx", providers=["CPUExecutionProvider"])
    image = np.asarray(ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB"))
    inputs = {"image": image, "text": embeddings[rows], "threshold": np.array(0.3, np.float32)}
    if len(session.get_inputs()) == 4:  # ViLD's ensemble
        inputs["image_weight"] = weights[rows]
    boxes, scores, labels, *_ = session.run(None, inputs)  # some models add masks [M, 28, 28] inside the boxes
    for box, score, label in zip(boxes, scores, labels, strict=True):
        print(f"{names[label]:20} {score:.2f}  {box.round().astype(int).tolist()}")


if __name__ == "__main__":
    main()

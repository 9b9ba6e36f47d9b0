"""Find things in a picture with exported files alone: python detect.py picture.jpg [NAME ...]."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def main() -> None:
    """Print the boxes of a picture; without names, of the model's default vocabulary."""
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} PICTURE [NAME ...]")
    folder = Path(__file__).parent
    stored = np.load(folder / "names.npz")
    known = stored["names"].tolist()
    names = sys.argv[2:] or known
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"{unknown[0]!r}: not embedded in names.npz, expected some of {', '.join(known)}")
    rows = [known.index(name) for name in names]
    session = onnxruntime.InferenceSession(folder / "detector.onnx", providers=["CPUExecutionProvider"])
    image = ImageOps.exif_transpose(Image.open(sys.argv[1]))
    if image.has_transparency_data:  # over white, unless all of it is transparent
        layer = image.convert("RGBA")
        alpha, image = layer.getchannel("A"), layer.convert("RGB")
        if alpha.getextrema() != (0, 0):
            image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    inputs = {
        "image": np.asarray(image.convert("RGB")),
        "text": stored["embeddings"][rows],
        "threshold": stored["threshold"],  # where the model was best
    }
    if len(session.get_inputs()) == 4:  # ViLD's ensemble
        inputs["image_weight"] = stored["image_weight"][rows]
    boxes, scores, labels, *_ = session.run(None, inputs)  # some models add masks [M, 28, 28] inside the boxes
    for box, score, label in zip(boxes, scores, labels, strict=True):
        print(f"{names[label]:20} {score:.2f}  {box.round().astype(int).tolist()}")


if __name__ == "__main__":
    main()

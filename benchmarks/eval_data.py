"""Synthetic predictions and annotation files in LVIS's and COCO's format, for the benchmark and the tests."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import mask as rle


def predictions_for(
    truth: dict[str, Any], per_image: int, *, seed: int = 0, masks: bool = False
) -> Iterator[dict[str, Any]]:
    """`per_image` results for each image: half of them near annotated objects, some with wrong names; scores repeat."""
    rng = np.random.default_rng(seed)
    all_ids = [category["id"] for category in truth["categories"]]
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for entry in truth["annotations"]:
        objects[entry["image_id"]].append(entry)
    for image in truth["images"]:
        own, width, height = objects[image["id"]], image["width"], image["height"]
        verified = sorted({entry["category_id"] for entry in own} | set(image.get("neg_category_ids", ())))
        shift = rng.normal(0, 0.12, (per_image, 4))
        chance = rng.random((per_image, 6))
        scores = np.round(rng.random(per_image), 3)
        for row in range(per_image):
            if own and chance[row, 0] < 0.5:
                target = own[int(chance[row, 1] * len(own))]
                x, y, w, h = target["bbox"]
                moved = shift[row]
                box = [x + moved[0] * w, y + moved[1] * h, w * (1 + abs(moved[2])), h * (1 + abs(moved[3]))]
                category = target["category_id"]
            else:
                x, y = chance[row, 2] * width / 2, chance[row, 3] * height / 2
                box, category = [x, y, 1 + chance[row, 4] * width / 2, 1 + chance[row, 5] * height / 2], None
            if category is None or chance[row, 4] < 0.2:
                pool: Sequence[int] = verified if verified and chance[row, 5] < 0.5 else all_ids
                category = pool[int(chance[row, 3] * len(pool))]
            box = [round(float(value), 2) for value in box]
            result = {"image_id": image["id"], "category_id": category, "bbox": box, "score": float(scores[row])}
            if masks:
                result["segmentation"] = mask_of(box, width, height, round_=chance[row, 2] < 0.5)
            yield result


def mask_of(box: Sequence[float], width: int, height: int, *, round_: bool) -> dict[str, Any]:
    """The RLE of a box or of an ellipse in it."""
    x, y, w, h = box
    if round_:
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        polygon = np.stack([x + w / 2 * (1 + np.cos(angle)), y + h / 2 * (1 + np.sin(angle))], axis=1).ravel()
    else:
        polygon = np.array([x, y, x + w, y, x + w, y + h, x, y + h])
    (encoded,) = rle.frPyObjects([polygon.tolist()], height, width)
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def lvis_like(images: int, objects: int, categories: int, seed: int = 0) -> dict[str, Any]:
    """Ground truth with LVIS's fields: a long tail of categories, about 12 objects and 8 absent names an image."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, categories + 1)
    weights /= weights.sum()
    annotations = []
    entries = []
    for number in range(1, images + 1):
        width, height = (640, 480) if number % 2 else (480, 640)
        labels = rng.choice(categories, rng.poisson(objects), p=weights) + 1
        for label in labels.tolist():
            w, h = np.exp(rng.uniform(np.log(8), np.log(240), 2))
            x, y = rng.random(2) * [width - w, height - h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [round(float(value), 2) for value in (x, y, w, h)],
                    "area": round(float(w * h * 0.7), 2),
                    "segmentation": [[float(x), float(y), float(x + w), float(y), float(x), float(y + h)]],
                }
            )
        absent = sorted(set((rng.integers(categories, size=8) + 1).tolist()) - set(labels.tolist()))
        partial = sorted(set(labels.tolist()))[:1]
        entries.append(
            {
                "id": number,
                "width": width,
                "height": height,
                "file_name": f"{number:012d}.jpg",
                "neg_category_ids": absent,
                "not_exhaustive_category_ids": partial if number % 3 == 0 else [],
            }
        )
    names = [
        {"id": key, "name": f"name_{key}", "frequency": "fcr"[3 * (key - 1) // categories], "synonyms": []}
        for key in range(1, categories + 1)
    ]
    return {"images": entries, "annotations": annotations, "categories": names}


def write_results(rows: Iterator[dict[str, Any]], path: Path) -> None:
    """Write results as a JSON list, a row at a time."""
    with path.open("w") as file:
        separator = "["
        for row in rows:
            file.write(separator + json.dumps(row))
            separator = ",\n"
        file.write("]" if separator != "[" else "[]")

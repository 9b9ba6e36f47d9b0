"""Reading of an annotation file of LVIS's size, and hashing of the pictures that it names.

python benchmarks/box_files.py

The file is synthetic: 100,170 images, 1.27 million polygons, 1,203 categories, as in LVIS v1's training set. Its
pictures are not read; hashing is timed on pictures of 200 kB. `make bench-train` writes the figures with its own.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import measure, update_figures
from PIL import Image

from data_prep.boxes.coco import ROWS, read_annotations
from data_prep.boxes.pictures import add_pictures

IMAGES, ANNOTATIONS, CATEGORIES = 100_170, 1_270_141, 1203
SHAPES = 2000
"""Different polygons."""
PICTURES = 400


def main() -> None:
    if len(sys.argv) == 2:  # the process that is measured
        started = time.perf_counter()
        _, rows = read_annotations(sys.argv[1])
        print(json.dumps({"seconds": time.perf_counter() - started, "rows": rows.num_rows}))
        return
    figures = {**lvis_json(), **hashing()}
    update_figures("train", figures)
    print(figures)


def lvis_json() -> dict[str, float]:
    """Seconds to read the file into rows, and the peak memory of the process."""
    with tempfile.TemporaryDirectory(prefix="ovd-") as folder:
        file, log = Path(folder, "lvis.json"), Path(folder, "log")
        write_file(file)
        print(f"{file.stat().st_size / 1e9:.2f} GB of json, {IMAGES:,} images, {ANNOTATIONS:,} annotations")
        cost = measure([sys.executable, __file__, str(file)], log=log)
        if cost.exit_code:
            sys.exit(log.read_text())
        result = json.loads(log.read_text().splitlines()[-1])
        assert result["rows"] == IMAGES
        return {"lvis_json_seconds": result["seconds"], "lvis_json_gb": cost.peak_gb}


def write_file(path: Path) -> None:
    """A file in LVIS's format."""
    rng = np.random.default_rng(0)
    shapes = []
    for points in rng.integers(8, 60, SHAPES).tolist():
        angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
        radius = rng.uniform(5, 60) * rng.uniform(0.6, 1, points)
        corners = np.stack([320 + radius * np.cos(angle), 240 + radius * np.sin(angle)], axis=1).round(2)
        low, high = corners.min(0), corners.max(0)
        box = [round(value, 2) for value in (*low.tolist(), *(high - low).tolist())]
        shapes.append(f'"bbox": {box}, "area": 100.0, "segmentation": [{corners.ravel().tolist()}]')
    image_A, category_A = rng.integers(0, IMAGES, ANNOTATIONS), rng.integers(1, CATEGORIES + 1, ANNOTATIONS)
    shape_A = rng.integers(0, SHAPES, ANNOTATIONS)
    images = [
        {
            "id": number,
            "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
            "width": 640,
            "height": 480,
            "neg_category_ids": [1 + (number + step) % CATEGORIES for step in range(6)],
            "not_exhaustive_category_ids": [1 + number % CATEGORIES],
        }
        for number in range(IMAGES)
    ]
    categories = [
        {"id": key, "name": f"name_{key}", "frequency": "rcf"[key % 3], "synonyms": [f"name_{key}"]}
        for key in range(1, CATEGORIES + 1)
    ]
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
        columns = zip(image_A.tolist(), category_A.tolist(), shape_A.tolist(), strict=True)
        for number, (image, category, shape) in enumerate(columns):
            ids = f'"id": {number}, "image_id": {image}, "category_id": {category}'
            file.write(f"{',' if number else ''}{{{ids}, {shapes[shape]}}}")
        file.write("]}")


def hashing() -> dict[str, float]:
    """Megabytes of picture files a second that are found, measured and hashed."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    with tempfile.TemporaryDirectory(prefix="ovd-") as folder:
        for number in range(PICTURES):
            Image.fromarray(np.roll(noise, number, axis=1)).save(Path(folder, f"{number}.jpg"), quality=60)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        row = {**{name: [] for name in ROWS.names}, "source_id": 0, "width": 640, "height": 480}
        rows = [{**row, "places": [f"{number}.jpg"]} for number in range(PICTURES)]
        started = time.perf_counter()
        add_pictures(pa.Table.from_pylist(rows, ROWS), folder, "benchmark")
        return {"hash_mb_per_second": size / 1e6 / (time.perf_counter() - started)}


if __name__ == "__main__":
    main()

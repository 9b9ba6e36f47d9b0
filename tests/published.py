"""The published configs with sizes alone made small, and small sets in LVIS's and COCO's form to run them on.

The learning rate follows the batch.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from trainings import STAGES

from data_prep import tables
from data_prep.boxes.coco import COCO_BASE, COCO_NOVEL, COCO_OTHERS
from ovd_models.checkpoints import save_checkpoint
from ovd_models.clip.model import Clip, ClipConfig, save_clip
from ovd_models.detectors.centernet2 import CenterNet2Config
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.sam.model import SamConfig, SamModel
from workflows import prepare_boxes, prepare_pairs
from workflows.common.optimisation import Optimisation
from workflows.configs import boxes as boxes_configs
from workflows.configs import clip as clip_configs
from workflows.configs import codet as codet_configs
from workflows.configs import ovsam as ovsam_configs
from workflows.configs import pairs as pairs_configs
from workflows.configs import vild as vild_configs

SIDE = 96
BATCH = 4
IMAGES = 40
WORDS = ("alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel")
CONCEPTS = tuple(f"{first} {second}" for first in WORDS for second in WORDS)
"""More than the 50 that the region-word loss of LVIS samples; each is in a quarter of the captions."""
NAMED = {
    "clip": {"pictograms": clip_configs.pictograms},
    **{
        method: {
            name: make for name, make in configs.items() if not name.startswith(("smoke", "pictograms", "finetune"))
        }
        for method, configs in (
            ("vild", vild_configs.CONFIGS),
            ("codet", codet_configs.CONFIGS),
            ("ovsam", ovsam_configs.CONFIGS),
        )
    },
}
"""Every published config of every method."""


# ---------------------------------------------------------------------------------------------------------- the data


def prepare_world(root: Path) -> None:
    """Box sets `lvis`, `coco` and `photos`, their captioned pairs, a CLIP and a SAM, both untrained."""
    storage = str(root / "store")
    for name, categories in (("lvis", lvis_categories()), ("coco", coco_categories()), ("photos", coco_categories())):
        for part, seed in (("train", 0), ("val", 1)):
            write_set(root / name / part, categories, seed)
        coco = boxes_configs.coco()
        prepare_boxes.prepare(
            dataclasses.replace(
                coco, storage=storage, name=name, data=str(root / name / "train"), eval_data=str(root / name / "val")
            )
        )
        pairs = "cc3m" if name == "lvis" else name
        rows = tables.read_table(storage, "boxes", f"{name}-train", ["uri"])["uri"]
        captions = [f"picture {n} with {', '.join(CONCEPTS[n % 4 :: 4])}" for n in range(len(rows))]
        crawl = pairs_configs.Run(storage=storage, name=pairs, names=CONCEPTS, crawlers=0)
        prepare_pairs.prepare_local(crawl, pa.table({"url": rows, "caption": captions}))
        broken = root / name / "train/images/3.jpg"  # a file that is lost after the tables were made
        broken.write_bytes(broken.read_bytes()[:200])
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), root / "clip")
    save_checkpoint(SamModel(small_sam()), None, root / "sam", splits={}, run={})
    prepare_pairs.prepare_smoke(storage)


def lvis_categories() -> list[dict[str, Any]]:
    """1,203 names, a quarter of them rare."""
    return [
        {"id": key, "name": f"thing_{key}", "frequency": "rcfc"[key % 4], "synonyms": [f"thing_{key}", f"object_{key}"]}
        for key in range(1, 1204)
    ]


def coco_categories() -> list[dict[str, Any]]:
    """COCO's 80 names."""
    return [{"id": key, "name": name} for key, name in enumerate((*COCO_BASE, *COCO_NOVEL, *COCO_OTHERS), 1)]


def write_set(folder: Path, categories: list[dict[str, Any]], seed: int) -> None:
    """Pictures with rectangles, masks, images without boxes, and LVIS's lists of names known to be absent."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    used = [category["id"] for category in categories[:70]]
    images, annotations = [], []
    for number in range(IMAGES):
        width, height = (SIDE, SIDE - 16) if number % 2 else (SIDE - 8, SIDE)
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        picture = {"id": 100 + number, "file_name": f"{number}.jpg", "width": width, "height": height}
        images.append(picture)
        shown = []
        for _ in range(0 if number % 10 == 9 else int(rng.integers(1, 5))):
            x, y = rng.integers(0, width - 40), rng.integers(0, height - 40)
            w, h = rng.integers(16, 40, 2)
            pixels[y : y + h, x : x + w] = rng.integers(0, 256, 3)
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            shown.append(int(rng.choice(used)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": picture["id"],
                    "category_id": shown[-1],
                    "bbox": [int(value) for value in (x, y, w, h)],
                    "segmentation": [[int(value) for value in corners]],
                    "area": int(w * h),
                }
            )
        absent = [category for category in used if category not in shown]
        picture |= {"neg_category_ids": rng.choice(absent, 3).tolist(), "not_exhaustive_category_ids": shown[:1]}
        Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg", quality=90)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


# --------------------------------------------------------------------------------------------------- smaller configs


def small_sam() -> SamConfig:
    """A SAM of two blocks for 64 px images."""
    return SamConfig(image_size=64, patch_size=8, width=32, depth=2, heads=2, window=4, global_blocks=(1,))


def small_stage(stage: Optimisation, batch: int) -> Optimisation:
    """Twenty steps on two workers without GPUs, with a learning rate in proportion to the batch."""
    return dataclasses.replace(
        stage,
        steps=20,
        learning_rate=stage.learning_rate * min(1, BATCH / batch),
        checkpoint_every=10,
        log_every=1,
        workers=2,
        use_gpu=False,
        max_failures=0,
    )


def small_run(method: str, name: str, root: Path) -> Any:
    """A published config whose sizes alone are small."""
    run: Any = NAMED[method][name]()
    batch = run.detection_batch if method in ("vild", "codet") else run.batch_size
    changes: dict[str, Any] = {stage: small_stage(getattr(run, stage), batch) for stage in STAGES[method]}
    changes["storage"] = str(root / "store")
    if method == "clip":
        return dataclasses.replace(run, pairs="smoke", batch_size=BATCH, eval_images=34, **changes)
    changes["teacher"] = str(root / "clip")
    if run.augmentation.side:  # the canvas of jittered images
        changes["augmentation"] = dataclasses.replace(run.augmentation, side=SIDE)
    if method == "vild":
        return small_vild(run, changes)
    return small_codet(run, changes) if method == "codet" else small_ovsam(run, root, changes)


def small_rcnn(config: RCNNConfig, **sizes: Any) -> RCNNConfig:
    """Bottlenecks of a few channels, small images, few anchors, proposals and regions."""
    options = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "stem_width": 16}
    small = {
        "backbone_options": options,
        "pyramid_channels": 32,
        "head_width": 64,
        "min_size": SIDE,
        "max_size": SIDE,
        "rpn_batch_size": 32,
        "pre_nms": 64,
        "post_nms": 32,
        "rois_per_image": 32,
    }
    return dataclasses.replace(config, **{**small, **sizes})


def small_vild(run: vild_configs.Run, changes: dict[str, Any]) -> vild_configs.Run:
    """ViLD's configs."""
    return dataclasses.replace(
        run,
        **changes,
        from_scratch=True,
        model=dataclasses.replace(run.model, detector=small_rcnn(run.model.detector)),
        max_proposals=8,
        regions_per_step=8,
        detection_batch=BATCH,
        embed=dataclasses.replace(run.embed, actors=0, gpus=0, batch_size=32),
    )


def small_codet(run: codet_configs.Run, changes: dict[str, Any]) -> codet_configs.Run:
    """CoDet's configs; groups keep their size."""
    model = run.model
    caption_sizes = (SIDE // 2, SIDE // 2) if model.caption_sizes else ()
    model = dataclasses.replace(
        model,
        num_proposals=8,
        caption_sizes=caption_sizes,
        detector=small_rcnn(model.detector, **({"head_width": 256} if model.architecture == "c4" else {})),
        centernet2=small_centernet2(model.centernet2),
    )
    captions = run.caption_augmentation
    captions = dataclasses.replace(captions, side=SIDE // 2 if captions.side else 0)
    return dataclasses.replace(
        run,
        **changes,
        from_scratch=True,
        model=model,
        detection_batch=BATCH,
        groups_per_step=2,
        caption_augmentation=captions,
    )


def small_centernet2(config: CenterNet2Config) -> CenterNet2Config:
    """A few channels, blocks and proposals; three stages, windows and masks stay."""
    options: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "stem_width": 16}
    if config.backbone == "swin":
        sizes = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
        options = {**config.backbone_options, **sizes}
    elif config.backbone == "eva02":
        options = {}
    return dataclasses.replace(
        config,
        backbone_options=options,
        eva=dataclasses.replace(config.eva, width=32, depth=3, heads=2, hidden=64),
        pyramid_channels=64,  # two a group of the heat head's norm: an image's coarsest level has one cell
        proposals=dataclasses.replace(config.proposals, pre_nms=(64, 64), post_nms=(32, 32)),
        head_width=64,
        min_size=SIDE,
        max_size=SIDE,
        rois_per_image=32,
    )


def small_ovsam(run: ovsam_configs.Run, root: Path, changes: dict[str, Any]) -> ovsam_configs.Run:
    """OV-SAM's configs; those that need a SAM get one."""
    return dataclasses.replace(
        run,
        **changes,
        sam=str(root / "sam") if run.needs_sam else "",
        sam_model=small_sam(),
        adapter_depth=2,
        pyramid_width=16,
        label_hidden=32,
        clip2sam=dataclasses.replace(run.clip2sam, prompts_per_image=4, num_points=64),
        batch_size=BATCH,
        rows_per_shard=16,
        eval_images=6,
    )

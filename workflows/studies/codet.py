"""CoDet's claims over several seeds: all variants of a seed start from the same box stage.

each seed: boxes -> joint stage of each variant -> AP50, and attention on an object planted in each image of a group
           `both-*`: the same on captions in which every concept comes with a second one
sweeps:    AP50 over group sizes and numbers of proposals
-> claims with 95 % intervals -> <storage>/reports/codet_study.json, .md, .png

python -m workflows.studies.codet --config pictograms --teacher store/runs/clip/NAME/model
python -m workflows.studies.codet --config sweeps --teacher store/runs/clip/NAME/model
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage teacher name variants group_sizes proposal_counts")

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import matplotlib.figure
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchvision.ops import box_iou

from data_prep import storage, tables
from data_prep.pictograms.world import COLOURS, SCENES, Scene, World, draw_scene, encode_jpeg
from ovd_models.batches import ConceptBatch
from ovd_models.checkpoints import load_encoder, load_model
from ovd_models.codet.model import CoDet, CoDetConfig
from workflows import codet, prepare_pairs
from workflows.common import cli, cluster, training
from workflows.common.teacher import read_codet_names
from workflows.configs import codet as codet_configs
from workflows.configs import pairs as pairs_configs
from workflows.studies import study as studies
from workflows.studies.study import Claim, Metrics, Results, Study, StudyRun

Variant = Literal[
    "region-region",
    "region-text",
    "max-size",
    "no-guidance",
    "guided-dimensions",
    "both-guided",
    "both-unguided",
    "box-supervision",
    "captions",
    "top-3",
    "attention",
    "learned",
]
BOX_STAGE = "box-stage"
"""Result of the box stage, before any joint stage."""


@dataclass(frozen=True, kw_only=True)
class Run(StudyRun):
    """One study."""

    name: str = "codet_study"
    """File name of the report."""
    training: codet_configs.Run = field(default_factory=codet_configs.pictograms)
    """Settings of all trainings; the study sets seed, teacher and storage."""
    variants: tuple[Variant, ...] = (
        "region-region",
        "region-text",
        "max-size",
        "no-guidance",
        "both-guided",
        "both-unguided",
        "box-supervision",
        "captions",
    )
    """The first one also trains the box stage, from which the others start."""
    group_sizes: tuple[int, ...] = ()
    """Group sizes to sweep over, at `images_per_step` captioned images."""
    proposal_counts: tuple[int, ...] = ()
    """Numbers of proposals to sweep over."""
    images_per_step: int = 16
    both_scenes: int = 4000
    """Scenes in which each concept comes with a second one, for the variants `both-*`."""
    planted_groups: int = 204
    """Groups with a planted object, on which attention is measured."""


def pictograms() -> Run:
    """Three seeds; requires `--teacher`."""
    return Run()


def sweeps() -> Run:
    """Group sizes and numbers of proposals with one seed and half the steps; requires `--teacher`."""
    training = codet_configs.pictograms()
    half = replace(training.joint_stage, steps=training.joint_stage.steps // 2)
    return Run(
        name="codet_sweeps",
        training=replace(training, joint_stage=half),
        seeds=(0,),
        variants=(),
        group_sizes=(2, 4, 8),
        proposal_counts=(4, 16, 64),
    )


def smoke() -> Run:
    """One seed, five steps; requires `--teacher`."""
    return Run(
        training=codet_configs.smoke(),
        seeds=(0,),
        variants=("region-region", "max-size", "both-guided"),
        both_scenes=40,
        planted_groups=4,
    )


CONFIGS: dict[str, Callable[[], Run]] = {"pictograms": pictograms, "sweeps": sweeps, "smoke": smoke}

VARIANTS: dict[Variant, Callable[[codet_configs.Run], CoDetConfig]] = {
    "region-region": lambda run: run.model,
    "region-text": lambda run: replace(run.model, supervision="region_text"),
    "max-size": lambda run: replace(run.model, supervision="max_size"),
    "no-guidance": lambda run: replace(run.model, guidance="none"),
    "guided-dimensions": lambda run: replace(run.model, guidance="dimensions"),
    "both-guided": lambda run: run.model,
    "both-unguided": lambda run: replace(run.model, guidance="none"),
    "box-supervision": lambda run: replace(run.model, supervision="boxes"),
    "captions": lambda run: replace(run.model, supervision="captions"),
    "top-3": lambda run: replace(run.model, aggregation="top_k"),
    "attention": lambda run: replace(run.model, aggregation="attention"),
    "learned": lambda run: replace(run.model, aggregation="learned", guidance="dimensions", group_size=run.group_size),
}
"""A variant's model for a training; variants named `both-*` also learn from other captions."""

OV_COCO = "OV-COCO; CoDet's README and Detic's model zoo"
NOVEL, OURS = "ap50_novel", "region-region"
CLAIMS = (
    Claim("novel AP50: region-region above region-text", NOVEL, OURS, ("region-text",)),
    Claim("novel AP50: region-region above max-size", NOVEL, OURS, ("max-size",), paper=0.065, source=OV_COCO),
    Claim("novel AP50: guidance above none", NOVEL, OURS, ("no-guidance",)),
    Claim("novel AP50: guidance above none, captions share two concepts", NOVEL, "both-guided", ("both-unguided",)),
    Claim("novel AP50: above as many steps of boxes", NOVEL, OURS, ("box-supervision",), paper=0.293, source=OV_COCO),
    Claim("base AP50: above as many steps of boxes", "ap50_base", OURS, ("box-supervision",)),
    Claim("novel AP50: region-region above captions", NOVEL, OURS, ("captions",), paper=0.096, source=OV_COCO),
)


def codet_study(run: Run) -> Study:
    """The study of a run.

    Raises:
        InputError: the teacher is missing.
    """
    studies.require_teacher(run.teacher)
    return Study(
        name=run.name,
        storage=run.storage,
        seeds=run.seeds,
        measurements=[partial(measure_variant, run, name) for name in seed_trainings(run, 0)],
        claims=CLAIMS,
        tables=result_tables,
        figure=draw_curves if run.group_sizes or run.proposal_counts else None,
    )


def seed_trainings(run: Run, seed: int) -> dict[str, codet_configs.Run]:
    """All trainings of a seed: the variants, then those of the sweeps."""
    base = studies.seeded(run.training, run.storage, run.teacher, seed)
    trainings: dict[str, codet_configs.Run] = {}
    for variant in run.variants:
        pairs = f"{base.pairs}-both" if variant.startswith("both-") else base.pairs
        trainings[variant] = replace(base, pairs=pairs, model=VARIANTS[variant](base))
    for size in run.group_sizes:
        groups = max(1, run.images_per_step // size)
        trainings[f"group-size-{size}"] = replace(base, group_size=size, groups_per_step=groups)
    for count in run.proposal_counts:
        trainings[f"proposals-{count}"] = replace(base, model=replace(base.model, num_proposals=count))
    return trainings


def measure_variant(run: Run, name: str, seed: int) -> dict[str, Metrics]:
    """Metrics of one training; the first one of a seed also gives those of the box stage."""
    result = trained_variant(run, name, seed)
    first = next(iter(seed_trainings(run, seed)))
    return {BOX_STAGE: result["box_stage"], name: result["metrics"]} if name == first else {name: result["metrics"]}


def trained_variant(run: Run, name: str, seed: int) -> dict[str, Any]:
    """Checkpoints, times and metrics of one training, from the box stage of the seed's first one."""
    trainings = seed_trainings(run, seed)
    first = next(iter(trainings))
    result = train_variant(run, seed, first, trainings[first], box_model="")
    return result if name == first else train_variant(run, seed, name, trainings[name], box_model=result["box_model"])


def train_variant(run: Run, seed: int, name: str, own: codet_configs.Run, box_model: str) -> dict[str, Any]:
    """Train one variant and measure it, from the box stage of `box_model` unless that is empty."""

    def job(own: codet_configs.Run) -> dict[str, Any]:
        if own.pairs.endswith("-both"):
            prepare_both(run, own.pairs)
        trained = codet.train(replace(own, box_model=box_model))
        box_stage = trained.outputs["boxes_model"]
        return {
            "model": trained.model,
            "box_model": box_stage,
            "seconds": trained.seconds,
            "box_stage": trained.metrics.box_supervised.summary() | measure_planted(run, own, box_stage),
            "metrics": trained.metrics.codet.summary() | measure_planted(run, own, trained.model),
        }

    return studies.remember("codet", seed, name, own, job)


# ---------------------------------------------------------------------------------- captions that share two concepts


def prepare_both(run: Run, name: str) -> None:
    """Publish pairs and groups in which each name always comes with the same second one."""
    if tables.find_manifest(run.storage, "groups", name) is not None:
        return
    world, rows = World.create(0), []
    partners = np.random.default_rng([0, 21]).permutation(len(world.names)).reshape(-1, 2)
    for number in range(run.both_scenes):
        rng = np.random.default_rng([0, 22, number])
        chosen = rng.choice(len(partners), size=int(rng.integers(1, 3)), replace=False)
        scene = draw_all(rng, world, partners[chosen].reshape(-1))
        uri = storage.join(run.storage, "images", name, f"{number:06d}.jpg")
        storage.write_bytes(uri, encode_jpeg(scene.pixels))
        rows.append({"url": uri, "caption": world.caption(rng, scene)})
    cluster.start_ray()
    crawl = replace(pairs_configs.pictograms(), storage=run.storage, name=name, site_pictures=0, site_scenes=0)
    prepare_pairs.prepare_local(crawl, pa.Table.from_pylist(rows))


def draw_all(rng: np.random.Generator, world: World, labels: np.ndarray) -> Scene:
    """A scene in which all labels are visible."""
    while True:
        colours = [str(name) for name in rng.choice(list(COLOURS), size=len(labels))]
        scene = draw_scene(rng, SCENES, labels, [world.names[label] for label in labels], colours)
        if len(scene.labels) == len(labels):
            return scene


# --------------------------------------------------------------------------------------------------- planted objects


def measure_planted(run: Run, own: codet_configs.Run, folder: str) -> Metrics:
    """How often attention is highest on the object that a group of held-out scenes shares (IoU at least 0.5).

    `planted_images` is the share of images; `planted_groups` and `planted_whole_groups` are the shares of groups in
    which this holds for most and for all images.
    """
    local = storage.local_folder(folder)
    device = torch.device(training.device_of(own.joint_stage))
    model, encoder = load_model(local, CoDet).to(device), load_encoder(local / "text")
    if model.config.supervision in ("captions", "boxes"):
        return {}
    names = read_codet_names(run.storage, own.boxes, own.pairs, encoder)
    groups = planted_groups(names.concepts, run.planted_groups, own.group_size)
    hits_Pg = torch.stack(
        [attention_hits(model, names.concept_embeddings.to(device), *group) for group in groups]
    ).float()
    return {
        "planted_images": float(hits_Pg.mean()),
        "planted_groups": float((hits_Pg.mean(1) > 0.5).float().mean()),
        "planted_whole_groups": float((hits_Pg.mean(1) == 1).float().mean()),
    }


def planted_groups(concepts: Sequence[str], count: int, size: int) -> Iterator[tuple[ConceptBatch, list[Tensor]]]:
    """Groups of scenes that share one object, with its box [1, 4] in each scene; concepts take turns."""
    world = World.create(0)
    drawable = [name for name in concepts if name in world.names]
    for number in range(count):
        rng = np.random.default_rng([0, 23, number])
        name = drawable[number % len(drawable)]
        shared = world.names.index(name)
        images: list[Tensor] = []
        boxes: list[Tensor] = []
        for _ in range(size):
            others = rng.choice(len(world.names), size=int(rng.choice(SCENES.object_counts)) - 1, replace=False)
            labels = rng.permutation([shared, *(label for label in others.tolist() if label != shared)])
            scene = draw_all(rng, world, labels)
            images.append(torch.from_numpy(scene.pixels).permute(2, 0, 1))
            boxes.append(torch.from_numpy(scene.boxes[scene.labels == shared]))
        mentioned = torch.zeros(size, len(concepts), dtype=torch.bool)
        yield ConceptBatch(tuple(images), torch.tensor([concepts.index(name)]), mentioned, ("",) * size), boxes


def attention_hits(model: CoDet, concepts_CD: Tensor, batch: ConceptBatch, boxes: list[Tensor]) -> Tensor:
    """[g] bool: whether the proposal with the most attention overlaps the shared object."""
    (group,) = model.explain(batch.to(concepts_CD.device), concepts_CD)
    hits = [
        bool(len(attention)) and float(box_iou(proposals[attention.argmax()][None].cpu(), box)) >= 0.5
        for proposals, attention, box in zip(group.boxes, group.attention, boxes, strict=True)
    ]
    return torch.tensor(hits)


# ------------------------------------------------------------------------------------------------------------ report


def result_tables(results: Results) -> list[str]:
    """Markdown: AP50 of all variants, and where their attention lies."""
    planted = {
        "images": "planted_images",
        "most of a group": "planted_groups",
        "all of a group": "planted_whole_groups",
    }
    return [
        *studies.metric_table(results, "", studies.AP50_COLUMNS, each="ap50_novel"),
        *studies.metric_table(results, "attention on the planted object", planted),
    ]


def draw_curves(results: Results) -> bytes:
    """A PNG: novel and base AP50 over group sizes and numbers of proposals."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.5))
    axes = figure.subplots(1, 2, sharey=True)
    sweeps = {"group-size-": "images per group", "proposals-": "proposals per image"}
    for axis, (prefix, label) in zip(axes, sweeps.items(), strict=True):
        points = {int(name.removeprefix(prefix)): of for name, of in results.items() if name.startswith(prefix)}
        for split in ("base", "novel"):
            means = [result.mean(f"ap50_{split}") for result in points.values()]
            axis.plot(list(points), means, marker="o", label=split)
        axis.set(xlabel=label, ylabel="AP50", xscale="log", xticks=list(points), xticklabels=list(points))
        axis.minorticks_off()
        axis.legend()
    png = io.BytesIO()
    figure.savefig(png, dpi=110, bbox_inches="tight")
    return png.getvalue()


def main() -> None:
    """Run the study."""
    studies.run_study(codet_study(cli.parse(CONFIGS, __doc__)))


if __name__ == "__main__":
    cli.execute(main)

"""The study of CoDet's claims: its variants over several seeds, all from the seed's one box stage, with intervals.

each seed: boxes -> joint stage of each variant -> AP50; where its attention lies in groups with a planted object
           the same on captions that share two concepts ("both"), with text guidance and without
curves:    novel AP50 over group sizes and numbers of proposals
-> paired differences between variants, with 95 % intervals -> <storage>/reports/codet_study.json, .md, .png

A killed study continues: each result is a file, and a training goes on from its last checkpoint.

python -m workflows.studies.codet --config pictograms --teacher store/runs/clip/<run>/model
python -m workflows.studies.codet --config sweeps --teacher store/runs/clip/<run>/model
"""

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from data_prep import storage, tables
from data_prep.pictograms.world import COLOURS, SCENES, Scene, World, draw_scene
from ovd_models.batches import ConceptBatch
from ovd_models.checkpoints import load_codet, load_encoder
from ovd_models.codet.model import CoDet
from ovd_models.errors import InputError
from workflows import codet, prepare_pairs
from workflows.common import cli, cluster, runs
from workflows.common.teacher import read_codet_names
from workflows.configs import codet as codet_configs
from workflows.configs import pairs as pairs_configs
from workflows.studies import study as studies
from workflows.studies.study import Numbers


@dataclass(frozen=True, kw_only=True)
class Run:
    """One study."""

    storage: str = "store"
    """Folder or URI that holds tables and runs."""
    name: str = "codet_study"
    """Of the report."""
    teacher: str = ""
    """Folder or URI of the CLIP checkpoint."""
    training: codet_configs.Run = field(default_factory=codet_configs.pictograms)
    """What is trained; seeds and variants are the study's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = (
        "region-region",
        "region-text",
        "max-size",
        "no guidance",
        "both, guidance",
        "both, no guidance",
        "box supervision, joint steps",
        "captions",
    )
    """The first training of all trains the box stage, from which the others start."""
    group_sizes: tuple[int, ...] = ()
    """To sweep over, at `images_per_step` captioned images."""
    proposal_counts: tuple[int, ...] = ()
    """To sweep over."""
    images_per_step: int = 16
    both_scenes: int = 4000
    """Scenes of the setting in which every picture of a group holds both of two concepts."""
    planted_groups: int = 204
    """Groups with a planted object that attention is measured in."""


def pictograms() -> Run:
    """Three seeds; give it `--teacher`."""
    return Run()


def sweeps() -> Run:
    """Group sizes and numbers of proposals, one seed, half as many steps; give it `--teacher`."""
    training = codet_configs.pictograms()
    half = dataclasses.replace(training.joint_stage, steps=training.joint_stage.steps // 2)
    return Run(
        name="codet_sweeps",
        training=dataclasses.replace(training, joint_stage=half),
        seeds=(0,),
        variants=(),
        group_sizes=(2, 4, 8),
        proposal_counts=(4, 16, 64),
    )


def smoke() -> Run:
    """One seed, five steps; give it `--teacher`."""
    return Run(
        training=codet_configs.smoke(),
        seeds=(0,),
        variants=("region-region", "max-size", "both, guidance"),
        both_scenes=40,
        planted_groups=4,
    )


CONFIGS: dict[str, Callable[[], Run]] = {"pictograms": pictograms, "sweeps": sweeps, "smoke": smoke}


def with_model(run: codet_configs.Run, **changes: Any) -> codet_configs.Run:
    """The same training of another model."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


VARIANTS: dict[str, Callable[[codet_configs.Run], codet_configs.Run]] = {
    "region-region": lambda run: run,
    "region-text": lambda run: with_model(run, supervision="region_text"),
    "max-size": lambda run: with_model(run, supervision="max_size"),
    "no guidance": lambda run: with_model(run, guidance="none"),
    "guided dimensions": lambda run: with_model(run, guidance="dimensions"),
    "both, guidance": lambda run: dataclasses.replace(run, pairs=f"{run.pairs}-both"),
    "both, no guidance": lambda run: dataclasses.replace(with_model(run, guidance="none"), pairs=f"{run.pairs}-both"),
    "box supervision, joint steps": lambda run: with_model(run, supervision="boxes"),
    "captions": lambda run: with_model(run, supervision="captions"),
    "top-3": lambda run: with_model(run, aggregation="top_k"),
    "attention": lambda run: with_model(run, aggregation="attention"),
    "learned": lambda run: with_model(run, aggregation="learned", guidance="dimensions", group_size=run.group_size),
}
"""Name -> what it changes in the training."""

CLAIMS: studies.Claims = {
    "region-region above region-text": ("ap50_novel", "region-region", "region-text"),
    "region-region above max-size": ("ap50_novel", "region-region", "max-size"),
    "guidance above none": ("ap50_novel", "region-region", "no guidance"),
    "guidance above none where every picture holds both": ("ap50_novel", "both, guidance", "both, no guidance"),
    "region-region above box supervision of as many steps": (
        "ap50_novel", "region-region", "box supervision, joint steps",
    ),
    "the same, base": ("ap50_base", "region-region", "box supervision, joint steps"),
    "region-region above captions": ("ap50_novel", "region-region", "captions"),
}  # fmt: skip
"""Claim -> metric, and what is compared with what."""


def study(run: Run) -> dict[str, Any]:
    """Train and measure whatever is not there yet; the report is written anew after each variant.

    Raises:
        InputError: the teacher is missing, or a variant is unknown.
    """
    if not run.teacher:
        raise InputError("--teacher: missing, expected a CLIP checkpoint (`python workflows/clip.py`)")
    for variant in run.variants:
        if variant not in VARIANTS:
            raise InputError(f"variants: {variant!r}, expected some of {', '.join(VARIANTS)}")
    results: dict[str, dict[int, Numbers]] = {}
    report: dict[str, Any] = {}
    for seed in run.seeds:
        for name, numbers in study_seed(run, seed):
            results.setdefault(name, {})[seed] = numbers
            report = {
                "seeds": list(run.seeds),
                "results": results,
                "differences": studies.differences(results, CLAIMS),
            }
            studies.write_report(run.storage, run.name, report, as_table(report))
    if run.group_sizes or run.proposal_counts:
        storage.write_bytes(storage.join(run.storage, "reports", f"{run.name}.png"), draw_curves(results))
    return report


def study_seed(run: Run, seed: int) -> Iterator[tuple[str, Numbers]]:
    """What one seed measures, by name, as it comes."""
    boxes_model = ""
    for name, own in trainings(run, seed):
        if own.pairs.endswith("-both"):
            prepare_both(run, own.pairs)
        answer = trained(run, seed, name, own, boxes_model)
        if not boxes_model:
            boxes_model = answer["boxes_model"]
            yield "box supervision", answer["box_supervised"]
        yield name, answer["metrics"]


def trainings(run: Run, seed: int) -> Iterator[tuple[str, codet_configs.Run]]:
    """Every training of a seed, by name."""
    base = dataclasses.replace(
        run.training,
        storage=run.storage,
        teacher=run.teacher,
        box_stage=dataclasses.replace(run.training.box_stage, seed=seed),
        joint_stage=dataclasses.replace(run.training.joint_stage, seed=seed),
    )
    for variant in run.variants:
        yield variant, VARIANTS[variant](base)
    for size in run.group_sizes:
        groups = max(1, run.images_per_step // size)
        yield f"group size {size}", dataclasses.replace(base, group_size=size, groups_per_step=groups)
    for count in run.proposal_counts:
        yield f"{count} proposals", with_model(base, num_proposals=count)


def trained(run: Run, seed: int, name: str, own: codet_configs.Run, boxes_model: str) -> dict[str, Any]:
    """Train one variant and measure it, or read what an earlier study measured.

    A result belongs to the exact settings of its training, which its file's name bears a digest of.
    """
    label = studies.label_of(seed, name.replace(", ", "_").replace(" ", "_"), own)

    def job() -> dict[str, Any]:
        resume = runs.find_run(run.storage, "codet", label)
        found = codet.train(dataclasses.replace(own, config=label, resume=resume, box_model=boxes_model))
        return {
            "model": found.model,
            "boxes_model": found.outputs["boxes_model"],
            "seconds": found.seconds["joint"],
            "box_supervised": found.metrics.box_supervised.summary()
            | find_planted(run, own, found.outputs["boxes_model"]),
            "metrics": found.metrics.codet.summary() | find_planted(run, own, found.model),
        }

    return studies.remembered(run.storage, "codet_study", label, job)


# ------------------------------------------------------------------------------------------ every picture holds both


def prepare_both(run: Run, name: str) -> None:
    """Publish pairs and groups in which every name comes with one other name, always: captions share two concepts."""
    if tables.find_manifest(run.storage, "groups", name) is not None:
        return
    world, rows = World.create(0), []
    partners = np.random.default_rng([0, 21]).permutation(len(world.names)).reshape(-1, 2)
    for number in range(run.both_scenes):
        rng = np.random.default_rng([0, 22, number])
        chosen = rng.choice(len(partners), size=int(rng.integers(1, 3)), replace=False)
        scene = draw_all(rng, world, partners[chosen].reshape(-1))
        sink = io.BytesIO()
        Image.fromarray(scene.pixels).save(sink, "JPEG", quality=95)
        uri = storage.join(run.storage, "images", name, f"{number:06d}.jpg")
        storage.write_bytes(uri, sink.getvalue())
        rows.append({"url": uri, "caption": world.caption(rng, scene)})
    cluster.start_ray()
    crawl = dataclasses.replace(pairs_configs.pictograms(), storage=run.storage, name=name, site_pictures=0)
    prepare_pairs.prepare_local(dataclasses.replace(crawl, site_scenes=0), pa.Table.from_pylist(rows))


def draw_all(rng: np.random.Generator, world: World, labels: np.ndarray) -> Scene:
    """A scene in which every one of the labels is seen."""
    while True:
        colours = [str(name) for name in rng.choice(list(COLOURS), size=len(labels))]
        scene = draw_scene(rng, SCENES, labels, [world.names[label] for label in labels], colours)
        if len(scene.labels) == len(labels):
            return scene


# ----------------------------------------------------------------------------------------------- planted objects


def find_planted(run: Run, own: codet_configs.Run, folder: str) -> Numbers:
    """How often attention is highest on the object that a group of held-out scenes shares (IoU at least 0.5).

    `planted_images` is the share of images, `planted_groups` that of groups in which it holds in most of the images.
    """
    local = storage.local_folder(folder)
    model, encoder = load_codet(local), load_encoder(local / "text")
    if model.config.supervision in ("captions", "boxes"):
        return {}
    names = read_codet_names(run.storage, own.boxes, own.pairs, encoder)
    concepts = tables.read_table(run.storage, "concepts", own.pairs, ["name"])["name"].to_pylist()
    hits = [
        find_in_group(model, names.concept_embeddings, *planted)
        for planted in plant(concepts, run.planted_groups, own.group_size)
    ]
    found_Pg = torch.stack(hits).float()
    return {
        "planted_images": float(found_Pg.mean()),
        "planted_groups": float((found_Pg.mean(1) > 0.5).float().mean()),
        "planted_whole_groups": float((found_Pg.mean(1) == 1).float().mean()),
    }


def plant(concepts: list[str], count: int, size: int) -> Iterator[tuple[ConceptBatch, list[Tensor]]]:
    """Groups of scenes that share one object, all concepts in turn, and the box [1, 4] of it in each scene."""
    world, known = World.create(0), [name for name in concepts if name in World.create(0).names]
    for number in range(count):
        rng = np.random.default_rng([0, 23, number])
        name = known[number % len(known)]
        shared = world.names.index(name)
        images: list[Tensor] = []
        boxes: list[Tensor] = []
        while len(images) < size:
            others = rng.choice(len(world.names), size=int(rng.choice(SCENES.object_counts)) - 1, replace=False)
            labels = rng.permutation([shared, *(label for label in others.tolist() if label != shared)])
            scene = draw_all(rng, world, labels)
            images.append(torch.from_numpy(scene.pixels).permute(2, 0, 1))
            boxes.append(torch.from_numpy(scene.boxes[scene.labels == shared]))
        mentioned = torch.zeros(size, len(concepts), dtype=torch.bool)
        batch = ConceptBatch(tuple(images), torch.tensor([concepts.index(name)]), mentioned, ("",) * size)
        yield batch, boxes


def find_in_group(model: CoDet, concepts_CD: Tensor, batch: ConceptBatch, boxes: list[Tensor]) -> Tensor:
    """[g] bool: whether the proposal with the most attention lies on the shared object."""
    (group,) = model.explain(batch, concepts_CD)
    found = [
        bool(len(attention)) and float(box_iou(proposal[attention.argmax()][None], box)) >= 0.5
        for proposal, attention, box in zip(group.boxes, group.attention, boxes, strict=True)
    ]
    return torch.tensor(found)


# ---------------------------------------------------------------------------------------------------------- report


def as_table(report: Mapping[str, Any]) -> str:
    """The report in Markdown: means over seeds, and each seed."""
    lines = studies.ap_table(report["results"])
    lines += [
        "",
        "| attention on the planted object | images | most of a group | all of a group |",
        "|---|---|---|---|",
    ]
    for name, of_seeds in report["results"].items():
        values = list(of_seeds.values())
        if "planted_images" in values[0]:
            keys = ("planted_images", "planted_groups", "planted_whole_groups")
            means = " | ".join(f"{np.mean([entry[key] for entry in values]):.3f}" for key in keys)
            lines.append(f"| {name} | {means} |")
    lines += ["", *studies.difference_table(report["differences"])]
    return "\n".join(lines) + "\n"


def draw_curves(results: studies.Results) -> bytes:
    """A PNG: novel and base AP50 over group sizes and numbers of proposals."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweeps = {
        "images of a group": {
            int(name.split()[-1]): of for name, of in results.items() if name.startswith("group size")
        },
        "proposals of an image": {
            int(name.split()[0]): of for name, of in results.items() if name.endswith("proposals")
        },
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, (label, points) in zip(axes, sweeps.items(), strict=True):
        for split in ("base", "novel"):
            means = [float(np.mean([entry[f"ap50_{split}"] for entry in of.values()])) for of in points.values()]
            axis.plot(list(points), means, marker="o", label=split)
        axis.set(xlabel=label, ylabel="AP50", xscale="log", xticks=list(points), xticklabels=list(points))
        axis.minorticks_off()
        axis.legend()
    sink = io.BytesIO()
    figure.savefig(sink, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return sink.getvalue()


def main() -> None:
    """The script: measure, print, tell where the report is."""
    run = cli.parse(CONFIGS, __doc__)
    print(as_table(study(run)))
    print(f"report: {storage.join(run.storage, 'reports', f'{run.name}.json')}")


if __name__ == "__main__":
    cli.execute(main)

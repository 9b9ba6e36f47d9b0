"""The CLIPs that claims use: one a seed, or a weaker one, trained once for all claims of a storage."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from data_prep import tables
from workflows import clip, prepare_boxes, prepare_pairs
from workflows.common import cluster
from workflows.configs import boxes as boxes_configs
from workflows.configs import clip as clip_configs
from workflows.configs import pairs as pairs_configs
from workflows.inputs.pairs import pictogram_site
from workflows.studies import study as studies
from workflows.studies.clip_towers import tower_run
from workflows.studies.study import StudyRun

FULL_STEPS = clip_configs.pictograms().optimisation.steps


def find_demo_teacher(folder: str) -> str:
    """The checkpoint of a demo's CLIP, which has the settings of seed 0; empty if there is none."""
    return max(map(str, Path(folder).glob("runs/clip/pictograms-*/model")), default="")


def prepare_world(storage_uri: str, *, pairs: bool = False, other_boxes: Iterable[boxes_configs.Run] = ()) -> None:
    """Publish the pictogram world's tables that are missing: boxes, and on demand captions and other box sets."""
    for config in (boxes_configs.pictograms(), *other_boxes):
        prepare_boxes.prepare(replace(config, storage=storage_uri))
    if pairs and tables.find_manifest(storage_uri, "pairs", "pictograms") is None:
        with pictogram_site(replace(pairs_configs.pictograms(), storage=storage_uri)) as crawl:
            cluster.start_ray()
            prepare_pairs.prepare(crawl)


def teacher_of(run: StudyRun, seed: int, steps: int = FULL_STEPS) -> str:
    """The checkpoint of a seed's CLIP with a number of steps; the run's own teacher is that of seed 0."""
    if run.teacher and not seed and steps == FULL_STEPS:
        return run.teacher
    config = clip_configs.pictograms()
    stage = replace(config.optimisation, steps=steps, workers=0)
    return train_clip(run, seed, f"clip-{steps}", replace(config, optimisation=stage))


def long_trained_teacher(run: StudyRun, seed: int) -> str:
    """The checkpoint of a seed's CLIP that is trained longer than those that detectors learn from."""
    config = clip_configs.pictograms_long()
    return train_clip(run, seed, "clip-long", replace(config, optimisation=replace(config.optimisation, workers=0)))


def transformer_teacher(run: StudyRun) -> str:
    """The checkpoint of a CLIP whose image tower is a ViT, trained with as many operations as the CLIP of seed 0."""
    return train_clip(run, 0, "clip-vit", tower_run("ViT", FULL_STEPS))


def train_clip(run: StudyRun, seed: int, name: str, config: clip_configs.Run) -> str:
    """Train a CLIP, or find it; returns its checkpoint."""

    def job(own: clip_configs.Run) -> dict[str, str]:
        prepare_world(own.storage, pairs=True)
        return {"model": clip.train(own).model}

    own = replace(config, storage=run.storage, optimisation=replace(config.optimisation, seed=seed))
    return str(studies.remember("clip", seed, name, own, job)["model"])

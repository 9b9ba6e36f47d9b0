"""CLIP: learn which captions belong to which images, then name images by prompts.

pairs --shuffle, decode--> images, captions -> train -> zero-shot accuracy -> runs/clip/<run>/model

python workflows/clip.py --config smoke
ray job submit --working-dir . -- python workflows/clip.py --config pictograms --storage s3://bucket/ovd
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import ray.train
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from data_prep import storage, tables
from data_prep.batching import StreamShape, pair_loader, stream
from data_prep.collate import PairCollate
from data_prep.pictograms import PICTURES, World, single_objects
from ovd_models.clip import Clip, ClipConfig, ClipTextEncoder, save_clip, zero_shot_logits
from ovd_models.vocabulary import build_vocabulary
from workflows import cli, cluster, prepare_pairs, tracking, training
from workflows.tracking import MetricLogger
from workflows.training import Meter, Optimisation, Session


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of CLIP."""

    storage: str = "runs"
    """Folder or URI that holds tables and runs."""
    config: str
    """Name of the config, for tracking."""
    pairs: str
    """Name of the `pairs` table."""
    max_side: int | None = None
    """Only pairs whose longer side is at most this, in pixels."""
    model: ClipConfig = field(default_factory=ClipConfig)
    batch_size: int = 192
    """Pairs in a step, over all workers."""
    shift: int = 4
    """Each image is moved by up to this many pixels, edges repeated."""
    optimisation: Optimisation
    world_seed: int = 0
    """Seed of the pictogram world whose names are the zero-shot test."""
    eval_images: int = 4_080
    """Held-out images of the zero-shot test."""
    resume: str = ""
    """Continue this run instead of starting a new one."""

    def __post_init__(self) -> None:
        """Check that a batch can be shared among the workers."""
        training.check_shared("batch_size", self.batch_size, self.optimisation.workers)


def smoke() -> Run:
    """Seconds; builds its own pairs."""
    return Run(
        config="smoke",
        pairs="smoke",
        max_side=64,
        batch_size=32,
        eval_images=136,
        optimisation=Optimisation(steps=10, learning_rate=2e-3, checkpoint_every=10, workers=0),
    )


def pictograms() -> Run:
    """The tiny CLIP of the pictogram world: from 12,000 small pictures to its teacher in minutes on two cores."""
    return Run(
        config="pictograms",
        pairs="pictograms",
        max_side=64,
        batch_size=96,  # many small steps reach more than few large ones
        optimisation=Optimisation(
            steps=1500,
            learning_rate=2e-3,
            weight_decay=0.2,
            clip_norm=1e9,
            warmup=0.3,
            checkpoint_every=250,
            log_every=25,
            workers=1,
        ),
    )


CONFIGS: dict[str, Callable[[], Run]] = {"smoke": smoke, "pictograms": pictograms}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a training."""

    model: str
    """Folder or URI of the checkpoint."""
    top1_base: float
    top1_novel: float
    seconds: float
    run_id: str


def train_worker(run: Run, run_dir: str, logger: MetricLogger) -> None:
    """The loop: batch -> loss -> step."""
    device = training.prepare_worker(run.optimisation)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    clip = Clip(run.model)
    session = Session(clip, run.optimisation, device, run_dir)
    # Each rank's share of the loss of one big batch, with gradients through the gathered features.
    contrast = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    batches = ray.train.get_dataset_shard("pairs").iter_torch_batches(
        batch_size=run.batch_size // world, collate_fn=PairCollate(run.model.image_size), prefetch_batches=3
    )
    meter = Meter()
    shifts = torch.Generator().manual_seed(run.optimisation.seed + session.step)
    for images, captions in meter.waiting(batches):
        shifted = random_shift(images.to(device, non_blocking=True), run.shift, shifts)
        with session.autocast():
            image_features, text_features, scale = session.model(shifted, clip.tokenize(captions).to(device))
        loss = contrast(image_features.float(), text_features.float(), scale.float())
        session.update(loss)
        clip.clamp_scale()
        meter.add({"contrastive": loss}, run.batch_size)
        if rank == 0 and session.step % run.optimisation.log_every == 0:
            metrics = meter.collect()
            logger.log(metrics, session.step)
            training.print_progress("clip", session.step, run.optimisation.steps, metrics)
        if session.due:
            session.checkpoint({})
            logger.flush()
        if session.done:
            break
    logger.flush(wait=True)


def random_shift(images: torch.Tensor, limit: int, generator: torch.Generator) -> torch.Tensor:
    """[B, 3, S, S], each image moved by up to `limit` pixels each way, edges repeated."""
    if not limit:
        return images
    count, _, height, width = images.shape
    padded_BHWC = F.pad(images.float(), (limit,) * 4, mode="replicate").permute(0, 2, 3, 1)
    first = torch.randint(0, 2 * limit + 1, (2, count, 1), generator=generator).to(images.device)
    row_BH = first[0] + torch.arange(height, device=images.device)
    column_BW = first[1] + torch.arange(width, device=images.device)
    image_B = torch.arange(count, device=images.device)
    return padded_BHWC[image_B[:, None, None], row_BH[:, :, None], column_BW[:, None, :]].permute(0, 3, 1, 2)


def zero_shot(clip: Clip, teacher: str, run: Run) -> tuple[float, float]:
    """Top-1 accuracy on held-out pictures of one object each: base names, novel names, all names competing."""
    world = World.create(run.world_seed)
    images, labels = single_objects(world, PICTURES, run.eval_images, seed=run.world_seed + 1_000)
    vocabulary = build_vocabulary(ClipTextEncoder(run.model, clip.model.text, teacher), world.names)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    guesses = [zero_shot_logits(clip, part, vocabulary.embeddings).argmax(1) for part in torch.split(pixels, 256)]
    right = torch.cat(guesses).numpy() == labels
    novel = np.array([split == "novel" for split in world.splits])[labels]
    return float(right[~novel].mean()), float(right[novel].mean())


def train(run: Run) -> Trained:
    """Read the pairs, train, evaluate and save; returns where the model is and how well it names."""
    started = time.perf_counter()
    run_dir = training.open_run(run.storage, "clip", run.config, run.resume)
    settings, train_dir = run.optimisation, storage.join(run_dir, "train")
    digest = tables.read_manifest(run.storage, "pairs", run.pairs).digest
    cluster.start_ray()
    loader = pair_loader(
        run.storage, run.pairs, seed=settings.seed, image_size=run.model.image_size, max_side=run.max_side
    )
    shape = StreamShape(rows_per_step=run.batch_size, workers=max(1, settings.workers))
    with tracking.run(
        run.storage, experiment="clip", name=run.config, params=cli.flatten(run), tags={"pairs": digest}
    ) as tracked:
        tracked.log_text(cli.to_json(run), "run.json")
        training.fit(
            partial(train_worker, run, train_dir, tracked.logger()),
            settings,
            train_dir,
            {"pairs": lambda step: stream(loader, shape, step, settings.steps)},
        )
        clip = Clip(run.model)
        clip.load_state_dict(training.final_weights(train_dir))
        clip.eval()
        with tempfile.TemporaryDirectory() as folder:
            teacher = save_clip(clip, folder)
            (Path(folder) / "run.json").write_text(cli.to_json(run))
            top1_base, top1_novel = zero_shot(clip, teacher, run)
            model = storage.join(run_dir, "model")
            storage.upload_folder(Path(folder), model)
            metrics = {"eval/pictograms/top1_base": top1_base, "eval/pictograms/top1_novel": top1_novel}
            tracked.log_metrics(metrics, settings.steps)
            tracking.register(
                tracked,
                Path(folder),
                name=f"ovd-clip-{run.config}",
                metric="eval/pictograms/top1_novel",
                value=top1_novel,
            )
    seconds = time.perf_counter() - started
    return Trained(model=model, top1_base=top1_base, top1_novel=top1_novel, seconds=seconds, run_id=tracked.run_id)


def main() -> None:
    """Read -> train -> evaluate; prints where the model is and what comes next."""
    run = cli.parse(CONFIGS, __doc__)
    tracking.tracking_uri(run.storage)
    if run.config == "smoke" and tables.find_manifest(run.storage, "pairs", run.pairs) is None:
        with prepare_pairs.site_of(dataclasses.replace(prepare_pairs.smoke(), storage=run.storage)) as crawl:
            prepare_pairs.prepare(crawl)
    trained = train(run)
    print(f"zero-shot top-1: base {trained.top1_base:.3f}, novel {trained.top1_novel:.3f} ({trained.seconds:.0f} s)")
    print(f"model: {trained.model}")
    print(f"next:  python workflows/codet.py --config {run.config} --storage {run.storage} --teacher {trained.model}")


if __name__ == "__main__":
    cli.execute(main)

"""CLIP: learn which captions belong to which images, then name images by prompts.

pairs --shuffle, decode--> images, captions -> train -> zero-shot accuracy -> runs/clip/<run>/model

python workflows/clip.py --config smoke
python workflows/clip.py --config pictograms --model.name ViT-B-32 --pretrained openai --max-side None
ray job submit --working-dir . -- python workflows/clip.py --config pictograms --storage s3://bucket/ovd
"""

import copy
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ray.train
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep import storage, tables
from data_prep.embeddings import teachers
from data_prep.pictograms.world import PICTURES, World, single_objects
from data_prep.streams.collate import PairCollate
from data_prep.streams.plans import StreamShape, pair_loader, stream
from ovd_models.clip.model import (
    Clip,
    ClipConfig,
    ClipTextEncoder,
    load_clip,
    open_clip_model,
    save_clip,
    zero_shot_logits,
)
from ovd_models.clip.zero_shot import calibration_error, fit_temperature
from ovd_models.errors import InputError
from ovd_models.vocabulary import build_vocabulary
from workflows import prepare_pairs
from workflows.common import cli, tracking, training
from workflows.common.tracking import MetricLogger
from workflows.common.training import Meter, Optimisation, Session


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of CLIP."""

    storage: str = "store"
    """Folder or URI that holds tables and runs."""
    config: str
    """Name of the config, for tracking."""
    pairs: str
    """Name of the `pairs` table."""
    max_side: int | None = None
    """Only pairs whose longer side is at most this, in pixels."""
    model: ClipConfig = field(default_factory=ClipConfig)
    pretrained: str = ""
    """First weights: a tag of open_clip's (`openai`) or a file for `model.name`, or a checkpoint of ours, whose
    architecture is taken too; empty: from scratch."""
    batch_size: int = 192
    """Pairs in a step, over all workers."""
    chunks: int = 1
    """Parts in which a worker encodes its share of a batch, for batches that do not fit in memory: the loss is that
    of the whole batch, at the price of a second forward pass."""
    shift: int = 4
    """Each image is moved by up to this many pixels, edges repeated."""
    optimisation: Optimisation
    world_seed: int = 0
    """Seed of the pictogram world whose names are the zero-shot test."""
    eval_images: int = 4_080
    """Held-out images of the zero-shot test."""
    eval_every: int = 0
    """Steps after which the zero-shot test is made in training; 0 makes it at the end only."""
    resume: str = ""
    """Continue this run instead of starting a new one."""

    def __post_init__(self) -> None:
        """Check that a batch can be shared among the workers."""
        training.check_shared("batch_size", self.batch_size, self.optimisation.workers)
        if not 1 <= self.chunks <= self.batch_size // max(1, self.optimisation.workers):
            raise InputError(f"chunks: {self.chunks}, expected 1 to a worker's share of the batch")


def smoke() -> Run:
    """Seconds; builds its own pairs."""
    return Run(
        config="smoke",
        pairs="smoke",
        max_side=64,
        batch_size=32,
        eval_images=136,
        eval_every=5,
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
            steps=1600,
            learning_rate=2e-3,
            weight_decay=0.2,
            clip_norm=None,
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


def first_model(run: Run, run_dir: str) -> tuple[ClipConfig, str]:
    """The architecture to train, and the folder of its first weights, empty from scratch.

    Every worker reads the folder, so that the weights are downloaded once.

    Raises:
        InputError: there are no such weights, or they do not fit.
    """
    if not run.pretrained:
        return run.model, ""
    if storage.exists(storage.join(run.pretrained, "clip.json")):
        clip = load_clip(storage.local_folder(run.pretrained))[0]
    else:
        clip = open_clip_model(run.model, run.pretrained)
    folder = storage.join(run_dir, "first")
    teachers.store_checkpoint(clip, folder)
    return clip.config, folder


def contrastive_loss(config: ClipConfig, rank: int, world: int) -> nn.Module:
    """Each rank's share of the loss of one big batch, with gradients through the features of the other ranks."""
    loss: nn.Module
    if config.loss == "siglip":
        loss = SigLipLoss(rank=rank, world_size=world)
    else:
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    return loss


def train_worker(run: Run, run_dir: str, first: str, logger: MetricLogger) -> None:
    """The loop: batch -> loss -> step."""
    device = training.prepare_worker(run.optimisation)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    clip = Clip(run.model, run.chunks)
    if first:
        clip.load_state_dict(load_clip(storage.local_folder(first))[0].state_dict())
    session = Session(clip, run.optimisation, device, run_dir)
    contrast = contrastive_loss(run.model, rank, world)
    batches = ray.train.get_dataset_shard("pairs").iter_torch_batches(
        batch_size=run.batch_size // world, collate_fn=PairCollate(run.model.image_size), prefetch_batches=3
    )
    meter = Meter()
    shifts = torch.Generator().manual_seed(run.optimisation.seed + session.step)
    for images, captions in meter.waiting(batches):
        shifted = random_shift(images.to(device, non_blocking=True), run.shift, shifts)
        with session.autocast():
            features = session.model(shifted, clip.tokenize(captions).to(device))
        loss = contrast(*(value.float() for value in features))
        session.update(loss)
        clip.clamp_scale()
        meter.add({"contrastive": loss}, run.batch_size)
        if rank == 0 and session.step % run.optimisation.log_every == 0:
            metrics = meter.collect()
            logger.log(metrics, session.step)
            training.print_progress("clip", session.step, run.optimisation.steps, metrics)
        if rank == 0 and run.eval_every and session.step % run.eval_every == 0 and not session.done:
            kept = copy.deepcopy(clip if session.average is None else session.average.module)
            assert isinstance(kept, Clip)
            base, novel = zero_shot(kept.eval(), "clip:training", run)
            logger.log(accuracy_metrics(base, novel), session.step)
            print(f"clip {session.step}  zero-shot top-1: base {base:.3f}, novel {novel:.3f}", flush=True)
        if session.due:
            with meter.timing("checkpoint"):
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


def held_out(clip: Clip, teacher: str, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, K] of held-out pictures of one object each, all names competing, their labels, and who is novel."""
    device = next(clip.parameters()).device
    world = World.create(run.world_seed)
    images, labels = single_objects(world, PICTURES, run.eval_images, seed=run.world_seed + 1_000)
    vocabulary = build_vocabulary(ClipTextEncoder(run.model, clip.model.text, teacher), world.names).to(device)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    if pixels.shape[-1] != run.model.image_size:
        pixels = F.interpolate(pixels, size=run.model.image_size, mode="bicubic", antialias=True)
    parts = [zero_shot_logits(clip, part.to(device), vocabulary.embeddings) for part in torch.split(pixels, 256)]
    novel = torch.tensor([split == "novel" for split in world.splits])
    return torch.cat(parts).cpu(), torch.from_numpy(labels), novel[torch.from_numpy(labels)]


def zero_shot(clip: Clip, teacher: str, run: Run) -> tuple[float, float]:
    """Top-1 accuracy on held-out pictures: base names, novel names."""
    return accuracy(*held_out(clip, teacher, run))


def accuracy(logits_NK: Tensor, labels_N: Tensor, novel_N: Tensor) -> tuple[float, float]:
    """Top-1 accuracy of base and of novel names."""
    right_N = (logits_NK.argmax(1) == labels_N).float()
    return float(right_N[~novel_N].mean()), float(right_N[novel_N].mean())


def accuracy_metrics(base: float, novel: float) -> dict[str, float]:
    """Under MLflow's names."""
    return {"eval/pictograms/top1_base": base, "eval/pictograms/top1_novel": novel}


def calibrate(logits_NK: Tensor, labels_N: Tensor) -> dict[str, float]:
    """The temperature that every second held-out picture gives, and the calibration error of the others with it."""
    temperature = fit_temperature(logits_NK[::2], labels_N[::2])
    before, after = (calibration_error((logits_NK[1::2] / t).softmax(1), labels_N[1::2]) for t in (1, temperature))
    return {"temperature": temperature, "ece_before": before, "ece": after}


def train(run: Run) -> Trained:
    """Read the pairs, train, evaluate and save; returns where the model is and how well it names."""
    started = time.perf_counter()
    run_dir = training.open_run(run.storage, "clip", run.config, run.resume)
    config, first = first_model(run, run_dir)
    run = dataclasses.replace(run, model=config)
    settings, train_dir = run.optimisation, storage.join(run_dir, "train")
    digest = tables.read_manifest(run.storage, "pairs", run.pairs).digest
    training.hold_to_inputs(run_dir, {"pairs": digest})
    training.start_ray_for(settings)
    loader = pair_loader(
        run.storage, run.pairs, seed=settings.seed, image_size=run.model.image_size, max_side=run.max_side
    )
    shape = StreamShape(rows_per_step=run.batch_size, workers=settings.workers)
    with tracking.run(
        run.storage, experiment="clip", name=run.config, params=cli.flatten(run), tags={"pairs": digest}
    ) as tracked:
        tracked.log_text(cli.to_json(run), "run.json")
        training.fit(
            partial(train_worker, run, train_dir, first, tracked.logger()),
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
            logits, labels, novel = held_out(clip, teacher, run)
            top1_base, top1_novel = accuracy(logits, labels, novel)
            calibration = calibrate(logits, labels)
            (Path(folder) / "calibration.json").write_text(json.dumps(calibration))
            model = storage.join(run_dir, "model")
            storage.upload_folder(Path(folder), model)
            tracked.log_metrics(accuracy_metrics(top1_base, top1_novel), settings.steps)
            tracked.log_metrics({f"calibration/{name}": value for name, value in calibration.items()}, settings.steps)
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
        prepare_pairs.prepare_smoke(run.storage)
    trained = train(run)
    print(f"zero-shot top-1: base {trained.top1_base:.3f}, novel {trained.top1_novel:.3f} ({trained.seconds:.0f} s)")
    print(f"model: {trained.model}")
    print(f"next:  python workflows/codet.py --config {run.config} --storage {run.storage} --teacher {trained.model}")


if __name__ == "__main__":
    cli.execute(main)

"""CLIP: learn which captions belong to which images, then name images by prompts.

pairs --shuffle, decode--> images, captions -> train -> zero-shot accuracy -> runs/clip/NAME/model

python workflows/clip.py --config smoke
python workflows/clip.py --config pictograms --model.name ViT-B-32 --pretrained openai --max-side None
ray job submit --working-dir . -- python workflows/clip.py --config pictograms --storage s3://bucket/ovd
"""

from workflows.common import brief_help

brief_help.answer(
    __name__, __file__, "storage pairs max_side pretrained batch_size workers precision use_gpu dry_run resume"
)

import copy
import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep import storage
from data_prep.embeddings.crops import FITS
from data_prep.pictograms.world import PICTURES, World, single_objects
from data_prep.progress import watched
from data_prep.streams.collate import PairCollate
from data_prep.streams.pair_loader import PairLoader, pair_loader
from data_prep.streams.shard_loader import ShardLoader, shard_loader
from ovd_models.clip.model import (
    Clip,
    ClipConfig,
    ClipTextEncoder,
    load_clip,
    open_clip_model,
    save_clip,
    zero_shot_logits,
)
from ovd_models.clip.towers import trim_tokens
from ovd_models.clip.zero_shot import calibration_error, fit_temperature
from ovd_models.vocabulary import build_vocabulary
from workflows import prepare_pairs
from workflows.common import cli, descriptions, runs, training
from workflows.common.rehearsal import Rehearsal, rehearse
from workflows.common.runs import Evaluation, Trained
from workflows.common.session import Session, Validated
from workflows.common.tracking import MetricLogger
from workflows.common.training import Stage
from workflows.configs.clip import CONFIGS, Run


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Zero-shot top-1 accuracy on held-out pictures of one object each, all names competing."""

    top1_base: float
    top1_novel: float

    def named(self) -> dict[str, float]:
        """The values under MLflow's names, without `eval/`."""
        return {"accuracy_base": self.top1_base, "accuracy_novel": self.top1_novel}


@dataclass(frozen=True)
class HeldOut:
    """Zero-shot answers for N held-out pictures of one object each, all K names competing."""

    logits: Tensor
    """[N, K]."""
    labels: Tensor
    """[N] int64."""
    novel: Tensor
    """[N] bool: whether the shown object's name is novel."""

    def accuracy(self) -> Accuracy:
        """Top-1 accuracy of base and of novel names."""
        right_N = (self.logits.argmax(1) == self.labels).float()
        base, novel = (float(right_N[chosen_N].mean()) for chosen_N in (~self.novel, self.novel))
        return Accuracy(top1_base=base, top1_novel=novel)

    def calibration(self) -> dict[str, float]:
        """The temperature fitted on every second picture, and the calibration error of the others with it."""
        temperature = fit_temperature(self.logits[::2], self.labels[::2])
        logits, labels = self.logits[1::2], self.labels[1::2]
        before, after = (calibration_error((logits / scale).softmax(1), labels) for scale in (1, temperature))
        return {"temperature": temperature, "ece_before": before, "ece": after}


def read_pretrained(run: Run) -> Clip | None:
    """The model that `--pretrained` names, or None from scratch.

    Raises:
        InputError: there are no such weights, or they do not fit.
    """
    if not run.pretrained:
        return None
    if storage.exists(storage.join(run.pretrained, "clip.json")):
        return load_clip(storage.local_folder(run.pretrained))[0]
    return open_clip_model(run.model, run.pretrained)


def contrastive_loss(config: ClipConfig, rank: int, world: int) -> nn.Module:
    """Each rank's share of the loss of one big batch, with gradients through the features of the other ranks."""
    loss: nn.Module
    if config.loss == "siglip":
        loss = SigLipLoss(rank=rank, world_size=world)
    else:
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    return loss


def train_worker(run: Run, stage: Stage, pretrained: str, logger: MetricLogger) -> None:
    """The loop: batch -> loss -> step."""
    device = training.prepare_worker(run.optimisation)
    clip = Clip(run.model, run.chunks)
    if pretrained:  # a folder, so that weights are downloaded once
        clip.load_state_dict(load_clip(storage.local_folder(pretrained))[0].state_dict())
    session = Session(clip, stage, device, logger)
    contrast = contrastive_loss(run.model, session.rank, session.world)
    collate = PairCollate(run.model.image_size, lambda texts: trim_tokens(clip.model.text, clip.tokenize(texts)))
    for batch in session.batches("pairs", run.batch_size, collate, prefetch=3):
        shifted = random_shift(batch.images, run.shift)
        with session.autocast():
            features = session.model(shifted, batch.tokens)
        losses = {"contrastive": contrast(*(value.float() for value in features))}
        session.update(losses)
        clip.clamp_scale()
        session.validate(run.validate_every, partial(measure, run))
        session.end_step(losses, run.batch_size)


def random_shift(images: Tensor, limit: int, generator: torch.Generator | None = None) -> Tensor:
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


def held_out(clip: Clip, run: Run) -> HeldOut:
    """Zero-shot answers on held-out pictures of the pictogram world."""
    device = next(clip.parameters()).device
    world = World.create(run.world_seed)
    images, labels = single_objects(world, PICTURES, run.eval_images, seed=run.world_seed + 1_000)
    text = copy.deepcopy(clip.model.text)  # an encoder freezes its tower, and this one may be in training
    vocabulary = build_vocabulary(ClipTextEncoder(run.model, text, "clip:training"), world.names).to(device)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    if pixels.shape[-1] != run.model.image_size:
        pixels = F.interpolate(pixels, size=run.model.image_size, mode="bicubic", antialias=True)
    batches = watched(torch.split(pixels, 256), "zero-shot test", "batches")
    parts = [zero_shot_logits(clip, part.to(device), vocabulary.embeddings) for part in batches]
    novel = torch.tensor([split == "novel" for split in world.splits])
    return HeldOut(torch.cat(parts).cpu(), torch.from_numpy(labels), novel[torch.from_numpy(labels)])


def measure(run: Run, clip: nn.Module) -> Validated:
    """The zero-shot test of a model in training."""
    assert isinstance(clip, Clip)
    return Validated(held_out(clip, run).accuracy().named())


def open_pairs(run: Run) -> PairLoader | ShardLoader:
    """The pairs in the run's order.

    Raises:
        InputError: the table is missing, or no pair fits.
    """
    open_loader = pair_loader if run.shuffle == "rows" else partial(shard_loader, buffer=run.buffer_pairs)
    return open_loader(
        run.storage,
        run.pairs,
        seed=run.optimisation.seed,
        image_size=run.model.image_size,
        fit=FITS[run.model.resize_mode],
        max_side=run.max_side,
    )


def train(run: Run) -> Trained[Accuracy]:
    """Read the pairs, train, evaluate and save.

    Raises:
        InputError: the pairs or the pretrained weights are missing or do not fit.
    """
    title, pretrained = descriptions.run_name("clip", run, CONFIGS), read_pretrained(run)
    if pretrained is not None:
        run = dataclasses.replace(run, model=pretrained.config)
    settings = run.optimisation
    loader = open_pairs(run)  # refuses them before Ray and MLflow are started
    with runs.open_run(
        run,
        "clip",
        title=title,
        data_set=run.pairs,
        tables_read={"pairs": run.pairs},
        inputs={},
        stages=(settings,),
    ) as active:
        first = active.save("first", partial(save_clip, pretrained)) if pretrained is not None else ""
        stage = active.stage("train", settings)
        with active.timing("train"):
            loop = partial(train_worker, run, stage, first, active.tracked.logger())
            weights = training.fit(loop, stage, {"pairs": training.feed(loader, run.batch_size, settings)})
        clip = Clip(run.model)
        clip.load_state_dict(weights)
        answers = held_out(clip.eval().to(training.device_of(settings)), run)
        clip.cpu()
        accuracy, calibration = answers.accuracy(), answers.calibration()

        def write(folder: Path) -> None:
            save_clip(clip, folder)
            (folder / "run.json").write_text(cli.to_json(run))
            (folder / "calibration.json").write_text(json.dumps(calibration))

        def log(folder: str) -> Evaluation[Accuracy]:
            scores = {f"eval/{name}": value for name, value in accuracy.named().items()}
            scores |= {f"calibration/{name}": value for name, value in calibration.items()}
            active.tracked.log_metrics(scores, settings.steps)
            return Evaluation(metrics=accuracy, headline="eval/accuracy_novel", value=accuracy.top1_novel)

        return active.finish(write, log)


def dry_run(run: Run) -> None:
    """Run some steps in this process, and print what they cost and what the workers need."""
    pretrained = read_pretrained(run)
    run = run if pretrained is None else dataclasses.replace(run, model=pretrained.config)

    def train_some(share: Run, stage: Stage, rehearsal: Rehearsal) -> None:
        feeds = {"pairs": training.feed(open_pairs(share), share.batch_size, stage.settings)}
        rehearsal.fit(partial(train_worker, share, stage, "", rehearsal), stage, feeds)

    rehearse(run, {"train": "optimisation"}, train_some)


DRAWN_PAIRS = ("smoke", "pictograms")
"""Tables of drawn pictures, as the zero-shot test has them."""


def next_command(run: Run, model: str) -> str:
    """The training of a detector with this CLIP: on the same drawn world, or on photographs and the same pairs."""
    config = run.config if run.pairs in DRAWN_PAIRS else "photos_laptop"
    own = () if run.pairs in DRAWN_PAIRS else ("--pairs", run.pairs, "--data", "PHOTOS")
    return cli.script_command("codet", "--config", config, *own, "--storage", run.storage, "--teacher", model)


def main() -> None:
    """Read -> train -> evaluate; prints the accuracy and the next command."""
    run = runs.begin(cli.parse(CONFIGS, __doc__), "clip")
    if run.config == "smoke":
        prepare_pairs.prepare_smoke(run.storage)
    if run.dry_run:
        dry_run(run)
        return
    trained = train(run)
    accuracy = f"zero-shot top-1: base {trained.metrics.top1_base:.3f}, novel {trained.metrics.top1_novel:.3f}"
    if run.pairs not in DRAWN_PAIRS:
        accuracy += " of drawn pictograms, which says little about your pictures"
    runs.print_results(run, trained, accuracy, next_command(run, trained.model))


if __name__ == "__main__":
    cli.execute(main)

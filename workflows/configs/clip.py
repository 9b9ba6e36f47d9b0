"""Settings of `clip.py`: a `Run` holds everything that affects results; each function returns a named one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from ovd_models.clip.model import ClipConfig
from ovd_models.errors import InputError
from workflows.common.optimisation import Optimisation, check_shared


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of CLIP."""

    storage: str = "store"
    """Folder or URI that holds tables and runs."""
    config: str
    """Name of the config; starts the run's name."""
    pairs: str
    """Name of the `pairs` table."""
    max_side: int | None = None
    """Use only pairs whose longer side is at most this many pixels."""
    shuffle: Literal["rows", "shards"] = "rows"
    """Order of an epoch: all pairs shuffled, with the table's whole index in memory, or shuffled shards whose pairs are
    shuffled `buffer_pairs` at a time. See `docs/clip.md`."""
    buffer_pairs: int = 20_000
    """Pairs that are shuffled together with `--shuffle shards`."""
    model: ClipConfig = field(default_factory=ClipConfig)
    pretrained: str = ""
    """Initial weights: an open_clip tag (`openai`) or file for `model.name`, or one of our checkpoints, whose
    architecture replaces `model`. Empty: from scratch."""
    batch_size: int = 192
    """Pairs in a step, over all workers."""
    chunks: int = 1
    """Parts in which a worker encodes its share of a batch that does not fit in memory. The loss is still that of the
    whole batch; the cost is a second forward pass."""
    shift: int = 4
    """Each training image is shifted by up to this many pixels, edges repeated."""
    optimisation: Optimisation
    world_seed: int = 0
    """Seed of the pictogram world of the zero-shot test."""
    eval_images: int = 4_080
    """Held-out images in the zero-shot test."""
    validate_every: int = 0
    """Steps between zero-shot tests during training; 0 for none."""
    wait_minutes: float = 20.0
    """Minutes to wait for a cluster that grows to the workers' number."""
    dry_run: bool = False
    """Only run some steps of each stage in this process, and print what they cost and what the workers need."""
    resume: str = ""
    """Name of a run to continue."""

    @property
    def stages(self) -> dict[str, Optimisation]:
        """The only stage, by its field."""
        return {"optimisation": self.optimisation}

    def __post_init__(self) -> None:
        """Check the numbers, and that a batch can be shared among the workers."""
        check_shared("batch_size", self.batch_size, self.optimisation)
        if self.optimisation.accumulate > 1:
            raise InputError("accumulate: the loss compares all pairs of a batch, expected 1; see --chunks")
        if self.world_seed < 0:
            raise InputError(f"world_seed: {self.world_seed}, expected 0 or more")
        if self.buffer_pairs < 1:
            raise InputError(f"buffer_pairs: {self.buffer_pairs}, expected at least 1")
        if not 1 <= self.chunks <= self.batch_size // max(1, self.optimisation.workers):
            raise InputError(f"chunks: {self.chunks}, expected 1 to a worker's share of the batch")


def smoke() -> Run:
    """Runs in seconds; builds its own pairs."""
    return Run(
        config="smoke",
        pairs="smoke",
        max_side=64,
        batch_size=32,
        eval_images=136,
        validate_every=5,
        optimisation=Optimisation(steps=10, learning_rate=2e-3, checkpoint_every=10, workers=0),
    )


def pictograms() -> Run:
    """The tiny CLIP of the pictogram world, trained on 12,000 small pictures in minutes on two cores."""
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


def pictograms_quick() -> Run:
    """`pictograms` in less than half the steps, a little less accurate; the demo's."""
    run = pictograms()
    # One thread is as fast as two here, and faster in bf16.
    quick = replace(run.optimisation, steps=700, optimiser="muon", precision="fast", threads=1, checkpoint_every=200)
    return replace(run, config="pictograms_quick", optimisation=quick)


def pictograms_long() -> Run:
    """`pictograms_quick` in almost three times the steps: the most accurate CLIP of the pictogram world."""
    run = pictograms_quick()
    return replace(run, config="pictograms_long", optimisation=replace(run.optimisation, steps=2000))


CONFIGS: dict[str, Callable[[], Run]] = {
    "smoke": smoke,
    "pictograms": pictograms,
    "pictograms_quick": pictograms_quick,
    "pictograms_long": pictograms_long,
}

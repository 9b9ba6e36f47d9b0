"""How a model is optimised: the settings of a training stage, the optimiser, and the learning rate's schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from timm.optim import muon
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ovd_models.errors import InputError

MIN_ONE_CYCLE_STEPS = 10
"""PyTorch's one-cycle schedule cannot be shorter."""
STEPS_PER_BLOCK = 5
"""Steps in a block of a stream; `checkpoint_every` is a multiple of it, so that a resumed stream is exact."""


Precision = Literal["auto", "fast", "bf16", "fp16", "fp32"]


def read_factors(words: list[str]) -> dict[str, float]:
    """Rate factors from words such as `detector.backbone.=0.1`.

    Raises:
        ValueError: a word is of another form, or a factor negative.
    """
    factors = {}
    for word in words:
        start, _, factor = word.rpartition("=")
        if not start or not 0 <= float(factor) < math.inf:
            raise ValueError(f"{word!r}, expected START=FACTOR, such as detector.backbone.=0.1")
        factors[start] = float(factor)
    return factors


def show_factors(factors: dict[str, float]) -> list[str]:
    """Rate factors as `read_factors` reads them."""
    return [f"{start}={factor:g}" for start, factor in factors.items()]


RateFactors = Annotated[
    dict[str, float],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="START=FACTOR ...",
        instance_from_str=read_factors,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=show_factors,
    ),
]
"""As one flag; by default, every entry of the default would be a flag, and no further one could be given."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How a model is optimised, with which schedule, and on how many workers."""

    steps: int
    learning_rate: float
    weight_decay: float = 0.05
    optimiser: Literal["adamw", "sgd", "muon"] = "adamw"
    """`sgd` has a momentum of 0.9. `muon` takes orthogonalised steps for matrices and kernels, and AdamW steps at half
    the learning rate for embedding tables and all other weights. Both decay matrices and kernels only."""
    warmup: float = 0.1
    """Fraction of the steps in which the learning rate rises."""
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    """One cycle of learning rate and momentum, or a linear rise and a cosine to zero with constant momentum."""
    ema_decay: float = 0.0
    """Decay per step of an exponential moving average of the weights, which becomes the result; 0 keeps no average."""
    decay_at: tuple[float, ...] = ()
    """Replaces `schedule`: fractions of the steps after which the learning rate falls to a tenth."""
    clip_norm: float | None = 5.0
    """Largest norm of the gradient; None does not clip."""
    clip_value: float | None = None
    """Largest absolute value of each gradient, applied before `clip_norm`; None does not clip."""
    decay_norms: bool = True
    """Whether `adamw` decays biases and norms too."""
    rate_factors: RateFactors = field(default_factory=dict)
    """Start of parameters' names -> factor of their learning rate; 0 freezes them."""
    checkpoint_every: int = 100
    """Steps between checkpoints; a multiple of 5."""
    log_every: int = 10
    """Steps between log lines."""
    seed: int = 0
    workers: int = 1
    """Processes that train together; 0 trains inside the driver, for debugging."""
    threads: int = 0
    """PyTorch's threads in a worker on CPU; 0 for its share of the machine's cores. Small operators run best on one."""
    accumulate: int = 1
    """Parts in which a worker takes its share of a batch; their gradients are averaged, as those of so many times the
    workers would be."""
    precision: Precision = "auto"
    """`auto` is bf16 on a GPU, fp32 elsewhere; `fast` is bf16 also on CPUs with instructions for it; `fp16` scales the
    loss."""
    compile: bool = False
    """Compile the backbones with `torch.compile`, which takes minutes and pays in long runs on a GPU."""
    use_gpu: bool | None = None
    """Whether each worker has a GPU; if None, it has one where this machine, or the cluster, has or can get enough."""
    max_failures: int = 2
    """How often a lost worker is replaced before the run fails."""
    waiting_bytes: int = 256 << 20
    """Maximum bytes of decoded images that wait for one worker."""

    def __post_init__(self) -> None:
        """Check the values, some of which the streams rely on."""
        if self.steps < 1:
            raise InputError(f"steps: {self.steps}, expected at least 1")
        for name in ("learning_rate", "clip_norm", "clip_value", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name}: {value}, expected more than 0")
        if list(self.decay_at) != sorted(self.decay_at) or not all(0 < part < 1 for part in self.decay_at):
            raise InputError(f"decay_at: {self.decay_at}, expected rising fractions between 0 and 1")
        for name in ("warmup", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)}, expected 0 to less than 1")
        if self.precision not in get_args(Precision):
            raise InputError(f"precision: {self.precision}, expected one of {', '.join(get_args(Precision))}")
        for name, least in (("workers", 0), ("threads", 0), ("seed", 0), ("accumulate", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: {getattr(self, name)}, expected {least} or more")
        if self.checkpoint_every < 1 or self.checkpoint_every % STEPS_PER_BLOCK:
            raise InputError(f"checkpoint_every: {self.checkpoint_every}, expected a multiple of {STEPS_PER_BLOCK}")


def check_shared(field: str, size: int, stage: Optimisation) -> None:
    """Raise InputError where a batch cannot be shared evenly among the workers and the parts of each."""
    workers, parts = max(1, stage.workers), stage.accumulate
    if size < workers * parts or size % (workers * parts):
        each = f" times {parts} parts" if parts > 1 else ""
        raise InputError(f"{field}: {size}, expected a multiple of the {workers} workers{each}")


class Muon(muon.Muon):
    """timm's Muon with PyTorch's fused AdamW for embedding tables: an eighth of the time of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; those of tables are dropped, so that timm passes over them."""
        for group in self.param_groups:
            if group["use_fallback"]:
                self._step_tables(group)
        return super().step(closure)  # type: ignore[no-untyped-call]

    def _step_tables(self, group: dict[str, Any]) -> None:
        tables = [table for table in group["params"] if table.grad is not None]
        for table in tables:
            if not self.state[table]:
                zeros = {name: torch.zeros_like(table) for name in ("exp_avg", "exp_avg_sq")}
                self.state[table] = {"step": torch.zeros((), device=table.device), **zeros}
        names = ("exp_avg", "exp_avg_sq", "step")
        averages, squares, steps = ([self.state[table][name] for table in tables] for name in names)
        adamw(
            tables,
            [table.grad for table in tables],
            averages,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"] * group["fallback_lr_scale"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        for table in tables:
            table.grad = None


def build_optimiser(model: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum, or Muon.

    Raises:
        InputError: see `parameter_groups`.
    """
    rate, groups = settings.learning_rate, parameter_groups(model, settings)
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=rate, fused=True)
    if settings.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9)
    return Muon(groups, lr=rate, momentum=0.9, betas=(0.9, 0.999), fallback_lr_scale=0.5)


def parameter_groups(model: nn.Module, settings: Optimisation) -> list[dict[str, Any]]:
    """The model's parameters by learning rate and weight decay, for PyTorch's optimisers.

    Raises:
        InputError: no parameter's name starts with an entry of `rate_factors`.
    """
    decay_all = settings.optimiser == "adamw" and settings.decay_norms
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    unused = set(settings.rate_factors)
    for name, value in model.named_parameters():
        start = next((start for start in settings.rate_factors if name.startswith(start)), None)
        unused.discard(start or "")
        rate = settings.learning_rate * (1.0 if start is None else settings.rate_factors[start])
        decay = settings.weight_decay if decay_all or value.ndim > 1 else 0.0
        groups.setdefault((rate, decay, id(value) in tables), []).append(value)
    if unused:
        raise InputError(f"rate_factors: no parameter's name starts with {min(unused)}")
    return [
        {"params": values, "lr": rate, "weight_decay": decay, "use_fallback": is_table}  # only Muon reads the last
        for (rate, decay, is_table), values in groups.items()
    ]


def build_schedule(
    optimiser: torch.optim.Optimizer, settings: Optimisation
) -> torch.optim.lr_scheduler.OneCycleLR | torch.optim.lr_scheduler.LambdaLR:
    """The learning rate over all steps."""
    if settings.decay_at:
        return torch.optim.lr_scheduler.LambdaLR(optimiser, partial(step_factor, settings))
    if settings.schedule == "cosine":
        rising = math.ceil(settings.warmup * settings.steps)
        return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warmup_cosine(step, rising, settings.steps))
    return torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        [group["lr"] for group in optimiser.param_groups],
        total_steps=max(settings.steps, MIN_ONE_CYCLE_STEPS),
        pct_start=max(settings.warmup, 2 / settings.steps if settings.steps > MIN_ONE_CYCLE_STEPS else 0.5),
    )


def step_factor(settings: Optimisation, step: int) -> float:
    """Factor of the learning rate at a step of a schedule with `decay_at`."""
    done = step / settings.steps
    rise = 0.01 + 0.99 * done / settings.warmup if done < settings.warmup else 1.0
    return float(rise * 0.1 ** sum(done >= part for part in settings.decay_at))


def warmup_cosine(step: int, rising: int, steps: int) -> float:
    """Factor of the learning rate at a step, from 0: first (step + 1) / rising, then half a cosine to zero."""
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising)))) / 2


def moving_average(decay: float) -> Callable[[Tensor, Tensor, Tensor | int], Tensor]:
    """An exponential moving average with a lower decay in the first steps, so that the initial weights fade."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():
            return current  # a counter
        return averaged.lerp(current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return average

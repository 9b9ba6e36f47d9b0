"""Training streams: which rows come in which step.

A plan is a pure function of (seed, number of rows, position), so a stream can start at any step, on any number of
workers, and gives the same samples. Ray Data reads and decodes the images on the CPU pool; blocks hold whole steps. A
long stream is executed one window at a time, since Ray Data plans an execution block by block.

    positions --plan--> rows of a table --range reads, decode--> raw pixels --collate.py--> batches

Imports no torch, so that data tasks start fast and stay small.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from data_prep.parts import ExecutorPause

Integers = npt.NDArray[np.int64]
Batch = TypeVar("Batch")


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Integers:
    return np.random.default_rng([seed, epoch]).permutation(count)


def plan_epochs(seed: int, count: int, positions: Integers) -> Integers:
    """Rows of a table of `count` rows at the given positions of an endless stream: a new permutation every epoch."""
    rows = np.empty_like(positions)
    for epoch in np.unique(positions // count).tolist():
        inside = positions // count == epoch
        rows[inside] = _permutation(seed, epoch, count)[positions[inside] % count]
    return rows


def plan_weighted(seed: int, weights: npt.NDArray[np.float64], positions: Integers) -> Integers:
    """Rows at the given positions of an endless stream in which row i comes `weights[i]` times an epoch.

    An epoch has as many positions as the weights sum to, rounded up. Systematic resampling: a row comes in it as often
    as its share rounded down or up.
    """
    ends = np.cumsum(weights)
    count = int(np.ceil(ends[-1]))
    rows = np.empty_like(positions)
    for epoch in np.unique(positions // count).tolist():
        marks = (np.arange(count) + np.random.default_rng([seed, epoch, 2]).random()) * (ends[-1] / count)
        drawn = np.minimum(np.searchsorted(ends, marks, side="right"), len(weights) - 1)
        inside = positions // count == epoch
        rows[inside] = drawn[_permutation(seed, epoch, count)[positions[inside] % count]]
    return rows


def repeat_factors(images: Sequence[Sequence[int]], threshold: float) -> npt.NDArray[np.float64]:
    """How often each image comes in an epoch: r = max over its categories of max(1, sqrt(threshold / frequency)).

    Repeat-factor sampling (Gupta et al., 2019, LVIS) by the categories of each image; those in less than a `threshold`
    share of the images are repeated.
    """
    counts = Counter(category for categories in images for category in set(categories))
    factor_of = {key: max(1.0, (threshold * len(images) / count) ** 0.5) for key, count in counts.items()}
    return np.array([max((factor_of[key] for key in categories), default=1.0) for categories in images])


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """How a stream is cut into steps."""

    rows_per_step: int
    """Rows of all workers together in one step, a multiple of `workers`."""
    workers: int
    """Workers that share the stream; 0 reads it inside the driver."""
    steps_per_block: int = 5
    """Steps of one worker in a block; checkpoints come at multiples of it, so that a resumed stream is exact."""
    max_blocks: int = 1000
    """Largest number of blocks in a window; Ray Data plans about 800 a second."""

    def positions(self, start_step: int, stop_step: int) -> tuple[int, int, int]:
        """First position, number of positions and number of blocks of a window of a range of steps.

        Every block is whole, so the last ones may hold more steps than asked for; the training loop stops by itself.
        """
        rounds = max(1, -(-(stop_step - start_step) // self.steps_per_block))
        rounds = min(rounds, max(1, self.max_blocks // max(1, self.workers)))
        count = rounds * self.steps_per_block * self.rows_per_step
        return start_step * self.rows_per_step, count, rounds * self.workers

    def of_step(self, step: int) -> Integers:
        """Positions of a step's rows, worker by worker: each takes one block of a round."""
        workers = max(1, self.workers)
        block = self.steps_per_block if self.workers else 1
        share, (cycle, inside) = self.rows_per_step // workers, divmod(step, block)
        first = cycle * block * self.rows_per_step + inside * share
        return (first + np.arange(workers)[:, None] * block * share + np.arange(share)).ravel()


@dataclass(frozen=True)
class DriverStream:
    """A stream that is read step by step in the driver, so that a debugger reaches the loader."""

    load: Callable[[Integers], pa.Table]
    first: int
    """First position."""

    def iter_torch_batches(
        self, *, batch_size: int, collate_fn: Callable[[pa.Table], Batch], prefetch_batches: int
    ) -> Iterator[Batch]:
        """The interface of Ray Data's iterators, without an end; nothing is prefetched."""
        for start in itertools.count(self.first, batch_size):
            yield collate_fn(self.load(np.arange(start, start + batch_size)))


Stream = ray.data.Dataset | DriverStream


def stream(load: Callable[[Integers], pa.Table], shape: StreamShape, start_step: int, stop_step: int) -> Stream:
    """The rows that `load` returns for the positions of a range of steps, in order.

    Each execution of the data set, such as each pass of `iter_batches`, gives the next window.
    """
    first, count, blocks = shape.positions(start_step, stop_step)
    if not shape.workers:
        return DriverStream(load, first)
    data = ray.data.range(count, override_num_blocks=blocks)
    executed = data.context._execution_idx  # counts this context's executions, for which there is no public name

    def rows(batch: pa.Table) -> pa.Table:
        window = ray.data.DataContext.get_current()._execution_idx - executed
        return load(np.asarray(batch["id"], np.int64) + first + window * count)

    data = data.map_batches(rows, batch_format="pyarrow", batch_size=None)
    data.context.target_max_block_size = None  # a split block would move rows to other workers
    data.context.execution_options.preserve_order = True
    data.context.custom_execution_callback_classes = [ExecutorPause]
    return data

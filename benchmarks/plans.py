"""Time and memory to the first batch of a stream of 10^7 steps on 32 workers.

python benchmarks/plans.py

`make bench-train` writes the figures with its own.
"""

import logging
import time

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from measure import reset_peak, resident_mb, update_figures

from data_prep.streams.plans import StreamShape, stream

STEPS = 10**7
SHAPE = StreamShape(rows_per_step=256, workers=32)


def main() -> None:
    figures = planning()
    update_figures("train", figures)
    print(figures)


def planning() -> dict[str, float]:
    """Seconds until the first batch, and the growth of this process's peak memory."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def load(positions: npt.NDArray[np.int64]) -> pa.Table:
        return pa.table({"position": positions})

    before, started = reset_peak(), time.perf_counter()
    batch = next(iter(stream(load, SHAPE, 0, STEPS).iter_batches(batch_size=8, batch_format="pyarrow")))
    seconds, grown = time.perf_counter() - started, resident_mb("VmHWM") - before
    assert batch["position"].to_pylist() == list(range(8))
    ray.shutdown()
    return {"plan_seconds_1e7": seconds, "plan_mb_1e7": grown}


if __name__ == "__main__":
    main()

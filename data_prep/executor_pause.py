"""A pause in each turn of Ray Data's executor loop."""

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback

PAUSE_SECONDS = 0.05
"""Far less than the work on a block."""


class ExecutorPause(ExecutionCallback):
    """Pauses the executor, which would otherwise take up to a whole core from the work that it schedules.

    Its loop does not wait while there are ready blocks that limits keep it from taking.
    """

    def on_execution_step(self, executor: object) -> None:
        """Pause."""
        time.sleep(PAUSE_SECONDS)

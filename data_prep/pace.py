"""Ray Data's executor at rest."""

import time

REST_SECONDS = 0.05
"""A block of a stream is worth far more."""


class ExecutorPause:
    """An execution callback: a moment's rest in each turn of the executor's loop.

    The loop does not wait while blocks are ready that it may not take yet, and so takes up to a whole core from the
    work that it schedules.
    """

    def before_execution_starts(self, executor: object) -> None:
        """Nothing to do."""

    def on_execution_step(self, executor: object) -> None:
        """Rest."""
        time.sleep(REST_SECONDS)

    def after_execution_succeeds(self, executor: object) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Nothing to do."""

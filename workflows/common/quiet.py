"""Set-up of the worker processes of a Ray that was started on this machine; imports nothing heavy."""

import logging


def setup() -> None:
    """Log only errors, so that the console shows the job's own lines."""
    logging.disable(logging.WARNING)

"""What every worker process of a Ray on this machine runs first; it imports nothing heavy."""

import logging


def setup() -> None:
    """Leave a laptop's console to the job's own lines: of what Ray logs, only errors."""
    logging.disable(logging.WARNING)

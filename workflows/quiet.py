"""What every worker process of a local Ray runs first; it imports nothing heavy."""

import logging

CHATTY = ("ray.data._internal", "ray.train.v2._internal", "ray.serve")


def setup() -> None:
    """Keep Ray's own notes on its progress in its log files: a laptop's console shows the job's lines."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.WARNING)

"""LVIS's own evaluation package, unchanged: the reference that the other engine is held to."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ovd_models.errors import InputError
from ovd_models.metrics.records import IouType


@contextlib.contextmanager
def numpy_of_lvis() -> Iterator[None]:
    """`np.float`, which NumPy 1.24 removed and lvis 0.5.3 uses, is there while the block runs."""
    added = not hasattr(np, "float")
    if added:
        np.float = float  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if added:
            del np.float  # type: ignore[attr-defined]


def evaluate_official(truth: str, results: str, kind: IouType) -> dict[str, float]:
    """LVIS's 13 numbers of a results file, by their names.

    Args:
        truth: local path of the annotation file.
        results: local path of the results file.
        kind: boxes or masks.

    Raises:
        InputError: the package is not installed, or there is no prediction, which it cannot evaluate.
    """
    try:
        from lvis import LVIS, LVISEval, LVISResults
    except ImportError as error:
        raise InputError("--engine lvis: the package is missing, expected `pip install lvis pycocotools`") from error
    logging.getLogger("lvis").setLevel(logging.ERROR)
    rows = json.loads(Path(results).read_bytes())
    if not rows:
        raise InputError(f"{results}: no predictions, which --engine lvis cannot evaluate, expected some")
    with numpy_of_lvis():
        loaded = LVIS(truth)
        evaluator = LVISEval(loaded, LVISResults(loaded, rows), kind)
        evaluator.run()
    return {name: float(value) for name, value in evaluator.get_results().items()}

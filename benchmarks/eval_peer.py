"""LVIS's package alone, for `eval.py`: python benchmarks/eval_peer.py GROUND_TRUTH RESULTS bbox|segm."""

import json
import sys

import numpy as np
from lvis import LVIS, LVISEval, LVISResults


def main(truth: str, results: str, kind: str) -> None:
    np.float = float  # type: ignore[attr-defined]  # NumPy 1.24 removed it
    loaded = LVIS(truth)
    evaluator = LVISEval(loaded, LVISResults(loaded, results), kind)
    evaluator.run()
    print(json.dumps({name: float(value) for name, value in evaluator.get_results().items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])

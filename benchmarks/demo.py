"""Cost of `make demo`: wall time, CPU time and peak memory of all its processes.

make bench-demo
"""

import json
import sys

from measure import BENCH, REPOSITORY, measure, write_figures


def main() -> None:
    BENCH.mkdir(parents=True, exist_ok=True)
    storage = BENCH / "demo"
    command = [sys.executable, "workflows/demo.py", "--storage", str(storage)]
    cost = measure(command, log=BENCH / "demo.log", cwd=REPOSITORY, sample_seconds=5.0)
    if cost.exit_code:
        raise SystemExit(f"error: the demo exited with {cost.exit_code}, see {BENCH / 'demo.log'}")
    figures = {
        **json.loads((storage / "summary.json").read_text()),
        "wall_seconds": round(cost.wall_seconds, 1),
        "cpu_seconds": round(cost.cpu_seconds, 1),
        "peak_gb": round(cost.peak_gb, 2),
    }
    write_figures("demo", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

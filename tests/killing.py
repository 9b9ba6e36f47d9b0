"""Kills of jobs and of their processes."""

import os
import subprocess
from pathlib import Path

MOST_REPEATED = 0.05
"""Share of the work that a killed job may do again."""


def children_named(job: subprocess.Popen[str], words: str) -> list[int]:
    """Processes of the job's session whose command line holds the words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if words in (entry / "cmdline").read_text() and os.getsid(int(entry.name)) == job.pid:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found

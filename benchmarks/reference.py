"""The folder of the reference data: photographs, LVIS files, and recordings of released models."""

import os
from pathlib import Path

REFERENCE = Path(os.environ.get("OVD_REFERENCE_DATA") or Path(__file__).parents[2] / "shared")
"""`OVD_REFERENCE_DATA`, or the folder `shared` next to the checkout."""

"""The scripts that users start, and what they share."""

import os

# Idle torch threads would spin and take cores from data tasks and other trainings. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

"""Released weights of others in our models: a map of names, tensor by tensor, and why some are left out."""

import io
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovd_models.errors import InputError

Rules = Sequence[tuple[str, str]]
"""(pattern, replacement) on our whole name; the first pattern that matches gives the released name."""

BLOCK: Rules = (
    (r"conv(\d)\.weight", r"conv\1.weight"),
    (r"bn(\d)\.(.*)", r"conv\1.norm.\2"),
    (r"downsample\.0\.weight", r"shortcut.weight"),
    (r"downsample\.1\.(.*)", r"shortcut.norm.\1"),
)

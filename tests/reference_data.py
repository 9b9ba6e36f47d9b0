"""Tests that compare with the reference data are skipped where it is absent."""

import importlib.util
from types import ModuleType

import pytest
from reference import REFERENCE

PARITY = REFERENCE / "parity"
LVIS = REFERENCE / "data/lvis"
PHOTOS = REFERENCE / "data/coco_photos"


def needs(*parts: str) -> pytest.MarkDecorator:
    """Skip a test where one of these files or folders of the reference data is absent."""
    absent = [part for part in parts if not (REFERENCE / part).exists()]
    return pytest.mark.skipif(bool(absent), reason=f"OVD_REFERENCE_DATA ({REFERENCE}) lacks {', '.join(absent)}")


def load_fill() -> ModuleType:
    """The module that fills models with the weights that the recordings were made with."""
    spec = importlib.util.spec_from_file_location("parity_fill", PARITY / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

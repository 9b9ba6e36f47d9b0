"""Open-vocabulary models in PyTorch; needs neither Ray nor MLflow.

detector = ovd_models.load("runs/demo/codet")
found = detector.detect("street.jpg", ["red umbrella", "anchor"])
found.draw("found.png")
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ovd_models.checkpoints import Detector
    from ovd_models.ovsam.checkpoints import Segmenter, TextSegmenter


def load(folder: str | Path, device: str = "cpu") -> "Detector":
    """The detector of a checkpoint folder, ready for any names.

    Raises:
        InputError: the folder holds no detector checkpoint that this program reads.
    """
    from ovd_models.checkpoints import load_detector  # torch is imported only when a model is wanted

    return load_detector(folder, device)


def load_segmenter(folder: str | Path, device: str = "cpu") -> "Segmenter":
    """The segmenter of an OV-SAM checkpoint folder, ready for any prompts and names.

    Raises:
        InputError: the folder holds no OV-SAM checkpoint that this program reads.
    """
    from ovd_models.ovsam import checkpoints as checkpoints_ovsam

    return checkpoints_ovsam.load_segmenter(folder, device)


def load_text_segmenter(folder: str | Path, device: str = "cpu") -> "TextSegmenter":
    """The model of a text-to-mask checkpoint folder, ready for any names.

    Raises:
        InputError: the folder holds no such checkpoint that this program reads.
    """
    from ovd_models.ovsam import checkpoints as checkpoints_ovsam

    return checkpoints_ovsam.load_text_segmenter(folder, device)

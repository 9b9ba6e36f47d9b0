"""Open-vocabulary models in PyTorch; needs neither Ray nor MLflow.

detector = ovd_models.load("runs/demo/codet")
found = detector.detect("street.jpg", ["red umbrella", "anchor"])
found.draw("found.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovd_models.batches import Detections
    from ovd_models.detectors.region_scores import Scoring
    from ovd_models.errors import InputError
    from ovd_models.predictors import (
        Classifier,
        Detector,
        Segmenter,
        TextSegmenter,
        load,
        load_classifier,
        load_segmenter,
        load_text_segmenter,
    )
    from ovd_models.preprocess import ImageLike
    from ovd_models.segments import Prompts, Segments
    from ovd_models.vocabulary import Vocabulary

__all__ = [
    "Classifier",
    "Detections",
    "Detector",
    "ImageLike",
    "InputError",
    "Prompts",
    "Scoring",
    "Segmenter",
    "Segments",
    "TextSegmenter",
    "Vocabulary",
    "load",
    "load_classifier",
    "load_segmenter",
    "load_text_segmenter",
]

_MODULES = {
    "Detections": "batches",
    "ImageLike": "preprocess",
    "InputError": "errors",
    "Prompts": "segments",
    "Scoring": "detectors.region_scores",
    "Segments": "segments",
    "Vocabulary": "vocabulary",
}
"""Modules of the public names; all others are in `predictors`."""

if not TYPE_CHECKING:  # else type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """A public name, imported at its first use (PEP 562): `import ovd_models` takes milliseconds, torch seconds."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'predictors')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

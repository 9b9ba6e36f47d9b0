"""Trained models of any method by folder, URI or name in MLflow; imports neither torch nor MLflow before it must.

detector = models.load("models:/ovd-codet-pictograms@champion", "runs/demo")
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import ovd_models
from data_prep import storage
from ovd_models.checkpoint_info import read_info
from ovd_models.errors import InputError

if TYPE_CHECKING:
    from ovd_models.predictors import Classifier, Detector, Segmenter, TextSegmenter

    Predictor: TypeAlias = Detector | Segmenter | TextSegmenter | Classifier

MODEL_SCHEME = "models:/"
LOADERS: Mapping[str, str] = {
    "codet": "load",
    "vild": "load",
    "ovsam": "load_segmenter",
    "text_to_mask": "load_text_segmenter",
    "clip": "load_classifier",
}
"""Functions of `ovd_models` by method."""


def load(uri: str, storage_uri: str = "store", device: str = "auto") -> "Predictor":
    """The model of a checkpoint, ready for any names: a detector, an OV-SAM, a text-to-mask model or a CLIP.

    Args:
        uri: a folder, a URI such as `s3://bucket/model`, or `models:/<name>@<alias>` or `models:/<name>/<version>`.
        storage_uri: storage whose MLflow has the model of a `models:/` URI.
        device: such as `cuda`; `auto` is a GPU if there is one.

    Raises:
        InputError: there is no such checkpoint or device.
    """
    folder = local_model(uri, storage_uri)
    predictor: Predictor = getattr(ovd_models, LOADERS[method_of(folder)])(folder, device)
    return predictor


def local_model(uri: str, storage_uri: str = "store") -> Path:
    """The local folder of a checkpoint, downloaded if it is elsewhere; arguments as for `load`.

    Raises:
        InputError: there is no such checkpoint.
    """
    if not uri:
        raise InputError("--model: missing, expected a checkpoint folder or models:/<name>@<alias>")
    if not uri.startswith(MODEL_SCHEME):
        return storage.local_folder(uri)
    from workflows.common import registry  # MLflow takes seconds to import

    return registry.model_folder(uri, storage_uri)


def borrow_model(uri: str, storage_uri: str = "store") -> AbstractContextManager[Path]:
    """As `local_model`, but a downloaded copy is deleted after the block: processes of Ray may end without cleaning up.

    Raises:
        InputError: there is no such checkpoint.
    """
    if not uri.startswith(MODEL_SCHEME):
        return storage.borrow_folder(uri)
    from workflows.common import registry  # MLflow takes seconds to import

    return registry.borrow_model(uri, storage_uri)


def method_of(folder: Path) -> str:
    """The method of a checkpoint folder.

    Raises:
        InputError: the folder holds no checkpoint, or one of a method that answers nothing by itself, as a SAM.
    """
    method = "clip" if (folder / "clip.json").is_file() else read_info(folder).method
    if method not in LOADERS:
        raise InputError(f"{folder}: a checkpoint of method {method!r}, expected one of {', '.join(LOADERS)}")
    return method

"""Where the models of an endpoint come from; imports neither torch nor MLflow before they are needed."""

from pathlib import Path

from data_prep import storage
from ovd_models.checkpoint_info import read_info
from ovd_models.errors import InputError

METHODS = ("codet", "vild", "ovsam", "text_to_mask", "clip")
"""Methods that are served."""
MODEL_SCHEME = "models:/"


def parse_models(text: str) -> dict[str, str]:
    """Names and URIs of `URI` or `NAME=URI,NAME=URI`; a model without a name bears that of its method.

    Raises:
        InputError: there is no URI, or two models have one name.
    """
    models: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, separator, uri = entry.partition("=")
        if not separator or not name.replace("-", "").replace("_", "").isalnum():
            name, uri = "", entry
        if name in models:
            raise InputError(f"--model {text}: two models named {name!r}, expected NAME=URI with different names")
        models[name] = uri
    if not models:
        raise InputError("--model: missing, expected a checkpoint folder or models:/<name>@<alias>")
    return models


def method_of(folder: Path) -> str:
    """The method of a checkpoint folder.

    Raises:
        InputError: the folder holds no checkpoint, or one of a method that is not served.
    """
    method = "clip" if (folder / "clip.json").is_file() else read_info(folder).method
    if method not in METHODS:
        raise InputError(f"{folder}: a checkpoint of method {method!r}, expected one of {', '.join(METHODS)}")
    return method


def local_folder(uri: str, storage_uri: str) -> Path:
    """The local folder of a checkpoint given as a folder, a URI, or `models:/<name>@<alias>`.

    Raises:
        InputError: there is no such checkpoint.
    """
    if not uri.startswith(MODEL_SCHEME):
        return storage.local_folder(uri)
    from workflows.common import registry  # MLflow takes seconds to import

    return registry.model_folder(uri, storage_uri)


def resolve_version(uri: str, storage_uri: str) -> tuple[str, str]:
    """The version of a registered model at the moment, and the MLflow run that made it; empty for others.

    Raises:
        InputError: there is no such model.
    """
    if not uri.startswith(MODEL_SCHEME):
        return "", ""
    from workflows.common import registry  # MLflow takes seconds to import

    resolved = registry.resolve_model(uri, storage_uri)
    return resolved.version, resolved.run_id


def check_models(model: str, storage_uri: str) -> None:
    """Check the checkpoints before any work; in a replica the error would be a failed deployment.

    Raises:
        InputError: there is no such checkpoint, its method is not served, or two models have one name.
    """
    names: set[str] = set()
    for name, uri in parse_models(model).items():
        method = method_of(local_folder(uri, storage_uri))
        if (name or method) in names:
            raise InputError(
                f"--model {model}: two models named {name or method!r}, expected NAME=URI with different names"
            )
        names.add(name or method)

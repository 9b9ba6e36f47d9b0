"""Where the models of an endpoint come from; imports neither torch nor MLflow before they are needed."""

from ovd_models.errors import InputError
from workflows.common.models import MODEL_SCHEME, borrow_model, method_of


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
        with borrow_model(uri, storage_uri) as folder:
            method = method_of(folder)
        if (name or method) in names:
            raise InputError(
                f"--model {model}: two models named {name or method!r}, expected NAME=URI with different names"
            )
        names.add(name or method)

"""Checkpoints in MLflow: logged models of their runs, and versions of registered models."""

import atexit
import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovd_models.checkpoint_info import folder_digest
from ovd_models.errors import InputError
from workflows.common import quiet, tracking
from workflows.common.tracking import TrackedRun

# After `tracking`, which sets what MLflow reads while it is imported.
import mlflow.artifacts  # isort: skip
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric  # isort: skip
from mlflow.exceptions import MlflowException  # isort: skip
from mlflow.tracking import MlflowClient  # isort: skip
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS  # isort: skip
from mlflow.utils.uri import is_local_uri  # isort: skip

CHAMPION = "champion"


def register(tracked: TrackedRun, folder: Path, *, method: str, data_set: str, metric: str, value: float) -> None:
    """Store a checkpoint folder as a logged model of its run, and register it as `ovd-<method>-<data set>`.

    The model is linked to the run and to its `eval/` metrics. The best version gets the alias `champion`. A call that
    is repeated, since an answer of the server was lost, goes on with the run's version of the same files.

    Args:
        tracked: the run that made the checkpoint.
        folder: the checkpoint.
        method: such as `codet`.
        data_set: that it was trained on.
        metric: the data set's headline metric, higher is better.
        value: this checkpoint's. Versions measured by another metric do not compete with it.
    """
    client, name, digest = tracked.client, f"ovd-{method}-{data_set}", folder_digest(folder)
    known = client.search_model_versions(f"run_id = '{tracked.run_id}'")
    version = next((each for each in known if (each.name, each.tags.get("digest")) == (name, digest)), None)
    if version is None:
        model = _log_model(tracked, folder, name, method)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(
            name,
            source=str(model.artifact_location),
            run_id=tracked.run_id,
            tags={"metric": metric, "value": repr(float(value)), "digest": digest, "model": str(model.model_id)},
            model_id=str(model.model_id),
        )
    versions = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(version.tags["model"], {MLFLOW_MODEL_VERSIONS: versions})  # the UI's link to it
    best = _champion(client, name)
    beaten = best is None or not _same_metric(best.tags, metric) or float(value) > float(best.tags["value"])
    if beaten and not math.isnan(value):
        client.set_registered_model_alias(name, CHAMPION, version.version)


def _log_model(tracked: TrackedRun, folder: Path, name: str, method: str) -> LoggedModel:
    """Store a checkpoint folder as a logged model with the run's `eval/` metrics."""
    client = tracked.client
    run = client.get_run(tracked.run_id)
    model = client.create_logged_model(run.info.experiment_id, name, tracked.run_id, model_type=method)
    model_id = str(model.model_id)
    client.log_model_artifacts(model_id, str(folder))
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    last = [client.get_metric_history(tracked.run_id, key)[-1] for key in run.data.metrics if key.startswith("eval/")]
    if last:  # with the same time they are no new values of the run
        metrics = [Metric(each.key, each.value, each.timestamp, each.step, model_id=model_id) for each in last]
        client.log_batch(tracked.run_id, metrics=metrics)
    client.log_outputs(tracked.run_id, [LoggedModelOutput(model_id, max((each.step for each in last), default=0))])
    return model


@dataclass(frozen=True)
class Resolved:
    """A version that a `models:/` URI names at the moment."""

    name: str
    version: str
    run_id: str
    """The MLflow run that made it; empty if unknown."""
    source: str
    """URI of its files."""


def resolve_model(uri: str, storage_uri: str = "store") -> Resolved:
    """The version that `models:/<name>@<alias>` or `models:/<name>/<version>` names at the moment.

    Args:
        uri: of the model.
        storage_uri: decides where runs are tracked, see `tracking.tracking_uri`.

    Raises:
        InputError: no such model, version or alias, or the URI is malformed.
    """
    uri_of_runs = tracking.tracking_uri(storage_uri)
    parsed = re.fullmatch(r"models:/([^@]+)(?:@(.+)|/([^@/]+))", uri)
    if parsed is None:
        raise InputError(f"{uri}: not a model URI, expected models:/<name>@<alias> or models:/<name>/<version>")
    name, alias, version = parsed.groups()
    folder = tracking.local_folder(storage_uri)
    if uri_of_runs.startswith("sqlite") and folder is not None and "MLFLOW_TRACKING_URI" not in os.environ:
        database = folder / "mlflow.db"
        if not database.exists():  # opening it would create it
            raise InputError(f"{uri}: no registered models, {database} does not exist")
        tracking.follow_storage(storage_uri)
    with _as_missing(uri, uri_of_runs):
        client = MlflowClient(uri_of_runs)
        if alias:
            version = client.get_model_version_by_alias(name, alias).version
        run_id = client.get_model_version(name, version).run_id or ""
        return Resolved(name, str(version), run_id, client.get_model_version_download_uri(name, version))


def model_folder(uri: str, storage_uri: str = "store") -> Path:
    """The local folder of a registered checkpoint, or a copy that is deleted when this process ends.

    Raises:
        InputError: no such model, version or alias, or the URI is malformed; see `resolve_model`.
    """
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(borrow_model(uri, storage_uri))


@contextlib.contextmanager
def borrow_model(uri: str, storage_uri: str = "store") -> Iterator[Path]:
    """The local folder of a registered checkpoint, or a copy that is deleted after the block.

    Raises:
        InputError: no such model, version or alias, or the URI is malformed; see `resolve_model`.
    """
    source, uri_of_runs = resolve_model(uri, storage_uri).source, tracking.tracking_uri(storage_uri)
    with contextlib.ExitStack() as stack:
        copy = None
        if not is_local_uri(source, is_tracking_or_registry_uri=False):  # type: ignore[no-untyped-call]
            copy = stack.enter_context(tempfile.TemporaryDirectory(prefix="ovd-", ignore_cleanup_errors=True))
        with _as_missing(uri, uri_of_runs):
            folder = mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=copy, tracking_uri=uri_of_runs)
        yield Path(folder)


@contextlib.contextmanager
def _as_missing(uri: str, uri_of_runs: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(quiet.hide_logins(f"{uri}: not found in {uri_of_runs} ({reason})")) from error


def _same_metric(tags: Mapping[str, str], metric: str) -> bool:
    """Whether a version was ranked by the metric, under this prefix or another."""
    return tags.get("metric", "").rpartition("/")[2] == metric.rpartition("/")[2]


def _champion(client: MlflowClient, name: str) -> Any:
    """The model version with the alias, or None."""
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # an outage is no "none"
            raise
        return None

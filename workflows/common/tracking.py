"""Runs in MLflow; `registry.py` has the models. No other file imports MLflow.

The driver opens a run with `run(...)`; rank 0 of a training job writes its losses through a `MetricLogger`, which
travels to the worker. Local storage needs no server: everything lies in `<storage>/mlflow.db` and
`<storage>/mlartifacts`.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import ray
from pyarrow import fs

from data_prep import locks, storage, tables
from ovd_models.errors import InputError
from workflows.common import outbox, quiet
from workflows.common.outbox import Delivery, Outbox

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reads it while it is imported
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # then `Outbox` tries again
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # or it names every table of a new database

from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, RunInfo, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

DataContext = Literal["training", "evaluation"]
"""What a run does with a data set."""
PARAMS_PER_REQUEST, METRICS_PER_REQUEST, PARAM_CHARACTERS = 100, 1000, 6000
"""MLflow's limits."""
OUTAGES = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
"""Error codes of a server that does not answer, as of one that is not there."""
KEY_TAG, PROCESS_TAG, NOTE_TAG = "run", "process", "mlflow.note.content"
"""Tags of a run: what it is continued by, the process that writes it, and its description."""
ARTIFACTS = "mlartifacts"
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's database that hold URIs of artifacts."""
SERVER = "http://127.0.0.1:5000"
"""Of `mlflow ui`."""


def tracking_uri(storage_uri: str) -> str:
    """Where runs on this storage are tracked: `MLFLOW_TRACKING_URI` if set, else a database in the storage folder.

    Raises:
        InputError: the storage is remote, where no database file can lie, and the variable is not set.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    folder = local_folder(storage_uri)
    if folder is None:
        raise InputError(f"--storage {storage_uri}: not a local folder, expected MLFLOW_TRACKING_URI to be set")
    path = str(folder / "mlflow.db").replace("%", "%25").replace("?", "%3F")  # MLflow unquotes it
    return f"sqlite:///{path}"


def page_of(experiment_id: str, server: str = SERVER) -> str:
    """MLflow's page with the runs of an experiment; by itself it opens one for agents."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}?workflowType=machine_learning"


def how_to_open(uri: str, experiment_id: str) -> str:
    """How a person looks at the runs of an experiment: a server's page, or the command and the page of a database."""
    uri = quiet.hide_logins(uri)
    if uri.startswith(("http://", "https://")):
        return page_of(experiment_id, uri)
    program = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return f"{shlex.join([program, 'ui', '--backend-store-uri', uri])}   then {page_of(experiment_id)}"


def check_server(storage_uri: str) -> None:
    """Check before any work that runs on this storage can be tracked.

    Raises:
        InputError: see `tracking_uri`, or `MLFLOW_TRACKING_URI` names a server that does not answer.
    """
    uri = tracking_uri(storage_uri)
    if uri.startswith("http"):
        try:
            MlflowClient(uri).search_experiments(max_results=1)
        except MlflowException as error:
            raise _no_tracking(uri, error) from error


def _no_tracking(uri: str, error: MlflowException) -> InputError:
    return InputError(quiet.hide_logins(f"{uri}: no MLflow tracking there ({str(error).splitlines()[0]})"))


class MetricLogger:
    """Writes metrics of an open run from another process; pickles to a few bytes.

    Nothing leaves the process until `flush`, which a training loop calls after its checkpoint is committed: steps
    that a crash undoes are then never logged, and repeated steps are logged once.

    Example:
        >>> logger.log({"train/loss": 0.7}, step=20)
        >>> ray.train.report(metrics, checkpoint=checkpoint)
        >>> logger.flush(until=20)
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._buffer: list[Metric] = []
        self._pictures: list[tuple[PIL.Image.Image, str, int]] = []
        self._sent: list[Delivery] = []
        self._open: tuple[MlflowClient, Outbox] | None = None

    def __reduce__(self) -> tuple[type["MetricLogger"], tuple[str, str]]:
        """Pickle without unsent metrics and open connections."""
        return MetricLogger, (self.uri, self.run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add the metrics of a step."""
        self._buffer.extend(_metrics(metrics, step))

    def log_image(self, image: PIL.Image.Image, name: str, step: int) -> None:
        """Add a picture of a series that MLflow shows with a slider."""
        self._pictures.append((image, name, step))

    def flush(self, *, until: int | None = None, wait: bool = False) -> None:
        """Send what was added, in the background unless `wait`; a loop's last flush should wait.

        Args:
            until: the last step to send; all if None.
            wait: whether to return only when everything is sent.

        Raises:
            MlflowException: on `wait`, the tracking server refused something sent since the last one.
        """
        if self._open is None:
            if not (self._buffer or self._pictures):
                return  # opening the database of a new storage takes seconds
            self._open = MlflowClient(self.uri), open_outbox(self.uri)
        client, outgoing = self._open
        limit = math.inf if until is None else until
        due = [metric for metric in self._buffer if metric.step <= limit]
        for start in range(0, len(due), METRICS_PER_REQUEST):
            part = due[start : start + METRICS_PER_REQUEST]
            self._sent.append(outgoing.put(partial(client.log_batch, self.run_id, metrics=part, synchronous=True)))
        self._buffer = [metric for metric in self._buffer if metric.step > limit]
        for image, name, step in self._pictures:
            if step <= limit:
                outgoing.put(partial(client.log_image, self.run_id, image, key=name, step=step))
        self._pictures = [picture for picture in self._pictures if picture[2] > limit]
        while wait and self._sent:
            self._sent.pop(0).result()


def open_outbox(uri: str) -> Outbox:
    """An outbox for calls to the tracking server."""
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # warns of every attempt
    patience = outbox.END_SECONDS if uri.startswith(("http", "databricks")) else outbox.FILE_END_SECONDS
    return Outbox(f"MLflow at {quiet.hide_logins(uri)}", is_outage, patience)


def is_outage(error: Exception) -> bool:
    """Whether an error of a call means that the server or its storage is away."""
    if isinstance(error, MlflowException):
        return error.error_code in OUTAGES
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)


@dataclass(frozen=True)
class TrackedRun:
    """An open run, written to by the driver."""

    uri: str
    """Tracking URI."""
    run_id: str
    experiment_id: str
    artifact_uri: str
    client: MlflowClient = field(repr=False)
    outbox: Outbox = field(repr=False)
    """Takes calls, which then may wait for the server."""

    def logger(self) -> MetricLogger:
        """A logger with which a worker writes this run's metrics."""
        return MetricLogger(self.uri, self.run_id)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics immediately."""
        self.outbox.send(partial(self.client.log_batch, self.run_id, metrics=_metrics(metrics, step)))

    def log_image(self, image: PIL.Image.Image | np.ndarray, name: str, step: int | None = None) -> None:
        """Log a picture: the file `name`.jpg or, with a step, one of a series that MLflow shows with a slider."""
        if step is None:
            self.outbox.send(partial(self.client.log_image, self.run_id, image, artifact_file=f"{name}.jpg"))
        else:
            self.outbox.send(partial(self.client.log_image, self.run_id, image, key=name, step=step))

    def log_pictures(self, images: Sequence[PIL.Image.Image], prefix: str) -> None:
        """Log numbered pictures below `prefix`."""
        for number, image in enumerate(images):
            self.log_image(image, f"{prefix}/picture_{number:02d}")

    def log_table(self, columns: Mapping[str, Sequence[object]], path: str) -> None:
        """Log a table that MLflow can compare between runs; `path` ends in `.json`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pandas', on MLflow's use of it
            table = {name: list(values) for name, values in columns.items()}
            self.outbox.send(partial(self.client.log_table, self.run_id, table, path))

    def log_data_set(self, storage_uri: str, table: tables.TableName, name: str, context: DataContext) -> None:
        """Log a table as an input of the run; again does nothing.

        Raises:
            InputError: there is no such table.
        """
        manifest, uri = tables.read_manifest(storage_uri, table, name), tables.table_uri(storage_uri, table, name)
        data_set = Dataset(
            name=f"{table}/{name}",
            digest=manifest.digest,
            source_type="table",
            source=json.dumps({"uri": storage.absolute(uri)}),
            profile=json.dumps({"rows": manifest.rows}),
        )
        entry = DatasetInput(data_set, [InputTag("mlflow.data.context", context)])
        self.outbox.send(partial(self.client.log_inputs, self.run_id, [entry]))

    def log_text(self, text: str, path: str) -> None:
        """Log a text file."""
        self.outbox.send(partial(self.client.log_text, self.run_id, text, path))

    def describe(self, text: str) -> None:
        """Set the description, in Markdown, unless there is one."""
        if NOTE_TAG not in self.client.get_run(self.run_id).data.tags:
            self.client.set_tag(self.run_id, NOTE_TAG, text)

    def link_to(self, key: str) -> str:
        """A link in Markdown to the run with a key, in any experiment; empty if there is none."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        found = self.client.search_runs(experiments, f"tags.{KEY_TAG} = '{key}'", max_results=1) if key else []
        return "".join(
            f"[{run.info.run_name}](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})" for run in found
        )


def metric_history(uri: str, run_id: str, prefix: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of every metric of a run whose name starts with `prefix`, in order of their steps."""
    client = MlflowClient(uri)
    names = sorted(name for name in client.get_run(run_id).data.metrics if name.startswith(prefix))
    return {
        name: sorted((entry.step, entry.value) for entry in client.get_metric_history(run_id, name)) for name in names
    }


@contextlib.contextmanager
def run(
    storage_uri: str,
    *,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str] | None = None,
    key: str = "",
) -> Iterator[TrackedRun]:
    """Start or continue a run that ends with the block.

    Its status is then FINISHED, FAILED after an exception, or KILLED after Ctrl-C or `ray job stop`. Runs of processes
    that ended without this are ended as KILLED, see `end_dead_runs`.

    Args:
        storage_uri: where the job keeps its files; decides where the run is tracked.
        experiment: the data set's name.
        name: of the run, see `descriptions.run_name`.
        params: `cli.flatten(run)`.
        tags: digests of the data sets, and what else a search should find; git commit and Ray job are added.
        key: a run of the experiment that was started with the same key, if not empty, is continued: the parameters
            that it began with stay.

    Raises:
        InputError: see `tracking_uri`, or the experiment was deleted.
    """
    uri = tracking_uri(storage_uri)
    client, experiment_id = _open(uri, storage_uri, experiment)
    end_dead_runs(client, storage_uri)
    own_tags = {"mlflow.source.name": sys.argv[0], PROCESS_TAG: locks.Holder.this_process().to_json()}
    keys = {KEY_TAG: key} if key else {}
    all_tags = {**own_tags, **keys, **_git_tags(), **_ray_tags(), **(tags or {})}
    info = _start(client, experiment_id, name, params, all_tags)
    tracked = TrackedRun(uri, info.run_id, str(info.experiment_id), str(info.artifact_uri), client, open_outbox(uri))
    status = RunStatus.FAILED
    try:
        yield tracked
        status = RunStatus.FINISHED
    except (KeyboardInterrupt, SystemExit):
        status = RunStatus.KILLED
        raise
    finally:
        tracked.outbox.send(partial(client.set_terminated, tracked.run_id, RunStatus.to_string(status)))
        tracked.outbox.wait()


def local_folder(storage_uri: str) -> Path | None:
    """The storage's folder if it is on this machine, else None."""
    filesystem, path = storage.resolve(storage_uri)
    return Path(path) if isinstance(filesystem, fs.LocalFileSystem) else None


def _open(uri: str, storage_uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client, and the experiment's id.

    The first client of a new database creates its tables, and several at once fail: drivers go in turn.

    Raises:
        InputError: there is no tracking, or the experiment was deleted.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    quiet.hide_storage_failures("mlflow.store.db.utils")
    folder = local_folder(storage_uri)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / ".mlflow.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            follow_storage(storage_uri)
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            if found is None:
                _create_experiment(client, uri, storage_uri, experiment)
                found = client.get_experiment_by_name(experiment)
        except MlflowException as error:
            raise _no_tracking(uri, error) from error
        if found is None or found.lifecycle_stage != LifecycleStage.ACTIVE:
            restore = f"MLFLOW_TRACKING_URI={shlex.quote(quiet.hide_logins(uri))} mlflow experiments restore"
            key = "ID" if found is None else found.experiment_id
            raise InputError(
                f"MLflow experiment {experiment!r}: deleted, expected it back (`{restore} --experiment-id {key}`) or "
                f"gone for good (`mlflow gc`)"
            )
        return client, str(found.experiment_id)


def _create_experiment(client: MlflowClient, uri: str, storage_uri: str, experiment: str) -> None:
    """Create an experiment, unless another job was faster."""
    location = None  # a server has its own
    if not uri.startswith(("http", "databricks")):
        folder = local_folder(storage_uri)
        location = (folder / ARTIFACTS).as_uri() if folder else storage.join(storage_uri, ARTIFACTS)
        location = f"{location}/{experiment}"
    try:
        client.create_experiment(experiment, location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def follow_storage(storage_uri: str) -> None:
    """Let the database of a copied or renamed storage name the artifacts that lie beside it.

    MLflow records absolute locations. Without this, a copy would write to the original's artifacts.
    """
    folder = local_folder(storage_uri)
    if folder is None or "MLFLOW_TRACKING_URI" in os.environ or not (folder / "mlflow.db").is_file():
        return
    own = f"{(folder / ARTIFACTS).as_uri()}/"
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db", timeout=60)) as database, database:
        known = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        recorded = database.execute("SELECT artifact_location FROM experiments") if "experiments" in known else ()
        roots = {"".join(str(location).rpartition(f"/{ARTIFACTS}/")[:2]) for (location,) in recorded}
        for root in roots:
            if root.startswith("file:") and root != own:
                for table, column in LOCATIONS:
                    change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
                    database.execute(change, (own, len(root) + 1, len(root), root))


def _start(
    client: MlflowClient, experiment_id: str, name: str, params: Mapping[str, object], tags: Mapping[str, str]
) -> RunInfo:
    """The run of the experiment with the same key, running again, or a new one."""
    key = tags.get(KEY_TAG)
    found = client.search_runs([experiment_id], f"tags.{KEY_TAG} = '{key}'", max_results=1) if key else []
    if found:
        (run,) = found
        client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        client.update_run(run.info.run_id, status=RunStatus.to_string(RunStatus.RUNNING))
    else:
        run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
    entries = [Param(key, str(value)[:PARAM_CHARACTERS]) for key, value in params.items() if key not in run.data.params]
    for start in range(0, len(entries), PARAMS_PER_REQUEST):
        client.log_batch(run.info.run_id, params=entries[start : start + PARAMS_PER_REQUEST])
    return run.info


def end_dead_runs(client: MlflowClient, storage_uri: str) -> None:
    """End the running runs whose process has ended, as KILLED.

    These are runs of processes of this machine, and trainings on this storage whose lock nobody holds.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, "attributes.status = 'RUNNING'") if experiments else []:
        holder = locks.Holder.parse(run.data.tags.get(PROCESS_TAG, ""))
        job = f"runs/{run.data.tags.get(KEY_TAG, '')}"
        is_here = KEY_TAG in run.data.tags and storage.exists(storage.join(storage_uri, job))
        if holder is not None and (holder.is_dead() or (is_here and locks.is_free(storage_uri, job))):
            with contextlib.suppress(MlflowException):  # another user's
                client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.KILLED))


def _metrics(metrics: Mapping[str, float], step: int) -> list[Metric]:
    now = time.time_ns() // 1_000_000
    return [Metric(name, float(value), now, step) for name, value in metrics.items()]


def git_state() -> tuple[str, bool]:
    """The git commit of this code, empty without a repository, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "", False
    commit, _, dirty = found.stdout.strip().partition("-")
    return commit, bool(dirty)


def _git_tags() -> dict[str, str]:
    commit, differs = git_state()
    return {"mlflow.source.git.commit": commit, "git_dirty": str(differs).lower()} if commit else {}


def _ray_tags() -> dict[str, str]:
    return {"ray_job_id": ray.get_runtime_context().get_job_id()} if ray.is_initialized() else {}

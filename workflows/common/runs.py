"""A training run from its opening to its end: folder, inputs, tracking, stage times, checkpoint, results."""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from pyarrow import fs

from data_prep import locks, storage, tables
from ovd_models.checkpoint_info import CALIBRATION, SOURCE, read_source, write_calibration
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics
from workflows.common import cli, descriptions, registry, tracking, training
from workflows.common.optimisation import Optimisation
from workflows.common.tracking import TrackedRun
from workflows.common.training import Stage

FREE_SETTINGS = {
    *("storage", "resume", "teacher", "sam", "backbone_weights"),
    *("data", "held_out", "distill_images"),  # the tables that they make are inputs
    *("use_gpu", "wait_minutes", "max_failures", "log_every", "waiting_bytes", "dry_run"),
}
"""Fields that may differ when a run is resumed."""
STARTS = ("box_model", "proposals", "teacher", "sam", "backbone_weights", "pretrained")
"""Fields that may name a released file, or a folder that was converted from some."""
SHORT_STEPS = 100
"""Trainings of fewer steps are trials."""
M = TypeVar("M")
N = TypeVar("N")
R = TypeVar("R", bound="TrainingConfig")


class TrainingConfig(Protocol):
    """What every training's `Run` has."""

    @property
    def storage(self) -> str:
        """Folder or URI that holds tables and runs."""

    @property
    def config(self) -> str:
        """Name of the config."""

    @property
    def wait_minutes(self) -> float:
        """Minutes to wait for a cluster that grows."""

    @property
    def resume(self) -> str:
        """Name of the run to continue, or empty."""

    @property
    def dry_run(self) -> bool:
        """Whether it only measures some steps."""

    @property
    def stages(self) -> Mapping[str, Optimisation]:
        """The stages that are trained, by their fields."""


@dataclass(frozen=True, kw_only=True)
class Trained(Generic[M]):
    """Results of a training."""

    model: str
    """Folder or URI of the checkpoint."""
    metrics: M
    seconds: Mapping[str, float]
    """Time of each stage."""
    run_id: str
    """MLflow's."""
    experiment_id: str
    """MLflow's."""
    outputs: Mapping[str, str]
    """Further checkpoints and tables by name."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Generic[M]):
    """Results of an evaluation, and the metric by which checkpoints compete."""

    metrics: M
    headline: str
    """The headline metric's name in MLflow; higher is better."""
    value: float
    threshold: float | None = None
    """The score above which a detector's F1 is best."""

    def of(self, metrics: N) -> "Evaluation[N]":
        """The same headline with other metrics."""
        return Evaluation(metrics=metrics, headline=self.headline, value=self.value, threshold=self.threshold)


@dataclass(frozen=True, kw_only=True)
class ActiveRun:
    """An open training run."""

    workflow: str
    data_set: str
    """Name of the data set that it trains on."""
    folder: str
    """Folder or URI of its checkpoints."""
    tracked: TrackedRun
    wait_minutes: float
    """Minutes to wait for a cluster that grows."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each finished stage."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Further checkpoints and tables by name."""
    stages: list[Stage] = field(default_factory=list)
    """The stages so far."""
    stored: dict[str, str] = field(default_factory=dict)
    """Where other machines find the checkpoints that are in local folders."""

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Record the block's time as that of a stage."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def stage(self, name: str, settings: Optimisation) -> Stage:
        """The next stage, with a folder and progress lines under its name."""
        stage = Stage(
            job=f"{self.workflow} {name}",
            name=name,
            settings=settings,
            folder=storage.join(self.folder, name),
            first_step=self.last_step,
            wait_minutes=self.wait_minutes,
        )
        self.stages.append(stage)
        return stage

    @property
    def last_step(self) -> int:
        """Steps of all stages so far."""
        return sum(stage.settings.steps for stage in self.stages)

    def save(self, name: str, write: Callable[[Path], object]) -> str:
        """Write a checkpoint folder to the run's folder; returns its URI."""
        target = storage.join(self.folder, name)
        with tempfile.TemporaryDirectory() as local:
            write(Path(local))
            storage.upload_folder(Path(local), target)
        return target

    def finish(self, write: Callable[[Path], object], evaluate: Callable[[str], Evaluation[M]]) -> Trained[M]:
        """Save the final checkpoint, evaluate it and register it.

        Args:
            write: writes the checkpoint folder.
            evaluate: evaluates and logs the checkpoint at a local folder.
        """
        model = storage.join(self.folder, "model")
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            storage.upload_folder(Path(folder), model)
            self.stored[folder] = model
            with self.timing("evaluate"):  # the local copy, which need not be downloaded again
                found = evaluate(folder)
                if found.threshold is not None:
                    write_calibration(folder, found.threshold, self.data_set)
                    storage.write_bytes(storage.join(model, CALIBRATION), Path(folder, CALIBRATION).read_bytes())

                def register() -> None:
                    registry.register(
                        self.tracked,
                        Path(folder) if Path(folder).is_dir() else storage.local_folder(model),
                        method=self.workflow,
                        data_set=self.data_set,
                        metric=found.headline,
                        value=found.value,
                    )

                self.tracked.outbox.send(register)
        return Trained(
            model=model,
            metrics=found.metrics,
            seconds=self.seconds,
            outputs=self.outputs,
            run_id=self.tracked.run_id,
            experiment_id=self.tracked.experiment_id,
        )


@contextlib.contextmanager
def open_run(
    run: TrainingConfig,
    workflow: str,
    *,
    title: str = "",
    data_set: str,
    tables_read: Mapping[tables.TableName, str],
    inputs: Mapping[str, str],
    stages: Sequence[Optimisation],
) -> Iterator[ActiveRun]:
    """Open or resume a training run: its folder, held to its inputs, with Ray started and MLflow tracking it.

    Args:
        run: the resolved config.
        workflow: such as `codet`.
        title: name in MLflow, see `descriptions.run_name`.
        data_set: name of the data set, which is that of the experiment and in that of the registered model.
        tables_read: table -> name of each table that the training reads.
        inputs: ids of further inputs, such as the teacher's.
        stages: settings of the stages that it trains.

    Raises:
        InputError: the run to resume or a table is missing, an input differs from the resumed run's, or another
            process works on the run.
    """
    folder = run_folder(run.storage, workflow, run.config, run.resume)
    digests: dict[str, str] = {
        table: tables.read_manifest(run.storage, table, name).digest for table, name in tables_read.items()
    }
    name = storage.base_name(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locks.hold(run.storage, f"runs/{workflow}/{name}"))
        storage.remove_temporary(folder)
        hold_to_settings(folder, cli.flatten(run))
        hold_to_inputs(folder, {**digests, **inputs})
        training.start_ray_for(*stages, wait_minutes=run.wait_minutes)
        tracked = stack.enter_context(
            tracking.run(
                run.storage,
                experiment=data_set,
                name=title or f"{workflow} {run.config}",
                params=cli.flatten(run),
                tags={"method": workflow, **digests, "source": released_source(run)},
                key=f"{workflow}/{name}",
            )
        )
        tracked.log_text(cli.to_json(run), "run.json")
        for table, table_name in tables_read.items():
            tracked.log_data_set(run.storage, table, table_name, "training")
        teacher = str(getattr(run, "teacher", ""))
        teacher_run = tracked.link_to(descriptions.teacher_key(teacher))
        tracked.describe(descriptions.description(storage.join(folder, "model"), teacher, teacher_run))
        yield ActiveRun(
            workflow=workflow, data_set=data_set, folder=folder, tracked=tracked, wait_minutes=run.wait_minutes
        )


def released_source(run: TrainingConfig) -> str:
    """The released files that a run starts from, as `FIELD NAME sha256:DIGEST`; empty if there are none."""
    found: dict[str, str] = {}
    for name in STARTS:
        given = str(getattr(run, name, "")).removesuffix("/text")  # a detector's own encoder
        if not given or given in found:
            continue
        if storage.is_file(given):
            found[given] = f"{name} {storage.base_name(given)} sha256:{storage.file_sha256(storage.local_file(given))}"
        elif storage.exists(storage.join(given, SOURCE)):
            found[given] = f"{name} {read_source(storage.local_folder(given))}"
    return "; ".join(found.values())


def begin(run: R, workflow: str) -> R:
    """Check before any work that a training can start; returns its run with the devices that it will use.

    Raises:
        InputError: there is no MLflow server where one is needed, no run to resume, or too few GPUs.
    """
    tracking.check_server(run.storage)
    run_folder(run.storage, workflow, run.config, run.resume)
    return training.choose_devices(run, run.stages, dry_run=run.dry_run)


def run_folder(storage_uri: str, workflow: str, config: str, resume: str) -> str:
    """The folder of the run to continue, or of a new one, named by its config and its start to the microsecond.

    Raises:
        InputError: there is no run of the name to continue.
    """
    name = resume or f"{config}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = storage.absolute(storage.join(storage_uri, "runs", workflow, name))
    if resume and ("/" in resume or resume in (".", "..") or not storage.exists(folder)):
        every = storage.absolute(storage.join(storage_uri, "runs", workflow))
        filesystem, path = storage.resolve(every)
        known = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        hint = cli.did_you_mean(resume.rpartition("/")[2], [info.base_name for info in known])
        raise InputError(f"--resume {resume}: no such run, expected the name of a folder in {every}{hint}")
    return folder


def find_run(storage_uri: str, workflow: str, config: str) -> str:
    """The name of the last run of a config, as `--resume` takes it; empty if there is none."""
    filesystem, path = storage.resolve(storage.join(storage_uri, "runs", workflow))
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return max((str(info.base_name) for info in found if info.base_name.startswith(f"{config}-")), default="")


def hold_to_settings(folder: str, settings: Mapping[str, object]) -> None:
    """Record a run's flat settings in its `run.json`, or check that they equal the recorded ones.

    A resumed run may lie elsewhere and use other numbers of workers; it then no longer equals an undisturbed one, and
    says so. Inputs given by path are checked by `hold_to_inputs`.

    Raises:
        InputError: a setting differs from the one the run began with.
    """
    uri = storage.join(folder, "run.json")
    now = json.loads(json.dumps(settings, default=str))
    if not storage.exists(uri):
        storage.write_bytes(uri, json.dumps(now, indent=1).encode())
        return
    before, now = cli.joined_factors(json.loads(storage.read_bytes(uri))), cli.joined_factors(now)
    factors = {name: None for name in now if name.endswith(".rate_factors")}  # flat settings have none that is empty
    for name, old in (factors | before).items():  # a setting that is newer than the run had no choice then
        new, field_name = now.get(name), name.rpartition(".")[2]
        if old == new or field_name in FREE_SETTINGS:
            continue
        flag = f"--{name.replace('_', '-')}"
        if field_name == "workers":
            print(f"{folder}: resumed with {flag} {new} instead of {old}: no longer equal to an undisturbed run")
        else:
            raise InputError(f"--resume: {flag} is {new!r}, the run began with {old!r}, expected the same")


def hold_to_inputs(folder: str, inputs: Mapping[str, str]) -> None:
    """Record a run's inputs in its `inputs.json`, or check that they equal the recorded ones.

    Args:
        folder: of the run.
        inputs: name -> digest of a table, id of a teacher and so on.

    Raises:
        InputError: an input differs from the one the run began with.
    """
    uri = storage.join(folder, "inputs.json")
    before = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
    for name, value in inputs.items():
        if before.get(name, value) != value:
            raise InputError(f"{folder}: began with {name} {before[name]}, now has {value}, expected the same")
    if not inputs.keys() <= before.keys():
        storage.write_bytes(uri, json.dumps({**before, **inputs}, indent=1).encode())


def print_results(run: TrainingConfig, trained: Trained[M], table: str, next_command: str) -> None:
    """Print a training's table, its times, where its results are, and the next command."""
    print(table)
    steps = max(stage.steps for stage in run.stages.values())
    if steps < SHORT_STEPS:
        print(f"{steps} steps only show that the training runs: this is no model, and its numbers mean nothing")
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in trained.seconds.items()))
    for name, output in {"model": trained.model, **trained.outputs}.items():
        print(f"{name}: {output or 'none'}")
    print(f"MLflow: {tracking.how_to_open(tracking.tracking_uri(run.storage), trained.experiment_id)}")
    print(f"next:  {next_command}")


def ap_table(rows: Mapping[str, DetectionMetrics]) -> str:
    """AP50 of base, novel and all names for the console, a line for each detector."""
    lines = [f"{'AP50':16}{'base':>8}{'novel':>8}{'all':>8}"]
    for label, metrics in rows.items():
        row = metrics.summary()
        lines.append(f"{label:16}{row['ap50_base']:8.3f}{row['ap50_novel']:8.3f}{row['ap50_all']:8.3f}")
    return "\n".join(lines)

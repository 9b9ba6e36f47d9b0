"""The command line of every script: `--config NAME`, then a flag for every field of its run."""

import argparse
import dataclasses
import difflib
import hashlib
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
from tyro._errors import (
    BadValue,
    InstantiationFailure,
    InvalidChoice,
    ParseErrorEvent,
    UnrecognizedArgs,
    on_parse_error,
)

from data_prep import storage
from ovd_models.errors import InputError
from workflows.common.quiet import is_storage_failure

R = TypeVar("R")
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a submitted job."""
PLACES = ("storage", "output", "out", "page", "export")
"""Fields that say where a script writes."""
HELP = {"-h", "--help", "--help-all"}
BATCHES = ("batch_size", "detection_batch")
"""The field of a training's run that says how many images a step has."""


class WaitedError(TimeoutError):
    """Something that a script waited for did not come; one line says what."""


def parse(
    configs: Mapping[str, Callable[[], R]],
    doc: str | None,
    arguments: Sequence[str] | None = None,
    *,
    writes: bool = True,
) -> R:
    """Read a run from the command line: a named config, with any field changed by its flag; check its storage.

    Args:
        configs: name -> function that returns a complete run; the first one is the default.
        doc: the script's docstring, shown by `--help`.
        arguments: what to parse, `sys.argv[1:]` unless given.
        writes: whether the script writes to its storage.

    Raises:
        InputError: the config's name is unknown, a flag is unknown or malformed, or the storage cannot be used.
        SystemExit: `--help` (0).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    default = next(iter(configs))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", default=default)
    stages = stages_of(configs[default]())
    if stages:
        add_stage_flags(parser)
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}") from error
    if known.config not in configs:
        hint = did_you_mean(known.config, configs)
        raise InputError(f"--config {known.config}: unknown, expected one of {', '.join(configs)}{hint}")
    run = configs[known.config]()
    description = f"--config NAME: one of {', '.join(configs)} (default {default})"
    if stages:
        own = flag_of(f"{stages[0]}.workers", "N")
        description += f"\n\nOf all stages; a stage's own flag, such as {own}, replaces it:\n{STAGE_FLAGS}"
    if HELP & set(rest):
        print(doc or "")  # tyro would join its lines
        rest = ["--help"]
    with on_parse_error(partial(_raise_input_error, flags_of(run, stages))):
        arguments = [*stage_arguments(stages, known), *rest]  # of several, the last one counts
        parsed = tyro.cli(type(run), args=arguments, default=run, description=description)
    check_places(parsed)
    if uri := getattr(parsed, "storage", ""):
        parsed = dataclasses.replace(parsed, storage=storage.open_storage(uri, writes=writes))  # type: ignore[type-var]
    parsed = scale_rates(parsed, run, rest) if stages else parsed
    print_changes(known.config, configs[known.config](), parsed)
    return parsed


def check_places(run: Any) -> None:
    """Check that a job writes nothing below its own folder.

    Raises:
        InputError: a flag of `PLACES` is relative.
    """
    for name in PLACES if JOB in os.environ else ():
        uri = getattr(run, name, "")
        if uri and "://" not in uri and not Path(uri).is_absolute():
            expected = "a URI or an absolute path that all nodes reach: the job's folder is deleted with it"
            raise InputError(f"--{name} {uri}: relative, expected {expected}")


def check_file(flag: str, path: str) -> None:
    """Raise InputError unless a flag's file, or that of its URI, is there."""
    if not storage.is_file(path):
        raise InputError(f"{flag} {path}: no such file, expected one of this machine, or a URI")


def check_checkpoint(flag: str, folder: str) -> None:
    """Raise InputError unless a flag's folder or URI holds a checkpoint."""
    if not storage.exists(storage.join(folder, "config.json")):
        raise InputError(f"{flag} {folder}: no checkpoint (config.json), expected the folder of one")


def print_changes(config: str, named: Any, run: Any) -> None:
    """Print a run as its named config and the flags that make it of this config."""
    before, after = joined_factors(flatten(named)), joined_factors(flatten(run))
    emptied = {name: () for name in before if name.endswith(".rate_factors") and name not in after}
    flags = [flag_of(name, value) for name, value in (after | emptied).items() if before.get(name) != value]
    print(f"config: {' '.join([config, *flags])}", flush=True)


def joined_factors(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings with the entries of each stage's `rate_factors` joined, as its one flag takes them."""
    joined: dict[str, Any] = {}
    for name, value in flat.items():
        stage, found, start = name.partition(".rate_factors.")
        if found:
            joined.setdefault(f"{stage}.rate_factors", []).append(f"{start}={value:g}")
        else:
            joined[name] = value
    return joined


def flag_of(name: str, value: object) -> str:
    """The flag that gives a field, by its dotted name, a value."""
    group, _, last = name.replace("_", "-").rpartition(".")
    prefix = f"--{group}." if group else "--"
    if isinstance(value, bool) and not name.endswith(".use_gpu"):  # which may be None, so it takes a word
        return f"{prefix}{'' if value else 'no-'}{last}"
    values = value if isinstance(value, tuple | list) else [value]
    return " ".join([f"{prefix}{last}", *(shlex.quote(str(each)) for each in values)])


def flags_of(run: Any, stages: Sequence[str]) -> list[str]:
    """All flags of a run, those of its stages too."""
    own = [f"--{name.replace('_', '-')}" for name in joined_factors(flatten(run))]
    return ["--config", "--help", "--help-all", *own, *(STAGE_FLAGS.split() if stages else [])]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A hint at the known word that is closest to a given one; empty if none is close."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def stages_of(run: Any) -> list[str]:
    """Names of a run's fields that are settings of training stages: those with `workers`."""
    return [entry.name for entry in dataclasses.fields(run) if hasattr(getattr(run, entry.name), "workers")]


STAGE_FLAGS = "--workers N --accumulate N --precision auto|fast|bf16|fp16|fp32 --compile --use-gpu"


def add_stage_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `STAGE_FLAGS`."""
    parser.add_argument("--workers", type=int)
    parser.add_argument("--accumulate", type=int)
    parser.add_argument("--precision")
    for name in ("--compile", "--use-gpu"):
        parser.add_argument(name, action=argparse.BooleanOptionalAction)


def stage_arguments(stages: Sequence[str], known: argparse.Namespace) -> list[str]:
    """The flags that were given for all stages, as those of each, so that a run is checked with all of its flags."""
    given = {name: value for name, value in vars(known).items() if name != "config" and value is not None}
    flags = [flag_of(f"{stage}.{name}", value) for stage in stages for name, value in given.items()]
    return shlex.split(" ".join(flags))


def scale_rates(run: R, published: R, arguments: Sequence[str]) -> R:
    """The run with learning rates in proportion to its batch (Goyal et al., 2017); prints them if they change.

    Args:
        run: as parsed.
        published: the config, whose rates belong to its batch.
        arguments: of the command line; a stage whose rate they give keeps it.
    """
    (batch,) = [entry.name for entry in dataclasses.fields(run) if entry.name in BATCHES]  # type: ignore[arg-type]
    new, old = getattr(run, batch), getattr(published, batch)
    given = {argument.split("=")[0].replace("_", "-") for argument in arguments}
    stages = {
        name: dataclasses.replace(stage, learning_rate=stage.learning_rate * new / old)
        for name, stage in ((name, getattr(run, name)) for name in stages_of(run))
        if f"--{name.replace('_', '-')}.learning-rate" not in given
    }
    if new == old or not stages:
        return run
    rates = ", ".join(f"{name} {stage.learning_rate:g}" for name, stage in stages.items())
    print(f"learning rates follow the batch of {new}, {new / old:g} times the config's {old}: {rates}", flush=True)
    return dataclasses.replace(run, **stages)  # type: ignore[type-var]


def _raise_input_error(flags: Sequence[str], event: ParseErrorEvent) -> None:
    """Report a bad flag in one line instead of tyro's box."""
    if isinstance(event, UnrecognizedArgs):
        unknown = next((token for token in event.tokens if token.startswith("--")), "").partition("=")[0]
        hint = did_you_mean(unknown.replace("_", "-"), flags) if unknown else ""
        raise InputError(f"unknown flags: {', '.join(event.tokens)}{hint}")
    if isinstance(event, BadValue):
        raise InputError(f"{event.argument.display_name()}: missing value")
    if isinstance(event, InvalidChoice):
        choices = ", ".join(event.choices)
        raise InputError(f"{event.argument.display_name()}: {event.value!r}, expected one of {choices}")
    if isinstance(event, InstantiationFailure):
        flag = f"{event.argument.display_name()}: " if event.argument else ""
        raise InputError(f"{flag}{event.message}")
    raise InputError(f"bad command line ({type(event).__name__})")


def execute(job: Callable[[], object]) -> NoReturn:
    """Run a script's `main` and exit: 0 done, 1 the job failed, 2 bad input, 130 stopped.

    A user's error is one line; other errors are raised. `SIGTERM`, which `ray job stop` sends, ends the script as
    Ctrl-C does, so that `finally` blocks run.
    """
    sys.exit(outcome(job))


def outcome(job: Callable[[], object]) -> int:
    """The exit code of a script's `main`; see `execute`."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        job()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:
        if end.code:
            raise  # 0 after `--help`
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (FloatingPointError, WaitedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        reason = storage_failure(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


def storage_failure(error: BaseException) -> str | None:
    """A line about storage in an error or in one that caused it; None if storage is not the reason.

    Our own errors name the file. Another may hide the first one, such as MLflow's when its database is on the same full
    disk.
    """
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        seen.append(found)
        found = getattr(found, "cause", None) or found.__cause__ or found.__context__
    ours = re.compile("cannot be (written|read): ")
    named = [each for each in seen if isinstance(each, OSError) and ours.search(str(each).partition("\n")[0])]
    for each in (*named, *reversed(seen)):
        for line in str(each).splitlines():
            if is_storage_failure(line):
                return line.strip()
    return None


def to_json(run: Any) -> str:
    """A run as JSON, as it is saved beside every checkpoint."""
    return json.dumps(dataclasses.asdict(run), indent=1, default=str)


def flatten(run: Any) -> dict[str, Any]:
    """A run as flat dotted names, as MLflow wants its parameters."""
    return flatten_settings(dataclasses.asdict(run))


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; what is empty has none."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        own = f"{prefix}{key}"
        flat |= flatten_settings(value, f"{own}.") if isinstance(value, dict) else {own: value}
    return flat


def config_hash(config: Any) -> str:
    """16 hexadecimal digits that change with any field of a config dataclass."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]


def script_command(script: str, *words: str) -> str:
    """The command of a script of `workflows/` as it is pasted into a shell."""
    return shlex.join(["python", f"workflows/{script}.py", *words])

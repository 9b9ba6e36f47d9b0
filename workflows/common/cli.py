"""The command line of every script: `--config NAME`, then a flag for every field of its run."""

import argparse
import dataclasses
import hashlib
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
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

from ovd_models.errors import InputError

R = TypeVar("R")


def parse(configs: Mapping[str, Callable[[], R]], doc: str | None, arguments: Sequence[str] | None = None) -> R:
    """Read a run from the command line: a named config, with any field changed by its flag.

    Args:
        configs: name -> function that returns a complete run; the first one is the default.
        doc: the script's docstring, shown by `--help`.
        arguments: what to parse, `sys.argv[1:]` unless given.

    Raises:
        InputError: the config's name is unknown, or a flag is unknown or malformed.
        SystemExit: `--help` (0).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    default = next(iter(configs))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", default=default)
    stages = stages_of(configs[default]())
    if stages:
        parser.add_argument("--workers", type=int)
    try:
        known, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name}: {error.message}") from error
    if known.config not in configs:
        raise InputError(f"--config {known.config}: unknown, expected one of {', '.join(configs)}")
    run = configs[known.config]()
    description = f"{doc or ''}\n\n--config NAME  one of {', '.join(configs)} (default {default})"
    if stages:
        description += "\n--workers N    of all stages; the flag of a stage replaces it"
        run = with_workers(run, known.workers)
    with on_parse_error(_raise_input_error):
        return tyro.cli(type(run), args=rest, default=run, description=description)


def stages_of(run: Any) -> list[str]:
    """Names of a run's fields that are settings of training stages: those with `workers`."""
    return [entry.name for entry in dataclasses.fields(run) if hasattr(getattr(run, entry.name), "workers")]


def with_workers(run: R, workers: int | None) -> R:
    """The run with this number of workers in all stages; None leaves each stage's own.

    Raises:
        InputError: a batch cannot be shared among them.
    """
    if workers is None:
        return run
    stages = {name: dataclasses.replace(getattr(run, name), workers=workers) for name in stages_of(run)}
    return dataclasses.replace(run, **stages)  # type: ignore[type-var]


def _raise_input_error(event: ParseErrorEvent) -> None:
    """Report a bad flag in one line instead of tyro's box."""
    if isinstance(event, UnrecognizedArgs):
        raise InputError(f"unknown flags: {', '.join(event.tokens)}")
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
    return 0


def to_json(run: Any) -> str:
    """A run as JSON, as it is saved beside every checkpoint."""
    return json.dumps(dataclasses.asdict(run), indent=1, default=str)


def flatten(run: Any) -> dict[str, Any]:
    """A run as flat dotted names, as MLflow wants its parameters."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key, child in value.items() for k, v in walk(f"{prefix}{key}.", child).items()}
        return {prefix[:-1]: value}

    return walk("", dataclasses.asdict(run))


def config_hash(config: Any) -> str:
    """16 hexadecimal digits that change with any field of a config dataclass."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:16]

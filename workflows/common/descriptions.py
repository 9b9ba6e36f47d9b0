"""What a run is called and how it is described in MLflow."""

import re
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

from workflows.common import cli

UNNAMED = {
    *("storage", "config", "resume", "teacher", "sam", "data", "texts", "backbone_weights", "from_scratch"),
    *("use_gpu", "workers", "wait_minutes", "max_failures", "log_every", "checkpoint_every", "waiting_bytes"),
}
"""Fields whose change a run's name does not mention: places, and what changes no result."""
MAX_CHANGES = 6
"""Changes that a name mentions."""


def run_name(workflow: str, run: Any, configs: Mapping[str, Callable[[], Any]]) -> str:
    """A run's name: its workflow, its config and what differs from the config, such as a seed.

    Args:
        workflow: such as `codet`.
        run: as given by the user, not yet completed by its data.
        configs: the named configs.

    Example:
        >>> run_name("codet", dataclasses.replace(pictograms(), group_size=8), CONFIGS)
        'codet pictograms, group size 8'
    """
    config = str(run.config)
    changes = _changes(cli.flatten(configs[config]()), cli.flatten(run)) if config in configs else []
    more = [f"{len(changes) - MAX_CHANGES} more"] if len(changes) > MAX_CHANGES else []
    return ", ".join((f"{workflow} {config}".strip(), *changes[:MAX_CHANGES], *more))


def _changes(published: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What differs between two flat runs; a setting that all stages share is named once."""
    changed: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        field = path.rpartition(".")[2]
        if field not in UNNAMED and published.get(path) != value and not (isinstance(value, str) and "/" in value):
            changed.setdefault(field, {})[path] = value
    found: list[str] = []
    for field, values in changed.items():
        everywhere = [value for path, value in given.items() if path.rpartition(".")[2] == field]
        if len(set(map(repr, everywhere))) == 1:
            found.append(_change(field, everywhere[0], is_choice=next(iter(values)).startswith("model.")))
        else:
            found += [_change(path, value, is_choice=path.startswith("model.")) for path, value in values.items()]
    return found


def _change(path: str, value: Any, *, is_choice: bool) -> str:
    """One change in words; a model's choice is named by its value alone, such as `region-text`."""
    name = path.rpartition(".")[2] if is_choice else path.replace(".", " ")
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if isinstance(value, str) and is_choice:
        return value
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


def teacher_key(teacher: str) -> str:
    """The key of the run that left a checkpoint in its folder, such as `clip/NAME`; empty for other places."""
    found = re.search(r"(?:^|/)runs/([^/]+/[^/]+)/[^/]+/?$", teacher)
    return found[1] if found else ""


def description(model: str, teacher: str, teacher_run: str) -> str:
    """A run's description in Markdown: its command, where its model will be, and its teacher.

    Args:
        model: folder or URI.
        teacher: folder or URI, or empty.
        teacher_run: a link to the run that trained it, or empty.
    """
    lines = [f"command: `{shlex.join(sys.orig_argv)}`", f"model: `{model}`"]
    if teacher:
        lines.append(f"teacher: `{teacher}`" + (f", {teacher_run}" if teacher_run else ""))
    return "\n\n".join(lines)

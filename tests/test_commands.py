"""The commands for clusters that the documentation shows: their programs, flags, files and names exist."""

import re
import shlex
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import documented
import kuberay
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli
from ray.serve.scripts import cli as serve_cli

from workflows import clip, embed, prepare_boxes, prepare_pairs
from workflows.common import cli
from workflows.configs import boxes as boxes_configs

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
COMMENTED = ("cluster.yaml", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "deploy").iterdir())))
PROGRAMS = ("ray", "serve", "kubectl", "docker", "helm")


def commands_of(name: str) -> list[str]:
    """Commands that a page shows in its blocks, or a file in its comments."""
    text = (ROOT / name).read_text()
    if name in PAGES:
        lines = documented.commands(text)
    else:
        text = "\n".join(re.findall(r"^#\s+(.*)$", text, re.MULTILINE))
        lines = [*re.sub(r"\\\n\s*", "", text).splitlines(), *re.findall(r": (kubectl apply .*)$", text, re.MULTILINE)]
    return [line for line in lines if line.split(" ")[0] in PROGRAMS]


COMMANDS = [(name, command) for name in (*PAGES, *COMMENTED) for command in commands_of(name)]


def resolve(group: Any, words: list[str]) -> None:
    """Parse a command line as the program would; nothing is run."""
    context = click.Context(group)
    while isinstance(group, click.Group):
        found = group.get_command(context, words[0])
        assert found is not None, f"unknown command {words[0]}"
        group, words = found, words[1:]
    group.make_context(group.name, words)


def check_script(words: list[str], tmp_path: Path) -> None:
    """Parse the flags of a workflow; its storage is replaced by a local folder."""
    program, script, *arguments = words
    assert program == "python"
    module = import_module(".".join(Path(script).with_suffix("").parts))
    cli.parse(module.CONFIGS, None, [tmp_path.as_uri() if "://" in word else word for word in arguments])


def kubernetes_names() -> set[str]:
    """What KubeRay creates or we apply: resources, services of heads and of Serve, secrets with a cluster's token."""
    names = set()
    for name in ("raycluster", "rayjob", "rayservice"):
        manifest = yaml.safe_load((ROOT / f"deploy/{name}.yaml").read_text())
        own = manifest["metadata"]["name"]
        names.add(f"{name}/{own}")
        if name == "raycluster":
            names |= {f"service/{own}-head-svc", f"secret/{own}"}
        if name == "rayservice":
            names.add(f"service/{own}-serve-svc")
    return names


@pytest.mark.parametrize(("place", "command"), COMMANDS, ids=[f"{name}: {line[:40]}" for name, line in COMMANDS])
def test_a_documented_command_is_right(place: str, command: str, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    program, *arguments = words
    if program in ("ray", "serve"):
        resolve(ray_cli if program == "ray" else serve_cli, list(arguments))
    if "--" in words:
        check_script(words[words.index("--") + 1 :], tmp_path)
    if program == "helm" and "install" in words:
        assert words[words.index("--version") + 1] == kuberay.VERSION
    if arguments[:3] == ["create", "secret", "generic"]:
        pods = "".join(path.read_text() for path in (ROOT / "deploy").glob("*.yaml"))
        assert f"secretRef: {{name: {arguments[3]}" in pods
    elif program == "kubectl" and "-f" not in words:
        named = arguments[1] if "/" in arguments[1] else "/".join(arguments[1:3])
        assert named in kubernetes_names()
    for word in words:
        if word.endswith((".yaml", "Dockerfile")):
            assert (ROOT / word).is_file(), word


def test_every_kind_of_command_is_found() -> None:
    assert {line.split()[0] for _, line in COMMANDS} == set(PROGRAMS)
    assert {place for place, _ in COMMANDS} >= {"README.md", "docs/cluster.md", "cluster.yaml", "deploy/Dockerfile"}


def test_a_job_is_submitted_with_the_token() -> None:
    pages = [(ROOT / page).read_text() for page in ("README.md", "docs/cluster.md")]
    blocks = [block for text in pages for _, block in documented.BLOCK.findall(text)]
    blocks = [*(block for block in blocks if "ray job submit" in block), (ROOT / "cluster.yaml").read_text()]
    assert len(blocks) == 5
    for block in blocks:
        assert "export RAY_AUTH_MODE=token" in block.split("ray job submit -")[0]


@pytest.mark.parametrize("place", [*PAGES, *COMMENTED])
def test_named_files_exist(place: str) -> None:
    for name in re.findall(r"(?:deploy|docs|workflows|tests)/[\w./-]*\.(?:yaml|md|py)", (ROOT / place).read_text()):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (clip.next_command(clip.CONFIGS["pictograms_quick"](), "a b"), "--config pictograms_quick --storage store"),
        (clip.next_command(replace(clip.CONFIGS["pictograms"](), pairs="mine"), "m"), "--pairs mine --data PHOTOS"),
        (prepare_boxes.next_command(replace(boxes_configs.coco(), name="my set", data="d")), "--boxes 'my set'"),
        (prepare_boxes.next_command(boxes_configs.pictograms()), "--boxes pictograms --pairs pictograms"),
        (prepare_pairs.next_command(replace(prepare_pairs.smoke(), name="x", urls="u.tsv")), "--max-side None"),
        (embed.next_command(replace(embed.pictograms(), boxes="")), "--over captions"),
    ],
)
def test_the_command_that_a_script_ends_with_is_right(command: str, expected: str, tmp_path: Path) -> None:
    assert expected in command
    check_script(shlex.split(command), tmp_path)

"""`--help`: a script's docstring, its configs and the flags that matter first, within a second.

The scripts import torch, Ray and MLflow, which takes seconds. So each calls `answer` above those imports, and the text
comes from the sources instead of from the imported objects. `--help-all` is answered by `cli.parse`.
"""

import ast
import os
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

STAGE_FLAGS: Mapping[str, str] = {
    "workers": "Processes of all stages that train together.",
    "accumulate": "Parts in which a worker takes its share of a batch, to fit a smaller GPU.",
    "precision": "auto, fast, bf16, fp16 or fp32.",
    "compile": "Compile the backbones with `torch.compile`.",
    "use_gpu": "A GPU for each worker; without it or `--no-use-gpu`, those of this machine if there are enough.",
}
"""Flags that set a field of all stages of a training."""
ROOT = Path(__file__).parents[2]
FLAG_COLUMN, WIDTH = 22, 118


def answer(module: str, script: str, flags: str) -> None:
    """Print the help and exit, if a script was started with `-h` or `--help`; else do nothing.

    Args:
        module: the caller's `__name__`.
        script: the caller's `__file__`.
        flags: names of the fields of its `Run`, or of `STAGE_FLAGS`, that matter first.
    """
    if module == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
        try:
            print(help_text(Path(script), flags.split()), flush=True)
        except BrokenPipeError:  # `--help | head`; Python would flush again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def help_text(script: Path, flags: list[str]) -> str:
    """The help of a script.

    Raises:
        KeyError: a flag is no documented field.
    """
    tree = ast.parse(script.read_text())
    configs, fields = read_configs(tree), {**STAGE_FLAGS, **dict(read_fields(tree, "Run"))}
    lines = [(ast.get_docstring(tree) or "").strip(), ""]
    if len(configs) > 1:
        lines += ["configs, the first one by default:", *(entry(name, text) for name, text in configs.items()), ""]
    lines += ["flags:", *([entry("--config NAME", "A named config.")] if len(configs) > 1 else [])]
    lines += [entry(f"--{name.replace('_', '-')}", fields[name]) for name in flags]
    lines += [entry("--help-all", "Every flag, with the defaults of the config.")]
    return "\n".join(lines)


def entry(name: str, text: str) -> str:
    """A name with the first sentence of its text, in two columns."""
    sentence = " ".join(text.split()).split(". ")[0].rstrip(".")
    start = f"  {name:{FLAG_COLUMN - 2}}"
    if len(start) > FLAG_COLUMN:
        start += "  "
    if not sentence:
        return start.rstrip()
    return textwrap.fill(sentence, WIDTH, initial_indent=start, subsequent_indent=" " * FLAG_COLUMN)


def read_configs(tree: ast.Module) -> dict[str, str]:
    """Docstrings of the functions or classes in `CONFIGS` by name; empty if it is not written as a dict."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            (target,) = node.targets if isinstance(node, ast.Assign) else (node.target,)
            if ast.unparse(target) == "CONFIGS":
                known = {each.name: each for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
                functions = {ast.literal_eval(key): ast.unparse(value) for key, value in items(node.value)}
                texts = {name: known.get(function) for name, function in functions.items()}
                return {name: (ast.get_docstring(text) or "") if text else "" for name, text in texts.items()}
    found = find_import(tree, "CONFIGS")
    return read_configs(found) if found is not None else {}


def items(node: ast.Dict) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Keys and values of a dict in the source."""
    return ((key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None)


def read_fields(tree: ast.Module, name: str) -> Iterator[tuple[str, str]]:
    """The documented fields of a dataclass and of its bases, wherever they are imported from."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in node.bases:
                yield from read_fields(tree, ast.unparse(base))
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    yield ast.unparse(field.target), str(ast.literal_eval(text.value))
            return
    found = find_import(tree, name)
    if found is not None:
        yield from read_fields(found, name)


def find_import(tree: ast.Module, name: str) -> ast.Module | None:
    """The module of ours from which a name is imported."""
    for node in tree.body:
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and (name in {each.asname or each.name for each in node.names})
        ):
            source = ROOT.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            return ast.parse(source.read_text()) if source.is_file() else None
    return None

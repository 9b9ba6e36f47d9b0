"""The documentation: error lines say what was expected or are explained, and commands are right."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for package in ("workflows", "data_prep", "ovd_models") for path in (ROOT / package).rglob("*.py")]
SAYS_WHAT_TO_DO = ("expected", "`", "see ", "did you mean", "; ")
"""Parts of messages that need no page."""
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def input_errors(path: Path) -> Iterator[tuple[int, str]]:
    """Line and message of each `raise InputError(...)` with a literal message; `{}` stands for its values."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue
        if ast.unparse(node.exc.func) != "InputError" or not node.exc.args:
            continue
        (message,) = node.exc.args
        if isinstance(message, ast.Constant):
            yield node.lineno, str(message.value)
        elif isinstance(message, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in message.values)
            yield node.lineno, "".join(parts)


def longest_words(message: str) -> str:
    """The longest part of a message between its values, as the page of troubleshooting quotes it."""
    return max(re.split(r"\{\}", message), key=len).strip(" :(),")


ERRORS = [
    (f"{path.relative_to(ROOT)}:{line}", message) for path in sorted(SOURCES) for line, message in input_errors(path)
]
BARE = [
    (place, message)
    for place, message in ERRORS
    if not any(part in message for part in SAYS_WHAT_TO_DO) and len(longest_words(message)) > 3
]
"""Messages that do not say what was expected."""


def test_errors_are_found() -> None:
    assert len(ERRORS) > 300
    assert 5 < len(BARE) < 80


@pytest.mark.parametrize(("place", "message"), BARE, ids=[place for place, _ in BARE])
def test_an_error_says_what_was_expected_or_is_explained(place: str, message: str) -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert longest_words(message) in page, f"{place}: {message}"

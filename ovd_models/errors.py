"""The one exception for bad input."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from a user or a file.

    The message is one line that names the file, row or field and what was expected. Scripts print it without a
    traceback and exit with code 2.
    """


@contextmanager
def as_input_error(subject: str) -> Iterator[None]:
    """Raise any exception of the block as an InputError of one line, for libraries that raise many kinds on bad files.

    The message starts with `subject`: the file and what is wrong with it.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{subject}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The exception's type and the first informative line of its message: torch heads lists of misfits with a title."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0] if lines else ""
    return f"{type(error).__name__}: {line}"[:300]

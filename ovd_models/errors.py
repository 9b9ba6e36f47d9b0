"""The one exception for bad input."""


class InputError(ValueError):
    """Bad input from a user or a file.

    The message is one line that names the file, row or field and what was expected. Scripts print it without a
    traceback and exit with code 2.
    """

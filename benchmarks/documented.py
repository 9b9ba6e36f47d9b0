"""What the pages of the documentation show to be pasted: commands and Python, in the order of the page."""

import re
from collections.abc import Iterator

BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"\s+#\s.*$")
COMMAND = re.compile(r"(\.|[A-Z_]+=.*|make|python|curl|export|mlflow|openssl|ray|serve|docker|helm|kubectl)( |$)")


def commands(text: str) -> list[str]:
    """The commands of a page's blocks, joined where they are continued, without comments."""
    blocks = [re.sub(r"\\\n\s*", "", code) for language, code in BLOCK.findall(text) if language != "python"]
    lines = [COMMENT.sub("", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if COMMAND.match(line)]


def inline_commands(text: str) -> Iterator[str]:
    """The `python workflows/...` commands inside the lines of a page, outside its blocks."""
    yield from re.findall(r"`([^`\n]*\bpython workflows/[^`\n]+)`", BLOCK.sub("", text))


def snippets(text: str) -> str:
    """The Python of a page, one block after another."""
    return "\n".join(code for language, code in BLOCK.findall(text) if language == "python")

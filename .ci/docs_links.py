"""Links of the documentation to files outside `docs/`, which the site does not have: their names, once they exist."""

import logging
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([\w./-]+)\)")
LOGGER = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace links to files of the repository by their texts; a missing file is a warning, which is refused."""

    def text_of(match: re.Match[str]) -> str:
        if not Path(match[2]).exists():
            LOGGER.warning("%s: no file %s", page.file.src_path, match[2])
        return match[1]

    return LINK.sub(text_of, markdown)

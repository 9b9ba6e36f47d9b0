"""Files of names, one a line, that a person writes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.boxes.splits import named_split
from data_prep.concepts.names import NameMatcher
from data_prep.embeddings import labelled
from workflows import embed_texts, import_weights
from workflows.common import measured


def split_truth(uri: str) -> list[str]:
    truth: Any = SimpleNamespace(names=("cat", "dog"), categories=(), origin="gt.json")
    measured.split_categories(truth, uri)
    return sorted(measured.storage_text(uri).split())


READERS: dict[str, Callable[[str], object]] = {
    "vocabulary of a crawl": lambda uri: list(NameMatcher.read(uri).names),
    "novel names": lambda uri: [row["name"] for row in named_split([{"name": "cat"}, {"name": "dog"}], uri)],
    "novel names of a truth": split_truth,
    "names to embed": lambda uri: list(embed_texts.names_to_embed(embed_texts.Run(names=uri))),
    "released names": lambda uri: list(import_weights.read_released_names(uri)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_byte_order_mark_is_no_part_of_the_first_name(reader: str, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("cat\r\ndog\r\n".encode("utf-8-sig"))  # as Windows' Notepad writes it
    assert READERS[reader](str(file)) == ["cat", "dog"]


def test_a_byte_order_mark_is_no_part_of_the_first_label(tmp_path: Path) -> None:
    file = tmp_path / "labels.tsv"
    file.write_bytes("n01\tcat\n".encode("utf-8-sig"))
    assert labelled.read_names(str(file), ["n01"]) == {"n01": "cat"}

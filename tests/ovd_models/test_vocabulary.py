import math
from typing import Any

import numpy as np
import pytest
import torch

from ovd_models.detectors.region_query import build_query
from ovd_models.errors import InputError
from ovd_models.vocabulary import EmbeddingTable, Vocabulary, build_vocabulary, clean_names

NAMES = ("cat", "kitten", "anchor")
ROWS = np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], np.float32)


def table() -> EmbeddingTable:
    return EmbeddingTable.from_array(NAMES, ROWS, "names.npy")


def test_a_vocabulary_has_a_unit_row_for_each_name() -> None:
    vocabulary = build_vocabulary(table(), ["anchor", " cat ", "anchor"], {"cat": "base"})
    assert vocabulary.names == ("anchor", "cat")
    assert torch.equal(vocabulary.embeddings, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    assert vocabulary.is_base is not None
    assert vocabulary.is_base.tolist() == [False, True]
    scores = torch.rand(3, 2)
    assert vocabulary.strongest(scores) is scores


def test_synonyms_are_averaged_and_normalised() -> None:
    vocabulary = build_vocabulary(table(), ["cat", "anchor"], synonyms={"cat": ["kitten"]})
    half = math.sqrt(0.5)
    assert vocabulary.names == ("cat", "anchor")
    assert torch.allclose(vocabulary.embeddings, torch.tensor([[half, half], [-1.0, 0.0]]))
    assert vocabulary.owners is None


def test_the_best_synonym_counts_where_that_is_asked() -> None:
    vocabulary = build_vocabulary(table(), ["cat", "anchor"], synonyms={"cat": ["kitten", "cat"]}, merge="max")
    assert len(vocabulary) == 2
    assert vocabulary.embeddings.shape == (3, 2)
    features = torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    scores = vocabulary.strongest(features @ vocabulary.embeddings.T)
    assert torch.allclose(scores, torch.tensor([[0.8, -0.6], [0.0, 1.0]]))
    assert vocabulary.strongest(torch.zeros(0, 3)).shape == (0, 2)
    moved = vocabulary.to(torch.device("cpu"))
    assert moved.owners is not None
    assert moved.owners.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "vocabulary: empty, expected at least one name"),
        (["cat", " "], r"vocabulary\[1\]: ' ', expected a non-empty name"),
    ],
)
def test_an_empty_vocabulary_is_told(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_vocabulary(table(), names)
    with pytest.raises(InputError, match=message):
        clean_names(names)


def test_a_synonym_that_cannot_be_embedded_is_told() -> None:
    with pytest.raises(InputError, match="name 'tom': not in the table of 3 embedded names"):
        build_vocabulary(table(), ["cat"], synonyms={"cat": ["tom"]})


def test_a_vocabulary_is_a_value() -> None:
    first, second = (Vocabulary(("a",), torch.ones(1, 2)) for _ in range(2))
    assert first.names == second.names
    assert torch.equal(first.embeddings, second.embeddings)


@pytest.mark.parametrize("names", ["umbrella", "cat", b"cat", "", None, 7, [["cat"]], ["cat", None], [b"cat"], [7]])
def test_what_is_no_list_of_names_is_refused(names: Any) -> None:
    with pytest.raises(InputError, match=r"^vocabulary"):
        build_vocabulary(table(), names)
    with pytest.raises(InputError, match=r"^vocabulary"):
        build_query(table(), names, {})


@pytest.mark.parametrize("names", [("cat",), {"cat": ["kitten"]}, (name for name in ["cat"]), np.array(["cat"])])
def test_any_collection_of_names_is_taken(names: Any) -> None:
    assert build_query(table(), names, {}).names.names == ("cat",)


def test_a_text_in_the_place_of_several_words_is_refused() -> None:
    with pytest.raises(InputError, match=r"synonyms of cat: the text 'kitten', expected a list such as \['kitten'\]"):
        build_vocabulary(table(), ["cat"], synonyms={"cat": "kitten"})
    with pytest.raises(InputError, match="cat: the text 'kitten', expected a list"):
        build_query(table(), {"cat": "kitten"}, {})
    with pytest.raises(InputError, match="the text 'cat', expected a list"):
        build_query(table(), ["cat"], {}, attributes="red cat"[4:])

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.detectors.region_query import build_query
from ovd_models.errors import InputError
from ovd_models.vocabulary import EmbeddingTable


class Letters:
    """Embeds a text as its letter counts."""

    teacher, prompt_set = "letters", "none"

    def embed_names(self, names: Sequence[str]) -> Tensor:
        return self.embed_captions(names)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        counts = [[float(text.count(chr(97 + n))) for n in range(26)] for text in captions]
        return F.normalize(torch.tensor(counts), dim=1)


def test_names_are_flagged_by_the_training_split() -> None:
    query = build_query(Letters(), ["cat", "zebra", "dog"], {"cat": "base", "dog": "novel"})
    assert query.names.is_base is not None
    assert query.names.is_base.tolist() == [True, False, False]
    assert query.names.names == ("cat", "zebra", "dog")


def test_names_of_another_data_set_have_no_split() -> None:
    assert build_query(Letters(), ["zebra"], {"cat": "base"}).names.is_base is None


def test_children_index_their_parents() -> None:
    query = build_query(Letters(), {"bird": ["robin", "jay"], "anchor": [], "cat": ["lion"]}, {})
    assert query.names.names == ("bird", "anchor", "cat")
    assert query.children is not None and query.parents is not None
    assert query.children.names == ("robin", "jay", "lion")
    assert query.parents.tolist() == [0, 0, 2]


def test_prompts_of_a_request_replace_the_checkpoints() -> None:
    query = build_query(Letters(), ["ant", "bee"], {}, prompts="{name}|see {a}")
    letters = Letters()
    rows = letters.embed_captions(["ant", "see an ant", "bee", "see a bee"]).view(2, 2, -1).mean(1)
    assert torch.allclose(query.names.embeddings, F.normalize(rows, dim=1))


def test_attributes_are_averaged_over_the_names() -> None:
    query = build_query(Letters(), ["ant", "bee"], {}, attributes=["red", "old"])
    texts = ["a photo of a red ant", "a photo of a red bee", "a photo of an old ant", "a photo of an old bee"]
    rows = Letters().embed_captions(texts).view(2, 2, -1).mean(1)
    assert query.attributes is not None
    assert torch.allclose(query.attributes.embeddings, F.normalize(rows, dim=1))
    plain = build_query(Letters(), ["ant"], {}, attributes=["red", "old"], attribute_prompts="some {name}")
    assert plain.attributes is not None
    assert torch.allclose(plain.attributes.embeddings, Letters().embed_captions(["some red ant", "some old ant"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": []}, "vocabulary: empty"),
        ({"names": {"a": ["x"], "b": ["x"]}}, "a child has two parents"),
        ({"names": {"a": ["x"], "a ": ["y"]}}, "a name is repeated"),
        ({"prompts": "unheard"}, "prompt set 'unheard': unknown"),
        ({"prompts": "a photo of {nome}"}, "expected {a}, {a:word} or {name}"),
        ({"attributes": ["red", "old"], "attribute_prompts": "unheard"}, "prompt set 'unheard': unknown"),
        ({"attributes": [""]}, "expected a non-empty name"),
        ({"attributes": ["red", "red "]}, "attributes: 'red' alone would fit every region, expected words to choose"),
        ({"names": {"a": ["x", "y"], "x": []}}, "'x' is a name and the child of 'a', expected one"),
        ({"names": {"a": ["x", "y"], "x": ["z"]}}, "'x' is a name and the child of 'a', expected one"),
    ],
)
def test_impossible_queries_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        build_query(Letters(), **{"names": ["cat"], "splits": {}, **options})  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_of_names_cannot_embed_prompts() -> None:
    table = EmbeddingTable(("cat",), torch.ones(1, 1), "table")
    with pytest.raises(InputError, match="expected one with a text tower"):
        build_query(table, ["cat"], {}, prompts="a {name}")

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.clip.model import SENTENCES, ClipConfig, ClipTextEncoder, build_text_tower
from ovd_models.detectors.region_query import MOST_KEPT, build_query
from ovd_models.errors import InputError
from ovd_models.prompts import with_article
from ovd_models.vocabulary import EmbeddingTable, Merge


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


@pytest.mark.parametrize("merge", ["mean", "max"])
def test_children_and_attributes_have_synonyms_too(merge: Merge) -> None:
    synonyms = {"robin ": ["redbreast"], "red": ["crimson"], " bird": ["fowl"]}
    query = build_query(
        Letters(), {" bird": ["robin", "jay"]}, {}, attributes=["red", "old"], synonyms=synonyms, merge=merge
    )
    assert query.children is not None and query.attributes is not None
    expected = {
        query.names: [["bird", "fowl"]],
        query.children: [["robin", "redbreast"], ["jay"]],
        query.attributes: [["red", "crimson"], ["old"]],
    }
    for vocabulary, groups in expected.items():
        rows = [Letters().embed_names(group) for group in groups]
        if vocabulary is query.attributes:
            prompts = [
                [f"a photo of {with_article(name, word)}" for name in ("robin", "jay")]
                for group in groups
                for word in group
            ]
            flat = [F.normalize(Letters().embed_names(texts).mean(0), dim=0) for texts in prompts]
            rows = list(torch.stack(flat).split([2, 1]))
        if merge == "max":
            assert vocabulary.owners is not None
            assert vocabulary.owners.tolist() == [row for row, group in enumerate(groups) for _ in group]
            assert torch.allclose(vocabulary.embeddings, torch.cat(rows))
        else:
            means = torch.stack([F.normalize(group.sum(0), dim=0) for group in rows])
            assert vocabulary.owners is None and torch.allclose(vocabulary.embeddings, means)


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
        ({"synonyms": {"cta": ["puss"]}}, "synonyms of 'cta': not a name of the query, expected one such as 'cat'"),
        ({"names": {"a": ["x", "y"]}, "synonyms": {"x": "z"}}, "synonyms of x: the text 'z', expected a list"),
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


class Counted:
    """An encoder that counts the sentences of each call."""

    teacher, prompt_set = "counted", "none"

    def __init__(self, encoder: ClipTextEncoder) -> None:
        self.encoder, self.counts = encoder, list[int]()

    def embed_names(self, names: Sequence[str]) -> Tensor:
        return self.encoder.embed_names(names)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        self.counts.append(len(captions))
        return self.encoder.embed_captions(captions)


def tiny_encoder() -> ClipTextEncoder:
    torch.manual_seed(0)
    config = ClipConfig(
        embed_dim=8, text={"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    )
    return ClipTextEncoder(config, build_text_tower(config), "tiny")


def test_prompts_of_a_request_are_embedded_in_bounded_parts_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, names, counts = tiny_encoder(), [f"thing {n}" for n in range(20)], list[int]()
    whole = Counted(encoder)
    expected = build_query(whole, names, {}, attributes=["red", "old"], prompts="vild", attribute_prompts="ovsam")
    assert max(whole.counts) <= SENTENCES
    embed_captions = ClipTextEncoder.embed_captions

    def counted(self: ClipTextEncoder, captions: Sequence[str]) -> Tensor:
        counts.append(len(captions))
        return embed_captions(self, captions)

    monkeypatch.setattr(ClipTextEncoder, "embed_captions", counted)
    for _ in range(2):
        query = build_query(encoder, names, {}, attributes=["red", "old"], prompts="vild", attribute_prompts="ovsam")
        assert query.attributes is not None and expected.attributes is not None
        assert torch.allclose(query.names.embeddings, expected.names.embeddings, atol=1e-5)
        assert torch.allclose(query.attributes.embeddings, expected.attributes.embeddings, atol=1e-5)
        assert max(counts) <= SENTENCES
        assert sum(counts) == 20 * 63 + 2 * 20 * 14
    for number in range(MOST_KEPT):
        build_query(encoder, ["thing 0"], {}, prompts=f"{number} {{name}}")
    counts.clear()
    build_query(encoder, ["thing 0"], {}, prompts=f"{MOST_KEPT - 1} {{name}}")
    assert not counts
    build_query(encoder, ["thing 0"], {}, prompts="vild")
    assert counts == [63]

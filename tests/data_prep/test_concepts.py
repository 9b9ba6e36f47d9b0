import time
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep import tables
from data_prep.concepts import Vocabulary, build_groups, inflections
from data_prep.pictograms import GLYPHS
from ovd_models.errors import InputError


def named(lines: list[str], caption: str) -> list[str]:
    vocabulary = Vocabulary.parse(lines)
    return [vocabulary.names[index] for index in vocabulary.match(caption)]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("a photo of a red umbrella", ["umbrella"]),
        ("Two Red UMBRELLAS!", ["umbrella"]),
        ("three mice and a mouse", ["mouse"]),
        ("a computer mouse", ["mouse"]),
        ("mousetrap, umbrella-shaped", ["umbrella"]),
        ("the cat's hot spring", ["cat", "hot spring"]),
        ("hot springs in spring", ["hot spring", "spring"]),
        ("a hot-spring", ["hot spring"]),
        ("category", []),
        ("concatenate", []),
        ("daisies", ["daisy"]),
        ("pairs of scissors; one scissor", ["scissors"]),
        ("", []),
        ("cat cat cat", ["cat"]),
        ("le chat", ["cat"]),
    ],
)
def test_names_are_found_in_captions(caption: str, found: list[str]) -> None:
    lines = ["umbrella", "mouse, computer mouse", "cat, chat", "hot spring", "spring", "daisy", "scissors"]
    assert named(lines, caption) == found


def test_the_longest_phrase_wins() -> None:
    lines = ["bear", "teddy bear", "teddy bear picnic"]
    assert named(lines, "a teddy bear picnic") == ["teddy bear picnic"]
    assert named(lines, "a teddy bear") == ["teddy bear"]
    assert named(lines, "a teddy and a bear") == ["bear"]


def test_a_form_that_is_itself_a_name_stands_for_that_name_alone() -> None:
    assert named(["glass", "glasses"], "a pair of glasses") == ["glasses"]
    assert named(["glass", "glasses"], "a glass") == ["glass"]


def test_two_names_may_share_a_synonym() -> None:
    assert named(["bat (animal), bat", "baseball bat, bat"], "a bat") == ["bat (animal)", "baseball bat"]


def test_every_pictogram_is_found_in_singular_and_plural() -> None:
    names = list(GLYPHS)
    for name in names:
        assert named(names, f"a photo of a red {name} and nothing") == [name]
        words = name.split()
        for form in inflections(words[-1])[:1]:
            assert named(names, " ".join([*words[:-1], form])) == [name]


@pytest.mark.parametrize(
    ("word", "forms"),
    [
        ("cat", ["cats"]), ("bus", ["buses"]), ("box", ["boxes"]), ("church", ["churches"]), ("daisy", ["daisies"]),
        ("key", ["keys"]), ("tennis", ["tennises"]),
        ("die", ["dice"]), ("dice", ["die"]), ("knives", ["knife"]), ("daisies", ["daisieses", "daisy"]),
        ("boxes", ["boxeses", "box", "boxe"]), ("swords", ["swordses", "sword"]), ("glass", ["glasses"]),
        ("cactus", ["cacti"]),
    ],
)  # fmt: skip
def test_inflections(word: str, forms: list[str]) -> None:
    assert inflections(word) == forms


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["cat", ", dog"], "name 2 is ''"), (["cat", "!!"], "name 2 is '!!'"), (["cat", "Cat"], "'Cat' is listed twice")],
)
def test_a_bad_vocabulary_is_told(lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Vocabulary.parse(lines)


def test_a_vocabulary_comes_from_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("hot_air_balloon, balloon\n\ncat\n")
    vocabulary = Vocabulary.read(str(tmp_path / "names.txt"))
    assert vocabulary.names == ("hot air balloon", "cat")
    assert vocabulary.match("balloons") == [0]
    with pytest.raises(InputError, match=r"none\.txt: expected a text file of one name a line"):
        Vocabulary.read(str(tmp_path / "none.txt"))


def test_hundreds_of_names_and_many_captions_are_fast() -> None:
    vocabulary = Vocabulary.parse([f"thing{number}, other thing{number}" for number in range(1000)])
    captions = [f"a photo of a red thing{number % 1000} and an other thing7" for number in range(20_000)]
    started = time.process_time()
    found = [vocabulary.match(caption) for caption in captions]
    assert time.process_time() - started < 2.0
    assert found[3] == [3, 7]


def pairs(image_ids: list[str]) -> pa.Table:
    count = len(image_ids)
    columns = {
        "image_id": pa.array(image_ids, pa.string()),
        "shard": pa.array(["shards/00000.tar"] * count, pa.string()),
        "offset": pa.array(range(count), pa.int64()),
        "size": pa.array([1] * count, pa.int64()),
        "width": pa.array([64] * count, pa.int32()),
        "height": pa.array([64] * count, pa.int32()),
        "caption": pa.array([f"caption {number}" for number in range(count)], pa.string()),
    }
    return pa.table(columns)


def test_groups_are_ranges_of_unique_images() -> None:
    # names 0 zebra, 1 cat, 2 lonely, 3 unseen; image b comes twice with cat
    mentions = [[0, 1], [1], [1, 2], [1], [0]]
    concepts, groups = build_groups(
        pairs(["c", "b", "a", "b", "a"]), mentions, ["zebra", "cat", "lonely", "unseen"], min_images=2
    )
    assert concepts.to_pylist() == [
        {"concept_id": 0, "name": "cat", "image_count": 3, "start": 0, "stop": 3},
        {"concept_id": 1, "name": "zebra", "image_count": 2, "start": 3, "stop": 5},
    ]
    assert groups["concept_id"].to_pylist() == [0, 0, 0, 1, 1]
    assert groups["image_id"].to_pylist() == ["a", "b", "c", "a", "c"]
    assert groups["concept_ids"].to_pylist() == [[0], [0], [0, 1], [1], [0, 1]]
    assert groups["offset"].to_pylist() == [2, 1, 0, 4, 0]
    assert groups.schema.equals(tables.SCHEMAS["groups"])


def test_no_pairs_or_no_names_give_empty_tables() -> None:
    for table, mentions, names in ((pairs([]), [], ["cat"]), (pairs(["a"]), [[]], [])):
        concepts, groups = build_groups(table, mentions, names)
        assert (concepts.num_rows, groups.num_rows) == (0, 0)
        assert groups.schema.equals(tables.SCHEMAS["groups"])

from pathlib import Path

import pytest

from data_prep.concepts.names import NameMatcher, inflections
from data_prep.pictograms.world import GLYPHS
from ovd_models.errors import InputError


def named(lines: list[str], caption: str) -> list[str]:
    return NameMatcher.parse(lines).match(caption)


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


def test_names_are_in_alphabetical_order_each_once() -> None:
    assert named(["zebra", "Ant", "cat, kitten"], "kittens, a zebra, a cat and an ant") == ["Ant", "cat", "zebra"]


def test_spans_give_the_positions_of_names() -> None:
    vocabulary = NameMatcher.parse(["bear", "teddy bear"])
    assert list(vocabulary.spans(["a", "bear", "and", "two", "teddy", "bears"])) == [(1, 2, (0,)), (4, 6, (1,))]


def test_a_form_that_is_itself_a_name_matches_only_that_name() -> None:
    assert named(["glass", "glasses"], "a pair of glasses") == ["glasses"]
    assert named(["glass", "glasses"], "a glass") == ["glass"]


def test_two_names_may_share_a_synonym() -> None:
    assert named(["bat (animal), bat", "baseball bat, bat"], "a bat") == ["baseball bat", "bat (animal)"]


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
def test_a_bad_vocabulary_is_an_input_error(lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NameMatcher.parse(lines)


def test_a_vocabulary_is_read_from_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("hot_air_balloon, balloon\n\ncat\n")
    vocabulary = NameMatcher.read(str(tmp_path / "names.txt"))
    assert vocabulary.names == ("hot air balloon", "cat")
    assert vocabulary.match("balloons") == ["hot air balloon"]
    with pytest.raises(InputError, match=r"none\.txt: expected a text file of one name a line"):
        NameMatcher.read(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("names", "caption", "expected"),
    [
        (["car, sedan", "car, suv"], "a car, suv", ["car, suv"]),
        (["car, sedan", "car, suv"], "two car sedans", ["car, sedan"]),
        (["car, sedan", "sedan"], "a sedan", ["sedan"]),
        (["cup (of tea)", "tea"], "a cup of tea", ["cup (of tea)"]),
        (["ice_cream, cone"], "an ice cream cone", ["ice cream, cone"]),
    ],
)
def test_names_of_a_table_are_no_lines_with_synonyms(names: list[str], caption: str, expected: list[str]) -> None:
    assert NameMatcher.of_names(names).match(caption) == expected


def test_a_repeated_name_is_refused_with_both_rows() -> None:
    with pytest.raises(InputError, match=r"'Cat' is listed twice \(names 1 and 3\)"):
        NameMatcher.of_names(["cat", "dog", "Cat"])

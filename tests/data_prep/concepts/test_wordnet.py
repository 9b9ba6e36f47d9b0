from pathlib import Path

import pytest
from formats import LICENCE, write_wordnet

from data_prep.concepts.nouns import NounExtractor
from data_prep.concepts.wordnet import read_wordnet
from ovd_models.errors import InputError


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("truck", True), ("cake", True), ("object", True), ("mouse", True), ("fire truck", True),
        ("idea", False), ("house", False), ("city", False), ("kite", False), ("person", False), ("entity", False),
        ("truck fire", False), ("tow truck", False), ("unknown", False), ("", False),
    ],
)  # fmt: skip
def test_names_of_objects_and_food_are_concepts(tmp_path: Path, name: str, kept: bool) -> None:
    assert read_wordnet(str(write_wordnet(tmp_path / "wordnet"))).keeps(name) is kept


def test_the_rule_decides_in_place_of_the_word_lists(tmp_path: Path) -> None:
    caption = "A fire truck by the house, a mouse and an umbrella with a cake"
    assert NounExtractor().match(caption) == ["cake", "fire truck", "house", "mouse", "umbrella"]
    rule = read_wordnet(str(write_wordnet(tmp_path / "wordnet")))
    assert NounExtractor(rule=rule).match(caption) == ["cake", "fire truck", "mouse"]


def test_a_folder_without_wordnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none/index\.noun: cannot be read .*expected WordNet 3\.0"):
        read_wordnet(str(tmp_path / "none"))
    folder = write_wordnet(tmp_path / "wordnet")
    (folder / "index.noun").write_text(LICENCE)
    with pytest.raises(InputError, match=r"lacks the word 'entity' or 'object', expected the files of WordNet"):
        read_wordnet(str(folder))
    (folder / "index.noun").write_text("one two\n")
    with pytest.raises(InputError, match=r"index\.noun: line 1 is 'one two', expected WordNet 3\.0"):
        read_wordnet(str(folder))


@pytest.mark.skipif(not Path("/usr/share/wordnet").exists(), reason="Debian's package wordnet-base is absent")
def test_wordnet_itself_is_read() -> None:
    rule = read_wordnet("/usr/share/wordnet")
    kept = {"dog", "umbrella", "pizza", "frisbee", "fire hydrant", "street", "grass"}
    assert {name for name in (*kept, "idea", "sky", "city", "man", "house", "photo") if rule.keeps(name)} == kept

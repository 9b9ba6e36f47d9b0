import pickle
from typing import get_args

import pytest

from data_prep.concepts import nouns
from data_prep.concepts.names import Extractor, NameMatcher
from data_prep.concepts.nouns import NounExtractor, is_adverb, is_visual, singular
from data_prep.concepts.word_lists import WordList, read_list, word_set


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("Two boys beside a red fire hydrant.", ["boy", "fire hydrant"]),
        ("A FIRE HYDRANT AND A CAT", ["cat", "fire hydrant"]),
        ("cats, a cat and the cat's kittens", ["cat", "kitten"]),
        ("a dog in front of a mirror, on top of a couch", ["couch", "dog", "mirror"]),
        ("A group of people taking a picture", ["person"]),
        ("the bathroom wall", ["bathroom", "wall"]),
        ("chain-link fences and wine glasses", ["chain link fence", "wine glass"]),
        ("skull and crossbones", ["crossbone", "skull"]),
        ("three giraffes and a frisbee", ["frisbee", "giraffe"]),
        ("", []),
        (" ?! 12 ", []),
    ],
)
def test_visible_nouns_are_found(caption: str, found: list[str]) -> None:
    assert NounExtractor().match(caption) == found


def test_a_person_named_by_an_activity_is_one_concept() -> None:
    assert NounExtractor().match("Bicycle riders pass a baseball player") == ["baseball player", "bicycle rider"]


def test_split_spellings_of_known_words_are_one_concept() -> None:
    assert NounExtractor().match("a race horse by a neck tie") == ["neck tie", "race horse"]


def test_the_camera_that_takes_the_picture_is_left_out() -> None:
    assert NounExtractor().match("a ram is looking at the camera") == ["ram"]
    assert NounExtractor().match("a woman holds a camera") == ["camera", "woman"]


def test_a_couple_is_a_concept_but_a_couple_of_things_is_not() -> None:
    assert NounExtractor().match("the couple on a bench") == ["bench", "couple"]
    assert NounExtractor().match("a couple of cows") == ["cow"]


def test_activities_are_left_out_and_things_in_ing_stay() -> None:
    assert NounExtractor().match("a man skiing past a building, snow boarding") == ["building", "man"]


def test_names_of_places_and_people_are_left_out() -> None:
    assert NounExtractor().match("The tower of a church in Paris, England") == ["church", "tower"]
    assert NounExtractor().match("street signs on the corner of Gladys and Detroit") == ["street sign"]


def test_nouns_of_a_title_are_found_in_spite_of_capitals() -> None:
    assert NounExtractor().match("Young Couple Holding Hands On The Beach") == ["beach", "couple", "hand"]


def test_other_scripts_and_symbols_are_skipped() -> None:
    assert NounExtractor().match("😀 a cat 🐈 кошка 一只猫坐在桌子上") == ["cat"]
    assert NounExtractor().match("a café with naïve décor") == ["café", "décor"]
    assert NounExtractor().match("x" * 100_000 + " " + "猫" * 1000 + " dog") == ["dog"]


@pytest.mark.parametrize(
    ("plural", "one"),
    [
        ("cats", "cat"), ("boxes", "box"), ("buses", "bus"), ("houses", "house"), ("glasses", "glasses"),
        ("dresses", "dress"), ("benches", "bench"), ("dishes", "dish"), ("cherries", "cherry"), ("cookies", "cookie"),
        ("shoes", "shoe"), ("tomatoes", "tomato"), ("gloves", "glove"), ("knives", "knife"), ("werewolves", "werewolf"),
        ("women", "woman"), ("snowmen", "snowman"), ("grandchildren", "grandchild"), ("people", "person"),
        ("mice", "mouse"), ("pumice", "pumice"), ("dice", "die"), ("sheep", "sheep"), ("skis", "ski"), ("tvs", "tv"),
        ("grass", "grass"), ("cactus", "cactus"), ("tennis", "tennis"), ("pants", "pants"), ("specimen", "specimen"),
        ("crossbones", "crossbone"), ("ox", "ox"),
    ],
)  # fmt: skip
def test_plurals_become_singular(plural: str, one: str) -> None:
    assert singular(plural) == one


@pytest.mark.parametrize(
    ("noun", "visual"),
    [
        ("cat", True), ("station", True), ("basement", True), ("building", True), ("king", True), ("fence", True),
        ("happiness", False), ("tradition", False), ("skiing", False), ("photo", False), ("front", False), ("", False),
    ],
)  # fmt: skip
def test_only_visible_nouns_count(noun: str, visual: bool) -> None:
    assert is_visual(noun) is visual


def test_the_word_lists_agree() -> None:
    assert not word_set("concrete") & word_set("nonvisual")
    assert not word_set("tagger_misses") & word_set("nonvisual")
    assert all(nouns.ABSTRACT.fullmatch(noun) for noun in word_set("concrete"))
    assert all(noun.endswith("ing") for noun in word_set("ing_nouns"))
    assert all(singular(word) == word for word in word_set("tagger_misses") | word_set("roles"))
    assert all(" " in name or "-" in name for name in word_set("compounds"))


@pytest.mark.parametrize("name", get_args(WordList))
def test_a_word_list_has_entries_and_each_once(name: WordList) -> None:
    entries = read_list(name)
    assert len(entries) > 20
    assert len(set(entries)) == len(entries)
    assert all(entry == " ".join(entry.lower().split()) for entry in entries)


def test_a_worker_gets_the_extractor_without_its_model() -> None:
    NounExtractor().match("a cat")
    data = pickle.dumps(NounExtractor())
    assert len(data) < 200
    assert pickle.loads(data).match("two cats") == ["cat"]


def test_both_extractors_have_one_interface() -> None:
    extractors: list[Extractor] = [NounExtractor(), NameMatcher.parse(["cat", "dog"])]
    assert [extractor.match("two dogs and a cat") for extractor in extractors] == [["cat", "dog"]] * 2


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a boy in a soccer jersey", ["boy", "soccer jersey"]),
        ("two baseball uniforms on a chair", ["baseball uniform", "chair"]),
        ("a tennis skirt and a golf bag", ["golf bag", "tennis skirt"]),
        ("hockey pads beside a football banner", ["football banner", "hockey pad"]),
        ("a baseball on a bathroom wall", ["baseball", "bathroom", "wall"]),
        ("a water pitcher by a train window", ["train", "water pitcher", "window"]),
    ],
)
def test_a_thing_named_by_its_sport_is_one_concept(caption: str, expected: list[str]) -> None:
    assert NounExtractor().match(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a couple in wedding attire", ["couple", "wedding attire"]),
        ("a child in a knight outfit", ["child", "knight outfit"]),
        ("two men in scout uniforms", ["man", "scout uniform"]),
        ("a girl with face piercings", ["face piercing", "girl"]),
        ("a tile flooring beside a brick building", ["brick", "building", "flooring", "tile"]),
        ("a man in a uniform", ["man", "uniform"]),
    ],
)
def test_clothing_and_a_verbs_noun_keep_what_names_them(caption: str, expected: list[str]) -> None:
    assert NounExtractor().match(caption) == expected


@pytest.mark.parametrize("word", ["overhead", "inside", "outside"])
def test_an_adverb_behind_a_noun_is_none(word: str) -> None:
    assert NounExtractor().match(f"a fruit stand with an insect {word}") == ["fruit stand", "insect"]
    assert NounExtractor().match("the inside of a bus")[0] == "bus"


def test_an_adverb_that_is_never_a_noun_is_none() -> None:
    assert is_adverb("below") and not is_adverb("netting") and not is_adverb("qwxyz")
    assert NounExtractor().match("the batter behind the netting below") == ["batter", "netting"]

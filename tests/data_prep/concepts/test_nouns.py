import pickle
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.concepts import nouns
from data_prep.concepts.names import Extractor, NameMatcher
from data_prep.concepts.nouns import Nouns, singular, visual
from ovd_models.errors import InputError


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
def test_what_can_be_seen_is_found(caption: str, found: list[str]) -> None:
    assert Nouns().match(caption) == found


def test_persons_named_by_what_they_do_are_one_concept() -> None:
    assert Nouns().match("Bicycle riders pass a baseball player") == ["baseball player", "bicycle rider"]


def test_split_spellings_of_known_words_are_one_concept() -> None:
    assert Nouns().match("a race horse by a neck tie") == ["neck tie", "race horse"]


def test_the_camera_that_is_looked_at_is_not_seen() -> None:
    assert Nouns().match("a ram is looking at the camera") == ["ram"]
    assert Nouns().match("a woman holds a camera") == ["camera", "woman"]


def test_a_couple_is_seen_but_a_couple_of_things_is_not() -> None:
    assert Nouns().match("the couple on a bench") == ["bench", "couple"]
    assert Nouns().match("a couple of cows") == ["cow"]


def test_what_is_done_is_left_out_and_what_is_made_stays() -> None:
    assert Nouns().match("a man skiing past a building, snow boarding") == ["building", "man"]


def test_names_of_places_and_people_are_left_out() -> None:
    assert Nouns().match("The tower of a church in Paris, England") == ["church", "tower"]
    assert Nouns().match("street signs on the corner of Gladys and Detroit") == ["street sign"]


def test_capitals_of_a_title_hide_no_noun() -> None:
    assert Nouns().match("Young Couple Holding Hands On The Beach") == ["beach", "couple", "hand"]


def test_other_scripts_and_symbols_are_passed_over() -> None:
    assert Nouns().match("😀 a cat 🐈 кошка 一只猫坐在桌子上") == ["cat"]
    assert Nouns().match("a café with naïve décor") == ["café", "décor"]
    assert Nouns().match("x" * 100_000 + " " + "猫" * 1000 + " dog") == ["dog"]


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
    ("noun", "seen"),
    [
        ("cat", True), ("station", True), ("basement", True), ("building", True), ("king", True), ("fence", True),
        ("happiness", False), ("tradition", False), ("skiing", False), ("photo", False), ("front", False), ("", False),
    ],
)  # fmt: skip
def test_only_what_is_seen_counts(noun: str, seen: bool) -> None:
    assert visual(noun) is seen


def test_the_word_lists_agree() -> None:
    vocabulary, compounds = nouns.phrases()
    assert not nouns.CONCRETE & nouns.NONVISUAL
    assert not nouns.CERTAIN & nouns.NONVISUAL
    assert all(nouns.ABSTRACT.fullmatch(noun) for noun in nouns.CONCRETE)
    assert all(noun.endswith("ing") for noun in nouns.ING)
    assert {singular(word) for word in nouns.CERTAIN | nouns.ROLES} == nouns.CERTAIN | nouns.ROLES
    assert all(" " in name or "-" in name for name in vocabulary.names[:compounds])


def test_a_worker_gets_the_extractor_without_its_model() -> None:
    Nouns().match("a cat")
    data = pickle.dumps(Nouns())
    assert len(data) < 200
    assert pickle.loads(data).match("two cats") == ["cat"]


def test_nouns_and_a_vocabulary_are_used_alike() -> None:
    extractors: list[Extractor] = [Nouns(), NameMatcher.parse(["cat", "dog"])]
    assert [extractor.match("two dogs and a cat") for extractor in extractors] == [["cat", "dog"]] * 2


def test_spacy_is_asked_for_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, disable: list[str]) -> Any:
        assert name == "en_core_web_sm"
        tags = {"cat": "NOUN", "sees": "VERB", "frobs": "PROPN", "paris": "PROPN"}

        def pipeline(doc: list[str]) -> list[SimpleNamespace]:
            return [SimpleNamespace(pos_=tags.get(word, "DET")) for word in doc]

        pipeline.vocab = None  # type: ignore[attr-defined]
        return pipeline

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    monkeypatch.setitem(sys.modules, "spacy.tokens", SimpleNamespace(Doc=lambda vocab, words: words))
    nouns.spacy.cache_clear()
    assert Nouns("spacy").match("the cat sees frobs in Paris") == ["cat", "frob"]
    nouns.spacy.cache_clear()


def test_spacy_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    monkeypatch.setitem(sys.modules, "spacy.tokens", None)
    nouns.spacy.cache_clear()
    with pytest.raises(InputError, match="expected the packages spacy and en_core_web_sm"):
        Nouns("spacy").match("a cat")

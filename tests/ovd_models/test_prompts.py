import hashlib
import json

import pytest
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from reference_data import LVIS, PARITY, needs

from ovd_models.errors import InputError
from ovd_models.prompts import (
    COLOURS,
    PROMPT_SETS,
    clean_name,
    find_prompt_set,
    prompts_of,
    split_synonyms,
    with_article,
)


@pytest.mark.parametrize(
    ("name", "word", "phrase"),
    [
        ("anchor", "", "an anchor"),
        ("cat", "", "a cat"),
        ("anchor", "red", "a red anchor"),
        ("cat", "orange", "an orange cat"),
        ("Umbrella", "", "an Umbrella"),
        ("100 m race", "", "a 100 m race"),
    ],
)
def test_articles_follow_the_next_word(name: str, word: str, phrase: str) -> None:
    assert with_article(name, word) == phrase
    assert with_article(name, word, "a").startswith("a ")


def test_prompt_sets_put_the_name_behind_its_article() -> None:
    assert prompts_of("anchor", "name") == ["an anchor"]
    assert prompts_of("anchor", "bare") == ["anchor"]
    assert prompts_of("cat", "photo") == ["a photo of a cat"]
    colours = prompts_of("anchor", "colours")
    assert len(colours) == 1 + len(COLOURS)
    assert colours[:2] == ["a photo of an anchor", "a photo of a red anchor"]
    assert colours[4] == "a photo of an orange anchor"


def test_braces_in_a_name_stay() -> None:
    assert prompts_of("{a} {0} cat", "name") == ["a {a} {0} cat"]


def test_the_article_of_any_set_can_be_chosen() -> None:
    assert prompts_of("anchor", "name:a") == ["a anchor"]
    assert "a photo of an anchor." in prompts_of("anchor", "imagenet:an")
    assert "an embroidered anchor." in prompts_of("anchor", "imagenet:an")
    assert "a embroidered anchor." in prompts_of("anchor", "imagenet")


def test_the_imagenet_set_holds_clips_80_sentences() -> None:
    ours = prompts_of("anchor", "imagenet")
    assert len(ours) == 80
    assert set(ours) == {template("anchor") for template in OPENAI_IMAGENET_TEMPLATES}


def test_the_vild_set_has_the_families_of_its_notebook() -> None:
    ours = prompts_of("anchor", "vild")
    assert len(set(ours)) == 63
    families = {"in the scene": 5, "itap": 3, "hard to see": 2, "black and white": 2, "painting": 2, "plushie": 2}
    assert {family: sum(family in prompt for prompt in ours) for family in families} == families
    pairs = {"good bad": 4, "nice cool weird": 6, "small large": 4, "clean dirty": 4, "bright dark": 4}
    found = {pair: sum(f" {word} " in prompt for prompt in ours for word in pair.split()) for pair in pairs}
    assert found == pairs
    assert sum(prompt.startswith("This is ") for prompt in prompts_of("anchor", "vild-this")) == 58
    assert {prompt.removeprefix("This is ") for prompt in prompts_of("anchor", "vild-this")} == set(ours)


@needs("parity/goldens/text/ovsam_descriptions.json")
def test_ovsams_templates_and_synonyms_are_those_recorded() -> None:
    recorded = json.loads((PARITY / "goldens/text/ovsam_descriptions.json").read_text())
    templates = [prompt.replace("@", "{}") for prompt in prompts_of("@", "ovsam")]
    assert len(templates) == recorded["n_templates"]
    assert hashlib.sha256("\n".join(templates).encode()).hexdigest() == recorded["templates_sha256"]
    for name, synonyms in recorded["split_examples"].items():
        assert split_synonyms(name) == synonyms
    assert prompts_of("aerosol can", "ovsam")[:2] == recorded["LVISV1Dataset"]["first"]


@needs("data/lvis/lvis_v1_categories.json")
def test_lvis_names_are_cleaned_and_stay_distinct() -> None:
    names = [entry["name"] for entry in json.loads((LVIS / "lvis_v1_categories.json").read_text())]
    cleaned = [clean_name(name) for name in names]
    assert len(set(cleaned)) == len(names) == 1203
    assert not any(set("_/") & set(name) or name.endswith(".") or name != name.lower() for name in cleaned)
    assert sum(len(split_synonyms(name)) for name in names) == 1204


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("aerosol_can", "aerosol can"),
        ("Bible/Holy_Book", "bible or holy book"),
        ("chicken_(animal)", "chicken (animal)"),
        ("Dr.", "dr"),
        ("Christmas_tree", "christmas tree"),
    ],
)
def test_names_are_cleaned_by_vilds_rule(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned


def test_custom_templates_are_a_set_of_their_own() -> None:
    assert prompts_of("anchor", "a drawing of {a}. | the {name}|see {a:old}") == [
        "a drawing of an anchor.",
        "the anchor",
        "see an old anchor",
    ]


@pytest.mark.parametrize("bad", ["{name}|a photo", "{nam}", "{name} {", "a {0} {name}", "{name}|"])
def test_templates_without_a_place_for_the_name_are_told(bad: str) -> None:
    with pytest.raises(InputError, match=r"expected {a}, {a:word} or {name} in every template"):
        find_prompt_set(bad)


@pytest.mark.parametrize("unknown", ["none", "", "name:the"])
def test_an_unknown_prompt_set_is_told(unknown: str) -> None:
    with pytest.raises(
        InputError, match=f"prompt set '{unknown}': unknown, expected one of name, bare, photo, colours"
    ):
        prompts_of("cat", unknown)


def test_every_set_names_its_source_and_has_no_template_twice() -> None:
    for name, prompt_set in PROMPT_SETS.items():
        assert prompt_set.source, name
        assert len(set(prompts_of("cat", name))) == len(prompt_set.templates)

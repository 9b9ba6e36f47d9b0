import dataclasses
import json
import re

import pytest
import torch
from reference_data import needs

from benchmarks import parity_packs
from ovd_models.codet.model import CoDet
from ovd_models.errors import InputError
from ovd_models.importers import codet as importers
from ovd_models.prompts import prompts_of

RELEASES = importers.released_architectures()
MANIFESTS = {
    "r50_c4": "codet_ovcoco_r50c4",
    "centernet2_r50": "codet_ovlvis_r50",
    "centernet2_swin_b": "codet_ovlvis_swinb",
    "centernet2_eva02_l": "codet_ovlvis_eva",
}
needs_manifests = needs("parity")


def shapes(architecture: str) -> dict[str, list[int]]:
    entries = json.loads((parity_packs.PACKS / "manifests" / f"{MANIFESTS[architecture]}.json").read_text())
    return {name: shape for name, (shape, _) in entries.items()}


def on_meta(release: importers.Release) -> CoDet:
    with torch.device("meta"):
        return CoDet(release.config)


# ------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("architecture", RELEASES)
def test_no_two_of_our_tensors_have_the_same_released_name(architecture: str) -> None:
    release = RELEASES[architecture]
    names = [theirs for ours in on_meta(release).state_dict() for theirs in importers.released_names(ours, release)]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith("detector.")]


def test_names_end_where_the_released_ones_begin() -> None:
    release = RELEASES["centernet2_r50"]
    assert importers.released_names("detector.stages.2.head.fc6.bias", release) == ["roi_heads.box_head.2.fc1.bias"]
    assert importers.released_names("aggregations.1.score.weight", release) == ["roi_heads.box_predictor.1.fc2.weight"]
    scales = importers.released_names("detector.proposals.scales", release)
    assert scales == [f"proposal_generator.centernet_head.scales.{level}.scale" for level in range(5)]


def test_a_name_is_found_by_its_longest_ending() -> None:
    wanted = "roi_heads.box_predictor.fc1.weight"
    assert importers.find_name({"box_predictor.fc1.weight": 0, "fc1.weight": 0}, wanted) == "box_predictor.fc1.weight"
    assert importers.find_name({"predictor.fc1.weight": 0}, wanted) is None  # no part of a name is cut
    second = {"roi_heads.box_predictor.weight_transform.0.weight": 0}
    assert importers.find_name(second, wanted) == "roi_heads.box_predictor.weight_transform.0.weight"


@needs_manifests
@pytest.mark.parametrize("architecture", RELEASES)
def test_the_architecture_is_recognised_from_the_names(architecture: str) -> None:
    release = importers.recognise_release(shapes(architecture), "file")
    assert release.rules == RELEASES[architecture].rules
    assert release.config.aggregation == "learned"
    expected = (2, 32) if architecture == "r50_c4" else (8, 128)
    assert (release.config.group_size, release.config.num_proposals) == expected


@needs_manifests
def test_a_file_without_the_perceptron_is_read_too() -> None:
    perceptron = re.compile(r"box_predictor\.\d\.(fc|weight_transform)")
    bare = {name: shape for name, shape in shapes("centernet2_r50").items() if not perceptron.search(name)}
    assert importers.recognise_release(bare, "file").config.aggregation == "maximum"
    account = importers.account_codet_tensors(bare, "file")
    assert (account.unaccounted, account.missing) == ((), ())


@needs_manifests
def test_unknown_and_missing_tensors_are_listed() -> None:
    names = shapes("r50_c4") | {"roi_heads.unheard.weight": [3]}
    del names["backbone.stem.conv1.weight"]
    account = importers.account_codet_tensors(names, "file")
    assert account.unaccounted == ("roi_heads.unheard.weight",)
    assert account.missing == ("detector.backbone.conv1.weight",)


def test_files_of_other_models_are_refused() -> None:
    with pytest.raises(InputError, match="r50_c4"):
        importers.recognise_release({"layer1.0.conv1.weight": [64, 64, 1, 1]}, "other.pth")


def state_of(model: CoDet, release: importers.Release) -> dict[str, torch.Tensor]:
    """A released state dict for a model, on meta."""
    state: dict[str, torch.Tensor] = {}
    for ours, value in model.state_dict().items():
        names = importers.released_names(ours, release)
        parts = value.split(1) if len(names) > 1 else [value]
        state.update(zip(names, parts, strict=True))
    return state


@pytest.mark.parametrize("architecture", RELEASES)
def test_a_missing_or_misshapen_tensor_is_named(architecture: str) -> None:
    release = RELEASES[architecture]
    model = on_meta(release)
    state = state_of(model, release)
    assert list(importers.translate_state(state, model, release, "file")) == list(model.state_dict())
    name = next(name for name in state if name.endswith("cls_score.linear.weight"))
    with pytest.raises(InputError, match=rf"{name} has shape \[1\]"):
        importers.translate_state(state | {name: torch.zeros(1)}, model, release, "file")
    del state[name]
    with pytest.raises(InputError, match=f"{name} is missing"):
        importers.translate_state(state, model, release, "file")


def test_the_first_convolution_takes_red_first_in_ours() -> None:
    release = RELEASES["r50_c4"]
    model = on_meta(release)
    state = state_of(model, release)
    first = torch.arange(3.0).view(1, 3, 1, 1).expand(64, 3, 7, 7)
    translated = importers.translate_state(state | {"backbone.stem.conv1.weight": first}, model, release, "file")
    assert translated["detector.backbone.conv1.weight"][0, :, 0, 0].tolist() == [2, 1, 0]


def test_names_have_the_releases_article_also_before_a_vowel() -> None:
    assert prompts_of("umbrella", importers.text_config().prompt_set) == ["a umbrella"]


def test_the_text_tower_is_open_clips_and_says_what_does_not_fit() -> None:
    tower = importers.build_text_tower(
        dataclasses.replace(importers.text_config(), text={**importers.TEXT_CONFIG, "layers": 1})
    )
    with pytest.raises(InputError, match="text encoder"):
        importers.import_text_encoder(dict(tower.state_dict()), "file.pth")

import json
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ovd_models
from ovd_models import predictors
from ovd_models.checkpoint_info import read_source, write_calibration
from ovd_models.checkpoints import from_json, load_encoder, load_model, read_info, save_checkpoint
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, load_clip, save_clip
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.encoded import EncodedRegions
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.errors import InputError
from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.ovsam.text_to_mask import TextToMask, TextToMaskModelConfig
from ovd_models.predictors import load
from ovd_models.vild.model import EncodedViLD
from ovd_models.vocabulary import EmbeddingTable, TextEncoder, Vocabulary, build_vocabulary

NAMES = ("anchor", "umbrella", "snowman")
CONFIG = CoDetConfig(
    detector=RCNNConfig(
        backbone_options={"channels": [8, 16, 24, 32], "stem_width": 8},
        pyramid_channels=16,
        head_width=32,
        embed_dim=16,
        min_size=64,
        max_size=128,
        pre_nms=60,
        post_nms=30,
    )
)
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def table(names: tuple[str, ...] = NAMES) -> EmbeddingTable:
    rows = np.random.default_rng(0).normal(size=(len(names), 16)).astype(np.float32)
    return EmbeddingTable.from_array(names, rows, "names.npy")


def trained(seed: int = 0) -> CoDet:
    """A model whose every weight and statistic differs from a fresh one's."""
    torch.manual_seed(seed)
    model = CoDet(CONFIG)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value += 0.01 * torch.rand_like(value)
        assert name
    return model.eval()


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), np.uint8)
    return Image.fromarray(pixels).resize((90, 60))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    splits = dict(zip(NAMES, ("base", "base", "novel"), strict=True))
    save_checkpoint(trained(), table(), folder, splits=splits, run={"config": "test"})
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def test_three_lines_find_and_draw(whole: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "street.png")
    detector = ovd_models.load(whole)
    found = detector.detect(tmp_path / "street.png", ["umbrella", "anchor"], score_threshold=0.0)
    found.draw(tmp_path / "found.png")
    assert (found.width, found.height) == (90, 60)
    assert {entry["label"] for entry in found.to_list()} <= {"umbrella", "anchor"}
    assert Image.open(tmp_path / "found.png").size == (480, 320)  # enlarged until the shorter side has 320 px


def test_detections_before_saving_and_after_loading_are_equal(whole: Path) -> None:
    tensor = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    before = trained().detect([tensor], build_vocabulary(table(), NAMES), score_threshold=0.0)[0]
    after = ovd_models.load(whole).detect(picture(), score_threshold=0.0)
    assert len(before)
    assert torch.equal(before.boxes, after.boxes)
    assert torch.equal(before.scores, after.scores)
    assert torch.equal(before.labels, after.labels)
    assert before.names == after.names == NAMES


def test_every_kind_of_image_gives_the_same_answer(whole: Path, tmp_path: Path) -> None:
    detector = ovd_models.load(whole)
    picture().save(tmp_path / "a.png")
    array = np.array(picture())
    kinds = [str(tmp_path / "a.png"), tmp_path / "a.png", picture(), array, torch.from_numpy(array).permute(2, 0, 1)]
    answers = [detector.detect(kind, score_threshold=0.0) for kind in kinds]
    assert all(torch.equal(entry.boxes, answers[0].boxes) for entry in answers)
    assert all(entry.image is not None and entry.image.size == (90, 60) for entry in answers)


def test_one_image_gives_one_answer_and_a_list_a_list(whole: Path) -> None:
    detector = ovd_models.load(whole)
    assert detector.detect([]) == []
    several = detector.detect([picture(), picture(1)], ["anchor"])
    assert [type(entry).__name__ for entry in several] == ["Detections"] * 2
    assert len(detector.detect([picture()])) == 1


def test_an_image_of_a_list_is_answered_as_alone(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, sizes = ovd_models.load(whole), [(90, 60)] * 3 + [(60, 90), (200, 60)]
    frames = [picture(number).resize(size) for number, size in enumerate(sizes)]
    monkeypatch.setattr(predictors, "BATCH", 2)
    encode, batches = detector.encode, []

    def noted(images: Sequence[Tensor]) -> Sequence[EncodedRegions | EncodedViLD]:
        batches.append(len(images))
        return encode(images)

    monkeypatch.setattr(detector, "encode", noted)
    together = detector.detect(frames, score_threshold=0.0)
    assert batches == [2, 1, 1, 1]
    for frame, found in zip(frames, together, strict=True):
        alone = detector.detect(frame, score_threshold=0.0)
        assert len(alone) and found.labels.tolist() == alone.labels.tolist()
        assert torch.allclose(found.boxes, alone.boxes, atol=1e-3) and found.image is not None
        assert found.image.size == frame.size


def test_proposals_of_an_image_of_a_list_are_those_of_it_alone(whole: Path) -> None:
    detector, sizes = ovd_models.load(whole), [(90, 60)] * 2 + [(200, 60), (90, 60)]
    frames = [picture(number).resize(size) for number, size in enumerate(sizes)]
    assert detector.propose([], 9) == []
    for frame, (boxes, scores) in zip(frames, detector.propose(frames, 9), strict=True):
        ((own_boxes, own_scores),) = detector.propose([frame], 9)
        assert len(boxes) == len(scores) > 0
        assert torch.allclose(boxes, own_boxes, atol=1e-3) and torch.allclose(scores, own_scores, atol=1e-5)
    with pytest.raises(InputError, match="images of 200 x 60 and 90 x 60 pixels in one batch, expected one size"):
        detector.encode([detector.read(frame) for frame in frames])


def test_detections_of_a_rotated_photograph_are_drawn_on_the_upright_one(whole: Path) -> None:
    rotated = picture()
    rotated.getexif()[0x0112] = 6
    found = ovd_models.load(whole).detect(rotated)
    assert (found.width, found.height) == (60, 90)
    assert found.image is not None
    assert found.image.size == (60, 90)


def test_the_default_threshold_is_where_the_checkpoint_was_best(folder: Path) -> None:
    assert ovd_models.load(folder).info.score_threshold == 0.3  # never evaluated
    everything = ovd_models.load(folder).detect(picture(), score_threshold=0.0)
    best = float(everything.scores.max())
    for threshold, expected in ((0.0, len(everything)), (best + 0.002, 0)):
        write_calibration(folder, threshold, "pictograms")
        detector = ovd_models.load(folder)
        assert threshold - 0.001 <= detector.info.score_threshold <= threshold
        assert len(detector.detect(picture())) == expected
    assert len(everything)
    (folder / "calibration.json").write_text("{}")
    with pytest.raises(InputError, match=r"calibration\.json: not a calibration"):
        ovd_models.load(folder)


def test_a_uri_is_refused_with_what_takes_it() -> None:
    with pytest.raises(InputError, match=r"s3://bucket/model: a URI, .*workflows\.common\.models\.load takes URIs"):
        ovd_models.load("s3://bucket/model")
    with pytest.raises(InputError, match=r"models:/a@champion: a URI"):
        ovd_models.load("models:/a@champion")


def test_a_checkpoint_tells_what_it_is(whole: Path) -> None:
    detector = ovd_models.load(whole)
    assert (detector.method, detector.prompt_set, detector.vocabulary) == ("codet", "given", NAMES)
    assert detector.teacher.startswith("names.npy:")
    info = read_info(whole)
    assert info.splits == {"anchor": "base", "umbrella": "base", "snowman": "novel"}
    assert info.run == {"config": "test"}


def test_a_checkpoint_with_a_text_tower_takes_any_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = Clip(ClipConfig(embed_dim=16, text=TEXT))
    encoder = ClipTextEncoder(clip.config, clip.model.text, "clip:test")
    save_checkpoint(trained(), encoder, tmp_path / "m", splits=dict.fromkeys(NAMES, "base"), run={})
    detector = ovd_models.load(tmp_path / "m")
    assert detector.detect(picture(), ["a name nobody thought of", "日本"]).names == (
        "a name nobody thought of",
        "日本",
    )
    assert torch.allclose(detector.encoder.embed_names(["cat"]), encoder.embed_names(["cat"]), atol=1e-6)
    size = sum(path.stat().st_size for path in (tmp_path / "m" / "text").iterdir())
    assert size < 1.1 * 4 * sum(value.numel() for value in clip.model.text.state_dict().values())  # no image tower


# -------------------------------------------------------------------------------------------------- bad input


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load(folder)
    text = str(caught.value)
    assert message in text
    assert str(folder) in text
    assert "\n" not in text


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no detector checkpoint, expected config.json and model.safetensors")


def test_a_clip_folder_is_told_apart(tmp_path: Path) -> None:
    save_clip(Clip(ClipConfig(embed_dim=16, text=TEXT)), tmp_path)
    refused(tmp_path, "it holds a CLIP model, not a detector")


def test_another_method_is_refused(folder: Path) -> None:
    edit(folder, lambda raw: raw.update(method="ovsam"))
    refused(folder, "checkpoint of method 'ovsam', expected 'codet' or 'vild'")


@pytest.mark.parametrize("found", [None, 2, "1"])
def test_another_format_is_refused(folder: Path, found: object) -> None:
    edit(folder, lambda raw: raw.update(format=found))
    refused(folder, f"format {found!r}, this program reads format 1")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"codet"', '{"format": 1}'])
def test_a_broken_config_is_told(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, "config.json: not a checkpoint config")


def test_a_config_that_is_not_text_is_told(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "not a checkpoint config")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 17}, "size mismatch"),
        ({"unheard": 1}, "unknown field 'unheard' of RCNNConfig"),
        ({"backbone": "no_such_net"}, "Unknown model"),
        ({"strides": [4, 7, 16]}, "7 is not in list"),
        ({"pyramid_channels": -1}, "negative"),
        ({"pyramid_channels": "many"}, "not a readable codet checkpoint"),
        ({"backbone_options": {"unheard": 1}}, "unexpected keyword argument 'unheard'"),
    ],
)
def test_a_tampered_model_config_is_told(folder: Path, change: dict[str, Any], message: str) -> None:
    edit(folder, lambda raw: raw["model"]["detector"].update(change))
    refused(folder, message)


def test_a_truncated_weights_file_is_told(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(folder, "not a readable codet checkpoint")


def test_missing_weights_are_told(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "not a readable codet checkpoint")


@pytest.mark.parametrize("file", ["table.json", "table.safetensors"])
def test_a_broken_table_of_names_is_told(folder: Path, file: str) -> None:
    (folder / "text" / file).write_bytes(b"{")
    refused(folder, "not a readable table of embedded names")


def test_a_missing_text_encoder_is_told(folder: Path) -> None:
    shutil.rmtree(folder / "text")
    refused(folder, "no CLIP checkpoint")


@pytest.mark.parametrize("names", [None, ["anchor"], 3])
def test_a_table_whose_names_do_not_fit_its_rows_is_told(folder: Path, names: object) -> None:
    path = folder / "text" / "table.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "names": names}))
    refused(folder, "not a readable table of embedded names")


# ------------------------------------------------------------------------------------------------ from_json


def test_a_config_survives_json() -> None:
    config = replace(CONFIG, num_proposals=7, guidance="none")
    again = from_json(CoDetConfig, json.loads(json.dumps(asdict(config))))
    assert again == config
    assert isinstance(again.detector.strides, tuple)
    assert isinstance(again.detector.backbone_options["channels"], list)


def test_absent_fields_take_their_defaults() -> None:
    assert from_json(CoDetConfig, {}) == CoDetConfig()
    assert from_json(CoDetConfig, {"detector": {"embed_dim": 5}}).detector == RCNNConfig(embed_dim=5)


def test_unknown_fields_are_refused_at_every_depth() -> None:
    with pytest.raises(TypeError, match="unknown field 'b' of CoDetConfig"):
        from_json(CoDetConfig, {"b": 1})
    with pytest.raises(TypeError, match="unknown field 'c' of RCNNConfig"):
        from_json(CoDetConfig, {"detector": {"c": 1}})


# ------------------------------------------------------------------------------------- tables and vocabularies


def test_rows_of_a_table_are_normalised_and_chosen_by_name() -> None:
    found = EmbeddingTable.from_array(("a", "b"), np.array([[3.0, 4.0], [0.0, 2.0]], np.float16), "x/y.npy")
    assert torch.allclose(found.embed_names(["b", "a", "b"]), torch.tensor([[0.0, 1.0], [0.6, 0.8], [0.0, 1.0]]))
    assert found.teacher.startswith("y.npy:")
    assert found.embed_captions(["a"]) is None


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match="name 'zebra': not in the table of 3 embedded names"):
        table().embed_names(["anchor", "zebra"])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4)), "array of shape \\[2, 4\\], expected one row for each of 3"),
        (np.zeros(3), "expected one row"),
        (np.zeros((3, 4, 1)), "expected one row"),
        (np.full((3, 4), np.nan), "holds NaN or infinite"),
        (np.full((3, 4), 1e300), "holds NaN or infinite"),  # too large for float32
        (np.zeros((3, 4)), "zero"),
        (np.full((3, 4), "x"), "expected"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_rows_that_do_not_fit_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        EmbeddingTable.from_array(NAMES, array, "rows.npy")
    assert str(caught.value).startswith("rows.npy: ")


def test_names_are_trimmed_and_each_kept_once() -> None:
    vocabulary = build_vocabulary(table(), [" anchor", "snowman", "anchor "], {"anchor": "base", "snowman": "novel"})
    assert vocabulary.names == ("anchor", "snowman")
    assert vocabulary.is_base is not None
    assert vocabulary.is_base.tolist() == [True, False]
    assert len(vocabulary) == len(vocabulary.embeddings) == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "vocabulary: empty"), (["anchor", " "], r"vocabulary\[1\]: ' '"), ([3], r"vocabulary\[0\]: 3")],
)
def test_bad_vocabularies_are_told(names: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_vocabulary(table(), names)


def test_what_is_no_encoder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no CLIP checkpoint"):
        load_encoder(tmp_path)


def test_a_table_survives_its_folder(folder: Path) -> None:
    encoder: TextEncoder = load_encoder(folder / "text")
    assert torch.equal(encoder.embed_names(NAMES), table().embeddings)
    assert (encoder.teacher, encoder.prompt_set) == (table().teacher, "given")
    moved = Vocabulary(NAMES, encoder.embed_names(NAMES)).to(torch.device("cpu"))
    assert moved.is_base is None


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw["model"])
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda model: model["detector"]["backbone_options"].update(pretrained_cfg={"url": "http://x/y"}),
            "pretrained_cfg",
        ),
        (lambda model: model["detector"]["backbone_options"].update(checkpoint_path="/etc/passwd"), "checkpoint_path"),
        (lambda model: model["detector"]["backbone_options"].update(pretrained=True), "pretrained"),
        (lambda model: model["detector"].update(backbone="hf-hub:evil/model"), "an address"),
        (lambda model: model["detector"].update(backbone="local-dir:/tmp/x"), "an address"),
        (lambda model: model["detector"].update(head_width=1_000_000), "a model of"),
        (lambda model: model["detector"].update(head_convs=10**9), "head_convs"),
    ],
)
def test_an_untrusted_config_opens_nothing_and_takes_no_memory(
    change: Callable[[dict[str, Any]], None], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(CoDet(CONFIG), table(), tmp_path, splits={}, run={})
    change_config(tmp_path, change)
    opened: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: opened.append(arguments))
    with pytest.raises(InputError, match=expected):
        load_model(tmp_path, CoDet)
    assert opened == []


NESTED = "[" * 100_000
"""JSON that no parser of bounded depth reads."""


@pytest.mark.parametrize("file", ["config.json", "calibration.json", "text/table.json"])
@pytest.mark.parametrize("content", [NESTED, '{"a":' * 100_000, "[[" * 400 + "]]" * 400, "\0", "9" * 5000])
def test_a_folder_with_hostile_json_is_refused_in_one_line(file: str, content: str, folder: Path) -> None:
    (folder / file).write_text(content)
    refused(folder, "not a")


@pytest.mark.parametrize("content", [NESTED, "[]", "3", '{"a": ['])
def test_a_record_of_released_files_that_is_none_is_told(content: str, folder: Path) -> None:
    (folder / "source.json").write_text(content)
    with pytest.raises(InputError, match=r"source\.json: not a record of released files") as caught:
        read_source(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 3, "text", [1], {"a": 1}])
@pytest.mark.parametrize("key", ["method", "model", "vocabulary", "splits", "run"])
def test_fields_of_another_type_are_told(key: str, value: object, folder: Path) -> None:
    fitting = {"method": str, "model": dict, "vocabulary": list, "splits": dict, "run": dict}[key]
    if not isinstance(value, fitting):
        edit(folder, lambda raw: raw.update({key: value}))
        refused(folder, f"config.json: {key} is a {type(value).__name__}, expected a {fitting.__name__}")


def test_a_path_with_a_nul_byte_is_no_checkpoint() -> None:
    for read in (load, load_clip, load_encoder, lambda path: load_model(path, CoDet)):
        with pytest.raises(InputError, match=r"no .*checkpoint"):
            read("a\0b")


@pytest.mark.parametrize(
    "vision",
    [
        {"timm_model_name": "hf-hub:evil/model", "image_size": 64},
        {"timm_model_name": "local-dir:/tmp/evil", "image_size": 64},
        {"timm_model_name": "resnet10t", "timm_model_pretrained": True, "timm_pool": "avg", "image_size": 64},
    ],
)
@pytest.mark.parametrize("method", ["clip", "ovsam", "text_to_mask"])
def test_towers_of_an_untrusted_config_are_not_fetched(
    method: str, vision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if method == "clip":
        save_clip(Clip(ClipConfig()), tmp_path)
        file, place = tmp_path / "clip.json", ("config",)
    else:
        model = OvSam(OvSamConfig()) if method == "ovsam" else TextToMask(TextToMaskModelConfig())
        save_checkpoint(model, table(), tmp_path, splits={}, run={})
        file, place = tmp_path / "config.json", ("model", "tower")
    raw = json.loads(file.read_text())
    part = raw
    for key in place:
        part = part[key]
    part["vision"] = vision
    file.write_text(json.dumps(raw))
    opened: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: opened.append(arguments))
    with pytest.raises(InputError) as caught:
        if method == "clip":
            load_clip(tmp_path)
        else:
            load_model(tmp_path, OvSam, TextToMask)
    assert "\n" not in str(caught.value)
    assert opened == []


def test_a_text_tower_on_a_hub_is_refused(tmp_path: Path) -> None:
    clip = Clip(ClipConfig())
    save_clip(clip, tmp_path)
    raw = json.loads((tmp_path / "clip.json").read_text())
    raw["config"]["text"]["hf_model_name"] = "evil/model"
    (tmp_path / "clip.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="on a hub"):
        load_clip(tmp_path)

import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.constants import INCEPTION_MEAN, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from safetensors.torch import save_file

from ovd_models.clip import model as clip_module
from ovd_models.clip.model import Clip, ClipConfig, load_clip, load_text_encoder, open_clip_model, save_clip
from ovd_models.clip.pretrained import architecture, find_weights
from ovd_models.errors import InputError

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
NAME = "ViT-small-for-tests"
CAPTIONS = ["a cat", "a photo of an anchor"]


@pytest.fixture(autouse=True)
def small_architecture(tmp_path_factory: pytest.TempPathFactory) -> None:
    """open_clip knows an architecture of 1.6 million parameters."""
    path = tmp_path_factory.mktemp("configs") / f"{NAME}.json"
    path.write_text(json.dumps(SMALL))
    open_clip.add_model_config(path)


def released(quick_gelu: bool = False) -> CLIP:
    torch.manual_seed(0)
    model = CLIP(SMALL["embed_dim"], SMALL["vision_cfg"], SMALL["text_cfg"], quick_gelu=quick_gelu)
    for value in model.parameters():
        value.data.mul_(3)  # a fresh model's activations are so small that GELU and QuickGELU agree
    return model.eval()


def pictures(model: Clip) -> torch.Tensor:
    side = model.config.image_size
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def features(model: Clip, peer: CLIP) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ours and open_clip's, of images and of texts."""
    tokens = model.tokenize(CAPTIONS)
    with torch.no_grad():
        pixels = model.normalise(pictures(model).float() / 255)
        theirs = peer.encode_image(pixels, normalize=True), peer.encode_text(tokens, normalize=True)
        return list(zip((model.encode_images(pictures(model)), model.encode_tokens(tokens)), theirs, strict=True))


def as_torch(model: CLIP, path: Path) -> None:
    torch.save(model.state_dict(), path)


def as_half(model: CLIP, path: Path) -> None:
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def as_training_checkpoint(model: CLIP, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)


@pytest.mark.parametrize(
    ("save", "file", "tolerance"),
    [
        (as_torch, "weights.pt", 1e-5),
        (as_half, "weights.safetensors", 5e-3),
        (as_training_checkpoint, "epoch_3.pt", 1e-5),
    ],
)
def test_a_file_of_weights_gives_open_clips_features(
    tmp_path: Path, save: Callable[[CLIP, Path], None], file: str, tolerance: float
) -> None:
    peer = released()
    save(peer, tmp_path / file)
    model, teacher = load_clip(NAME, str(tmp_path / file))
    assert not model.training
    assert model.config.statistics == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    for ours, theirs in features(model, peer):
        assert torch.allclose(ours, theirs, atol=tolerance)
    encoder = load_text_encoder(NAME, str(tmp_path / file))
    assert encoder.teacher == teacher == load_clip(NAME, str(tmp_path / file))[1]
    assert encoder.prompt_set == "vild"


def test_released_weights_become_a_checkpoint_of_ours(tmp_path: Path) -> None:
    as_torch(released(), tmp_path / "weights.pt")
    model, teacher = load_clip(NAME, str(tmp_path / "weights.pt"))
    assert save_clip(model, tmp_path / "ours") == teacher
    again, known_as = load_clip(tmp_path / "ours")
    assert (again.config, known_as) == (model.config, teacher)
    assert torch.equal(again.encode_images(pictures(model)), model.encode_images(pictures(model)))
    assert torch.equal(
        load_text_encoder(tmp_path / "ours").embed_names(["cat"]),
        load_text_encoder(NAME, str(tmp_path / "weights.pt")).embed_names(["cat"]),
    )


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_openais_form_has_quick_gelu(tmp_path: Path) -> None:
    peer = released(quick_gelu=True)
    for name, value in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 49408)):
        peer.__dict__.pop(name, None)
        peer.register_buffer(name, torch.tensor(value))
    traced = torch.jit.trace_module(
        peer,
        {
            "forward": (torch.ones(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.int64)),
            "encode_image": (torch.ones(2, 3, 32, 32),),
            "encode_text": (torch.ones(2, 16, dtype=torch.int64),),
        },
    )
    torch.jit.save(traced, tmp_path / "openai.pt")
    model, _ = load_clip(NAME, str(tmp_path / "openai.pt"))
    assert model.config.quick_gelu
    for ours, theirs in features(model, peer):
        assert torch.allclose(ours, theirs, atol=1e-5)
    plain = Clip(ClipConfig(name=NAME)).eval()
    plain.model.load_state_dict(model.model.state_dict())
    assert not torch.allclose(plain.encode_images(pictures(model)), model.encode_images(pictures(model)), atol=1e-4)
    assert load_text_encoder(NAME, str(tmp_path / "openai.pt")).config.quick_gelu
    save_clip(model, tmp_path / "ours")
    assert load_clip(tmp_path / "ours")[0].config.quick_gelu


def test_a_tag_tells_how_its_weights_were_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    assert config["quick_gelu"]
    as_torch(released(), tmp_path / "weights.pt")
    told = {**config, "mean": INCEPTION_MEAN}
    monkeypatch.setattr(clip_module, "find_weights", lambda name, tag: (tmp_path / "weights.pt", told))
    model = open_clip_model(ClipConfig(name=NAME), "openai")
    assert model.config.quick_gelu
    assert (model.config.mean, model.config.resize_mode) == (INCEPTION_MEAN, "shortest")
    assert model.normalise.mean == list(INCEPTION_MEAN)


def test_pictures_are_resized_as_open_clip_does() -> None:
    model = Clip(ClipConfig(name=NAME, resize_mode="shortest"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 110, 3), np.uint8))
    theirs = open_clip.image_transform(
        32, is_train=False, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD, resize_mode="shortest"
    )(picture)
    assert torch.allclose(model.normalise(model.prepare([picture]).float() / 255)[0], theirs, atol=1e-5)
    assert model.prepare([]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-31", r"model 'ViT-B-31': unknown to open_clip; near ones are .*ViT-B-32"),
        ("", "--pretrained none: expected --model.name, or a checkpoint folder"),
        ("coca_ViT-B-32", "writes captions, expected one of two towers"),
        (NAME, "--pretrained none: no such file and no weights of ViT-small-for-tests, whose tags are none"),
        ("ViT-B-32", "--pretrained none: no such file and no weights of ViT-B-32, whose tags are openai, "),
    ],
)
def test_unknown_models_and_weights_are_told(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_clip_model(ClipConfig(name=name), "none")
    assert "\n" not in str(caught.value)


def test_an_architecture_alone_has_no_weights() -> None:
    with pytest.raises(InputError, match="ViT-B-32: an architecture without weights, expected --pretrained"):
        load_clip("ViT-B-32")


def test_unfit_and_unreadable_files_are_told(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.pt", tmp_path / "other.pt"
    broken.write_bytes(b"no weights")
    as_torch(released(), other)
    for name, path in ((NAME, broken), ("RN50", other)):
        with pytest.raises(InputError, match=path.name) as caught:
            load_clip(name, str(path))
        assert "\n" not in str(caught.value)


def test_a_missing_network_is_one_line_and_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr("ovd_models.clip.pretrained.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^--pretrained openai: https://\S+ cannot be reached and no copy is on this"):
        find_weights("ViT-B-32", "openai")


def test_every_two_tower_architecture_has_a_config() -> None:
    names = [name for name in open_clip.list_models() if not name.lower().startswith("coca")]
    for name in names:
        found = architecture(name)
        assert found["vision_cfg"]["image_size"] > 0
        assert not found["vision_cfg"]["timm_model_pretrained"]
    assert ClipConfig(name="ViT-B-16-SigLIP").loss == "siglip"
    assert ClipConfig(name="RN50-quickgelu").quick_gelu


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "convnext_base"])
def test_published_architectures_load_from_a_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = architecture(name)
    peer = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).eval()
    as_torch(peer, tmp_path / "weights.pt")
    model, _ = load_clip(name, str(tmp_path / "weights.pt"))
    assert isinstance(model.model, CustomTextCLIP)
    for ours, theirs in features(model, peer):
        assert torch.allclose(ours, theirs, atol=1e-4)

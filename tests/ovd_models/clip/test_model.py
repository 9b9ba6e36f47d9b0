import json
import math
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from open_clip.loss import ClipLoss, SigLipLoss
from reference_data import PARITY, load_fill, needs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ovd_models.clip.model import (
    Clip,
    ClipConfig,
    ClipTextEncoder,
    load_clip,
    load_text_encoder,
    save_clip,
    save_text_encoder,
    weights_digest,
    zero_shot_logits,
)
from ovd_models.errors import InputError
from ovd_models.prompts import prompts_of

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIG = ClipConfig(embed_dim=16, text=TEXT)
CAPTIONS = ["a cat", "a photo of a red umbrella and an anchor", "", "x " * 100]


def build(config: ClipConfig = CONFIG, seed: int = 0) -> Clip:
    torch.manual_seed(seed)
    model = Clip(config)
    # open_clip's start is so small that all texts look alike: larger weights make differences visible
    for value in model.model.text.transformer.parameters():
        value.data.mul_(5)
    return model.eval()


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_features_are_unit_rows_and_the_scale_is_positive() -> None:
    model = build()
    images, texts, scale = model(pictures(3), model.tokenize(["a cat", "a dog", "an anchor"]))
    assert images.shape == texts.shape == (3, 16)
    assert torch.allclose(images.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(texts.norm(dim=1), torch.ones(3), atol=1e-5)
    assert scale.item() == pytest.approx(math.exp(2.7), rel=1e-5)


def test_the_tiny_model_has_the_size_that_is_promised() -> None:
    model = Clip(ClipConfig())
    assert sum(value.numel() for value in model.parameters()) == pytest.approx(7.5e6, rel=0.02)
    assert sum(value.numel() for value in model.model.visual.parameters()) == pytest.approx(0.8e6, rel=0.05)


def test_cropped_texts_embed_as_whole_ones() -> None:
    model = build()
    for batch in (CAPTIONS, *([caption] for caption in CAPTIONS)):
        tokens = model.tokenize(batch)
        whole = F.normalize(model.model.text(tokens).float(), dim=-1)
        assert torch.allclose(model.encode_tokens(tokens), whole, atol=1e-5)
    assert not torch.allclose(whole[0], model.encode_tokens(model.tokenize(["a cat"]))[0], atol=1e-2)


@pytest.mark.parametrize("caption", ["a cat !~", "wow !~ a cat"])
def test_exclamation_marks_do_not_crop_the_end(caption: str) -> None:
    model = build()
    tokens = model.tokenize([caption])
    assert (tokens[0, : int(tokens.argmax())] == 0).any()
    whole = F.normalize(model.model.text(tokens).float(), dim=-1)
    assert torch.allclose(model.encode_tokens(tokens), whole, atol=1e-5)


def test_the_scale_is_clamped_from_above() -> None:
    model = build()
    model.model.logit_scale.data.fill_(9.0)
    model.clamp_scale()
    assert model.model.logit_scale.exp().item() == pytest.approx(50, rel=1e-5)
    model.model.logit_scale.data.fill_(1.0)
    model.clamp_scale()
    assert model.model.logit_scale.item() == 1.0


def test_a_name_is_the_mean_of_its_prompts() -> None:
    model = build()
    encoder = ClipTextEncoder(CONFIG, model.model.text, "clip:test")
    rows = model.encode_tokens(model.tokenize(prompts_of("anchor", CONFIG.templates)))
    assert torch.allclose(encoder.embed_names(["cat", "anchor"])[1], F.normalize(rows.mean(0), dim=0), atol=1e-5)


def test_remembered_names_keep_their_order_and_repeats() -> None:
    encoder = ClipTextEncoder(CONFIG, build().model.text, "clip:test")
    first = encoder.embed_names(["cat", "dog"])
    again = encoder.embed_names(["dog", "bird", "cat", "dog"])
    assert torch.equal(again[[2, 0]], first)
    assert torch.equal(again[0], again[3])


def test_many_captions_embed_as_in_small_parts() -> None:
    encoder = ClipTextEncoder(CONFIG, build().model.text, "clip:test")
    captions = [f"a photo of {number} cats" for number in range(300)]  # more than one batch of 256
    rows = encoder.embed_captions(captions)
    some = encoder.embed_captions(captions[250:260])
    assert rows is not None
    assert some is not None
    assert torch.allclose(rows[250:260], some, atol=1e-5)


def test_zero_shot_is_a_softmax_over_scaled_cosines() -> None:
    model = build()
    encoder = ClipTextEncoder(CONFIG, model.model.text, "clip:test")
    text = encoder.embed_names(["cat", "dog", "anchor"])
    logits = zero_shot_logits(model, pictures(2), text)
    expected = math.exp(2.7) * model.encode_images(pictures(2)) @ text.T
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not logits.requires_grad


# --------------------------------------------------------------------------------- the loss of one big batch

FRESH = ClipConfig(embed_dim=16, text={**TEXT, "layers": 1})
WORDS = ["a cat", "a red dog", "an anchor", "two birds", "a blue cup", "a house"]
LOSSES = ["clip", "siglip"]


def frozen_statistics(model: Clip) -> Clip:
    """Batch statistics differ between a part of a batch and the whole, so they are left out of the comparison."""
    return model.eval()


def objective(kind: str, rank: int = 0, world: int = 1) -> nn.Module:
    if kind == "siglip":
        return SigLipLoss(rank=rank, world_size=world)
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)


def big_batch(kind: str) -> tuple[Clip, Tensor]:
    """A model with the gradients of all six pairs, and their loss."""
    model = frozen_statistics(build(replace(FRESH, loss=kind)))
    loss = objective(kind)(*model(pictures(6), model.tokenize(WORDS)))
    loss.backward()
    return model, loss.detach()


def assert_same_gradients(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert float((gradients[name] - value.grad).abs().max()) <= 1e-3 * float(value.grad.abs().max()), name


def gradients_on_rank(rank: int, port: int, folder: str, chunks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    own = slice(3 * rank, 3 * rank + 3)
    for kind in LOSSES:
        model = frozen_statistics(build(replace(FRESH, loss=kind)))
        model.chunks = chunks
        wrapped = DistributedDataParallel(model)  # reduces gradients for as long as it is alive
        features = wrapped(pictures(6)[own], model.tokenize(WORDS)[own])
        loss = objective(kind, rank, 2)(*features)
        loss.backward()
        gradient = {name: value.grad for name, value in model.named_parameters()}
        torch.save((loss.detach(), gradient), Path(folder) / f"{kind}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("chunks", [1, 2])
def test_two_workers_have_the_gradients_of_one_big_batch(tmp_path: Path, chunks: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    mp.spawn(gradients_on_rank, (port, str(tmp_path), chunks), nprocs=2)
    for kind in LOSSES:
        model, loss = big_batch(kind)
        parts = [torch.load(tmp_path / f"{kind}{rank}.pt") for rank in range(2)]
        assert torch.stack([part for part, _ in parts]).mean().item() == pytest.approx(loss.item(), rel=1e-5)
        for _, gradients in parts:
            assert_same_gradients(model, gradients)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("chunks", [2, 4, 6])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(kind: str, chunks: int) -> None:
    model, loss = big_batch(kind)
    parts = frozen_statistics(build(replace(FRESH, loss=kind)))
    parts.chunks = chunks
    in_parts = objective(kind)(*parts(pictures(6), parts.tokenize(WORDS)))
    in_parts.backward()
    assert in_parts.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(
        model, {name: value.grad for name, value in parts.named_parameters() if value.grad is not None}
    )


def test_parts_keep_the_activations_of_one_part_only() -> None:
    def kept(chunks: int) -> int:
        model = build()
        model.chunks = chunks
        sizes: list[int] = []

        def pack(value: Tensor) -> Tensor:
            sizes.append(value.numel() if value.requires_grad else 0)
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            model(pictures(16), model.tokenize(["a cat"] * 16))
        return sum(sizes)

    assert kept(8) < kept(1) / 20


def test_parts_are_seen_once_by_batch_norm_and_with_the_same_dropout() -> None:
    def fresh() -> Clip:
        model = build().train()
        model.model.visual.trunk.layers.append(nn.Dropout(0.5))
        torch.manual_seed(1)
        return model

    model, by_hand = fresh(), fresh()
    model.chunks = 2
    tokens = model.tokenize(WORDS[:4])
    torch.manual_seed(1)
    ClipLoss()(*model(pictures(4), tokens)).backward()
    torch.manual_seed(1)
    images = torch.cat([by_hand.encode_images(part) for part in pictures(4).chunk(2)])
    texts = torch.cat([by_hand.encode_tokens(part) for part in tokens.chunk(2)])
    ClipLoss()(images, texts, by_hand.model.logit_scale.exp()).backward()
    assert_same_gradients(
        by_hand, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    )
    for (name, ours), (_, expected) in zip(model.named_buffers(), by_hand.named_buffers(), strict=True):
        if name.endswith(("running_mean", "running_var")):
            assert torch.allclose(ours, expected, atol=1e-6), name
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_siglip_is_a_sigmoid_of_every_pair() -> None:
    model = build(replace(FRESH, loss="siglip"))
    images, texts, scale, bias = model(pictures(3), model.tokenize(WORDS[:3]))
    assert (scale.item(), bias.item()) == (pytest.approx(10), -10)
    total = 0.0
    for row in range(3):
        for column in range(3):
            sign = 1 if row == column else -1
            logit = float(scale * images[row] @ texts[column] + bias)
            total += math.log(1 + math.exp(-sign * logit)) / 3
    assert SigLipLoss()(images, texts, scale, bias).item() == pytest.approx(total, rel=1e-4)


# ------------------------------------------------------------------------------------------------- parity


@needs("parity")
def test_the_text_tower_computes_what_clips_does() -> None:
    fill = load_fill()
    golden = np.load(PARITY / "goldens/text/clip_text_encoder.npz")
    model = Clip(ClipConfig(name="ViT-B-32-quickgelu")).eval()
    filled = {}
    for name, value in model.model.text.state_dict().items():
        released = fill.value(f"text_encoder.{name}", tuple(value.shape))
        filled[name] = torch.from_numpy(released) * (0.3 if name == "positional_embedding" else 1)
    model.model.text.load_state_dict(filled)
    captions = golden["captions"].tolist()
    tokens = model.tokenize(captions)
    assert np.array_equal(tokens.numpy(), golden["tokens"])
    expected = F.normalize(torch.from_numpy(golden["features"]), dim=1)
    with torch.no_grad():
        assert torch.allclose(model.encode_tokens(tokens), expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------- checkpoints


def test_a_loaded_model_can_be_trained_and_saved_where_it_came_from(tmp_path: Path) -> None:
    save_clip(build(), tmp_path)
    before = (tmp_path / "clip.safetensors").read_bytes()
    model, teacher = load_clip(tmp_path)
    assert all(value.requires_grad for value in model.parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    ClipLoss()(*model(pictures(3), model.tokenize(WORDS[:3]))).backward()
    optimiser.step()
    assert (tmp_path / "clip.safetensors").read_bytes() == before
    expected = model.encode_images(pictures(3))
    assert save_clip(model, tmp_path) != teacher
    again, _ = load_clip(tmp_path)
    assert torch.equal(again.encode_images(pictures(3)), expected)
    assert torch.equal(model.encode_images(pictures(3)), expected)  # which still looks into the old file


def test_a_model_survives_its_folder(tmp_path: Path) -> None:
    model = build()
    teacher = save_clip(model, tmp_path / "clip")
    again, known_as = load_clip(tmp_path / "clip")
    assert known_as == teacher == f"clip:{weights_digest(model.model.state_dict())}"
    assert again.config == model.config
    assert not again.training
    for first, second in zip(
        model(pictures(2), model.tokenize(["a", "b"])), again(pictures(2), again.tokenize(["a", "b"])), strict=True
    ):
        assert torch.equal(first, second)


def test_text_halves_of_both_kinds_of_folder_agree(tmp_path: Path) -> None:
    save_clip(build(), tmp_path / "whole")
    encoder = load_text_encoder(tmp_path / "whole")
    save_text_encoder(encoder, tmp_path / "text")
    again = load_text_encoder(tmp_path / "text")
    assert torch.equal(encoder.embed_names(["cat", "a snowman"]), again.embed_names(["cat", "a snowman"]))
    assert again.teacher == encoder.teacher
    assert again.prompt_set == "colours"
    config = json.loads((tmp_path / "text" / "clip.json").read_text())["config"]  # nothing is left open there
    assert (config["mean"], config["max_logit_scale"], config["prompt_set"]) == ([0.5] * 3, 50, "colours")


def test_the_teacher_id_changes_with_any_weight() -> None:
    state = build().model.state_dict()
    changed = {name: value.clone() for name, value in state.items()}
    changed["logit_scale"] += 1e-6
    assert weights_digest(state) != weights_digest(changed)
    assert weights_digest(state) == weights_digest(dict(reversed(state.items())))


def change_config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / "clip.json").read_text())
        raw["config"].update(changes)
        (folder / "clip.json").write_text(json.dumps(raw))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "clip.json").unlink(), "no CLIP checkpoint"),
        (lambda folder: (folder / "clip.json").write_text("{"), "not a readable CLIP checkpoint"),
        (lambda folder: (folder / "clip.json").write_text("[]"), "not a readable CLIP checkpoint"),
        (lambda folder: (folder / "clip.safetensors").unlink(), "not a readable CLIP checkpoint"),
        (lambda folder: (folder / "clip.safetensors").write_bytes(b"no"), "not a readable CLIP checkpoint"),
        (change_config(embed_dim=17), "weights do not fit the config"),
        (change_config(unheard=1), "not a readable CLIP checkpoint"),
    ],
)
@pytest.mark.parametrize("load", [load_clip, load_text_encoder])
def test_a_broken_folder_is_told_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str, load: Callable[[Path], object]
) -> None:
    save_clip(build(), tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"text": None}, {"embed_dim": "x"}])
def test_a_tampered_config_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_clip(build(), tmp_path)
    change_config(**changes)(tmp_path)
    with pytest.raises(InputError):
        load_text_encoder(tmp_path)

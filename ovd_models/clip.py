"""CLIP through open_clip: building, the contrastive loss, embedding of images and names, and its checkpoint folder.

B images or texts, K names, P prompts of a name, D embedding width.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from open_clip.transformer import TextTransformer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import Normalize

from ovd_models.errors import InputError
from ovd_models.prompts import prompts_of

MAX_LOGIT_SCALE = 50.0
"""Upper bound of the contrastive temperature's inverse during training."""
MAX_KNOWN_NAMES = 100_000
"""Embedded names that a text encoder keeps."""
TOKENIZER = "ViT-B-32"
"""The open_clip model whose byte-pair tokenizer is used: all CLIP models of OpenAI's kind share it."""


class FlatConvNet(nn.Module):
    """A small image tower for small images: stride-2 convolutions, flattened without pooling, so place is kept.

    Args:
        image_size: side of the square input, a multiple of 16.
        widths: channels of the stem and of the three stages.
    """

    def __init__(self, image_size: int = 64, widths: Sequence[int] = (24, 48, 96, 144)) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv_norm_relu(3, widths[0], stride=2)]
        for width_in, width_out in itertools.pairwise(widths):
            layers += [*_conv_norm_relu(width_in, width_out, stride=2), *_conv_norm_relu(width_out, width_out)]
        self.layers = nn.Sequential(*layers)
        self.num_features = widths[-1] * (image_size // 16) ** 2
        self.default_cfg: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, num_features]."""
        return torch.flatten(self.layers(images), 1)

    def reset_classifier(self, num_classes: int) -> None:
        """open_clip's call to remove a classifier; there is none."""


def _conv_norm_relu(width_in: int, width_out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
    return convolution, nn.BatchNorm2d(width_out), nn.ReLU(inplace=True)


@register_model
def flat_convnet_64(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
) -> FlatConvNet:
    """`FlatConvNet` for 64 px images, under a name that open_clip configs can give as `timm_model_name`.

    The arguments are timm's and of no effect: there are no pretrained weights.
    """
    return FlatConvNet()


def _tiny_vision() -> dict[str, Any]:
    return {"timm_model_name": "flat_convnet_64", "timm_pool": "", "timm_proj": "linear", "image_size": 64}


def _tiny_text() -> dict[str, Any]:
    return {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2}


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """An open_clip architecture; the defaults are a tiny one for 64 px images (7.5 M parameters, 0.8 M for images)."""

    embed_dim: int = 128
    vision: dict[str, Any] = field(default_factory=_tiny_vision)
    """open_clip's `vision_cfg`."""
    text: dict[str, Any] = field(default_factory=_tiny_text)
    """open_clip's `text_cfg`."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    prompt_set: str = "colours"
    quick_gelu: bool = False
    """The activation of OpenAI's own weights."""

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return int(self.vision["image_size"])


class Clip(nn.Module):
    """An open_clip model with its tokenizer and its image normalisation."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.model = CustomTextCLIP(
            config.embed_dim, dict(config.vision), dict(config.text), quick_gelu=config.quick_gelu, init_logit_scale=2.7
        )
        self.tokenizer = open_clip.get_tokenizer(TOKENIZER, context_length=int(config.text["context_length"]))
        self.normalise = Normalize(config.mean, config.std)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, S, S] uint8 and [B, T] tokens -> unit image and text features [B, D] and the logit scale."""
        return self.encode_images(images), self.encode_tokens(tokens), self.model.logit_scale.exp()

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 RGB of the model's size -> [B, D] unit rows."""
        return F.normalize(self.model.encode_image(self.normalise(images.float() / 255)).float(), dim=-1)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, D] unit rows."""
        return encode_tokens(self.model.text, tokens)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """[B, T] tokens; sentences longer than the context are cut."""
        tokens: Tensor = self.tokenizer(list(texts))
        return tokens

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the logit scale at or below `MAX_LOGIT_SCALE`; called after every optimiser step."""
        self.model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def encode_tokens(tower: Any, tokens: Tensor) -> Tensor:
    """[B, T] -> [B, D] unit rows, on the longest sentence's length instead of T.

    Exact for CLIP's own towers, where attention is causal and the end token's feature is taken; others get all of T.
    """
    causal = isinstance(tower, TextTransformer) and tower.pool_type == "argmax" and tower.cls_emb is None
    if not causal or tower.use_pad_mask or tower.attn_mask is None:
        return F.normalize(tower(tokens).float(), dim=-1)
    length = int(tokens.argmax(1).max()) + 1  # the end token has the highest id; padding shares its id with "!"
    tokens = tokens[:, :length]
    hidden = tower.token_embedding(tokens) + tower.positional_embedding[:length]
    hidden = tower.ln_final(tower.transformer(hidden, attn_mask=tower.attn_mask[:length, :length]))
    pooled = hidden[torch.arange(len(tokens)), tokens.argmax(-1)] @ tower.text_projection
    return F.normalize(pooled.float(), dim=-1)


@torch.no_grad()
def zero_shot_logits(model: Clip, images: Tensor, text_KD: Tensor) -> Tensor:
    """[B, 3, S, S] uint8 -> [B, K] cosine logits times the learned scale; their softmax are the probabilities."""
    logits: Tensor = model.model.logit_scale.exp() * model.encode_images(images) @ text_KD.T
    return logits


class ClipTextEncoder:
    """The text half of a CLIP checkpoint: what a detector needs to understand new names.

    Args:
        config: the whole model's config.
        tower: open_clip's text tower.
        teacher: identifies the model and its weights.
    """

    def __init__(self, config: ClipConfig, tower: nn.Module, teacher: str) -> None:
        self.config, self.teacher, self.prompt_set = config, teacher, config.prompt_set
        self.tower = tower.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(TOKENIZER, context_length=int(config.text["context_length"]))
        self._known: dict[str, Tensor] = {}

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """[K, D] unit rows: the prompts' unit embeddings averaged and normalised; recent names are remembered."""
        if len(self._known) + len(names) > MAX_KNOWN_NAMES:
            self._known.clear()
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        if new:
            prompts_KP = [prompts_of(name, self.prompt_set) for name in new]
            flat = self._encode([prompt for prompts in prompts_KP for prompt in prompts])
            rows_KD = F.normalize(flat.view(len(new), len(prompts_KP[0]), -1).mean(1), dim=-1)
            self._known.update(zip(new, rows_KD, strict=True))
        return torch.stack([self._known[name] for name in names])

    def embed_captions(self, captions: Sequence[str]) -> Tensor | None:
        """[B, D] unit rows."""
        return self._encode(captions)

    @torch.no_grad()
    def _encode(self, sentences: Sequence[str]) -> Tensor:
        """[B, D]."""
        batches = (self.tokenizer(list(sentences[start : start + 256])) for start in range(0, len(sentences), 256))
        return torch.cat([encode_tokens(self.tower, tokens) for tokens in batches])


def weights_digest(state: dict[str, Tensor]) -> str:
    """16 hexadecimal digits of all weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_clip(model: Clip, folder: str | Path) -> str:
    """Write `clip.json` and `clip.safetensors`; returns the teacher id.

    The weights are written first, so that a folder with `clip.json` is whole.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.model.state_dict().items()}
    teacher = f"clip:{weights_digest(state)}"
    save_file(state, target / "clip.safetensors")
    (target / "clip.json").write_text(json.dumps({"teacher": teacher, "config": asdict(model.config)}, indent=1))
    return teacher


def save_text_encoder(encoder: ClipTextEncoder, folder: Path) -> None:
    """Write the text tower alone in the same form."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"text.{name}": value.contiguous() for name, value in encoder.tower.state_dict().items()}
    save_file(state, folder / "clip.safetensors")
    (folder / "clip.json").write_text(
        json.dumps({"teacher": encoder.teacher, "config": asdict(encoder.config)}, indent=1)
    )


def _read(folder: str | Path) -> tuple[ClipConfig, str, dict[str, Tensor]]:
    source = Path(folder)
    if not (source / "clip.json").is_file():
        raise InputError(f"{source}: no CLIP checkpoint (clip.json); `python workflows/clip.py` makes one")
    try:
        raw = json.loads((source / "clip.json").read_text())
        config = ClipConfig(
            **{**raw["config"], "mean": tuple(raw["config"]["mean"]), "std": tuple(raw["config"]["std"])}
        )
        return config, str(raw["teacher"]), load_file(source / "clip.safetensors")
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"{source}: not a readable CLIP checkpoint ({error})") from error


def load_clip(folder: str | Path) -> tuple[Clip, str]:
    """The model of a checkpoint folder, in evaluation mode, and its teacher id.

    Raises:
        InputError: there is no such checkpoint, or it is broken.
    """
    config, teacher, state = _read(folder)
    try:
        model = Clip(config)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise InputError(f"{folder}: no model can be built from its config ({type(error).__name__})") from error
    _load_weights(model.model, state, folder)
    return model.eval(), teacher


def load_text_encoder(folder: str | Path) -> ClipTextEncoder:
    """The text half of a checkpoint folder, whole or text only.

    Raises:
        InputError: there is no such checkpoint, or it is broken.
    """
    config, teacher, state = _read(folder)
    try:
        tower = build_text_tower(config)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise InputError(f"{folder}: no model can be built from its config ({type(error).__name__})") from error
    text = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    _load_weights(tower, text, folder)
    return ClipTextEncoder(config, tower, teacher)


def build_text_tower(config: ClipConfig) -> nn.Module:
    """The text tower of a config.

    open_clip builds one only as part of a whole model: the smallest image tower is built and dropped.
    """
    vision = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}
    tower: nn.Module = CustomTextCLIP(config.embed_dim, vision, dict(config.text), quick_gelu=config.quick_gelu).text
    return tower


def _load_weights(module: nn.Module, state: dict[str, Tensor], folder: str | Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise InputError(f"{folder}: weights do not fit the config ({first})") from error

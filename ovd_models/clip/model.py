"""CLIP through open_clip: building, embedding of images and names, and its checkpoint folder.

B images or texts, K names, P prompts of a name, D embedding width.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import Normalize

from ovd_models.clip.pretrained import architecture, find_weights, load_released, offline
from ovd_models.clip.towers import image_features, text_features, trim_tokens
from ovd_models.errors import InputError, as_input_error
from ovd_models.prompts import find_prompt_set, prompts_of

MAX_CACHED_NAMES = 100_000
"""Maximum names whose embeddings a text encoder caches."""
SENTENCES = 512
"""Sentences embedded at a time."""
FILLS = {"normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "trunc_normal_"}
"""Functions of torch that draw initial weights."""
TOKENIZER = "ViT-B-32"
"""The open_clip model whose byte-pair tokenizer is used; all CLIP models of OpenAI's kind share it."""
Tokenizer = Callable[[list[str]], Tensor]

TINY_VISION = {"timm_model_name": "flat_convnet_64", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
TINY_TEXT = {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2}


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """An open_clip architecture; the defaults are a tiny one for 64 px images (7.5 M parameters, 0.8 M for images)."""

    name: str = ""
    """An architecture of open_clip, such as `ViT-B-32`, `RN50` or `convnext_base`, whose towers replace `vision` and
    `text`; empty for these."""
    embed_dim: int = 128
    vision: dict[str, Any] = field(default_factory=TINY_VISION.copy)
    """open_clip's `vision_cfg`."""
    text: dict[str, Any] = field(default_factory=TINY_TEXT.copy)
    """open_clip's `text_cfg`."""
    quick_gelu: bool = False
    """The activation of OpenAI's weights and some others."""
    loss: Literal["clip", "siglip"] = "clip"
    """Softmax over the batch, or a sigmoid for every pair, with a learned bias of the logits."""
    mean: tuple[float, float, float] | None = None
    """Mean of the images' normalisation; None for 0.5, or for OpenAI's if `name` is given."""
    std: tuple[float, float, float] | None = None
    resize_mode: Literal["squash", "shortest", "longest"] = "squash"
    """How images become squares: distorted, cropped to the shorter side, or padded to the longer."""
    max_logit_scale: float | None = None
    """Upper bound of the logit scale in training; None for 50, or for CLIP's 100 if `name` is given."""
    prompt_set: str = ""
    """See `ovd_models/prompts.py`; empty for `colours`, or for `vild` if `name` is given."""

    def __post_init__(self) -> None:
        """Fill in the architecture of `name`."""
        if self.name:
            named = architecture(self.name)
            values = {
                "embed_dim": named["embed_dim"],
                "vision": named["vision_cfg"],
                "text": named["text_cfg"],
                "quick_gelu": self.quick_gelu or bool(named.get("quick_gelu")),
                "loss": "siglip" if "init_logit_bias" in named else self.loss,
            }
            for key, value in values.items():
                object.__setattr__(self, key, value)
        find_prompt_set(self.templates)

    def filled(self) -> "ClipConfig":
        """The config with its defaults resolved, for a model that is built.

        Before, they stay None or empty, since a later flag may name an architecture, which changes them.
        """
        mean, std = self.statistics
        return replace(self, mean=mean, std=std, max_logit_scale=self.logit_scale_bound, prompt_set=self.templates)

    @property
    def statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation of the images' normalisation."""
        half = (0.5, 0.5, 0.5)
        mean, std = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD) if self.name else (half, half)
        return self.mean or mean, self.std or std

    @property
    def logit_scale_bound(self) -> float:
        """Upper bound of the logit scale in training."""
        return self.max_logit_scale or (100.0 if self.name else 50.0)

    @property
    def templates(self) -> str:
        """The prompt set that names are put into."""
        return self.prompt_set or ("vild" if self.name else "colours")

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return int(self.vision["image_size"])


def _build(config: ClipConfig, vision: dict[str, Any]) -> Any:
    """open_clip's model; SigLIP starts with its paper's scale and bias (section 3.2)."""
    scale, bias = (math.log(10), -10.0) if config.loss == "siglip" else (2.7, None)
    return CustomTextCLIP(
        config.embed_dim,
        offline(vision),
        dict(config.text),
        quick_gelu=config.quick_gelu,
        init_logit_scale=scale,
        init_logit_bias=bias,
    )


@functools.cache  # building one takes 0.1 s
def _tokenizer(name: str, context_length: int) -> Tokenizer:
    with as_input_error(f"tokenizer of {name or 'the model'}"):
        tokenizer: Tokenizer = open_clip.get_tokenizer(name or TOKENIZER, context_length=context_length)
        return tokenizer


class Clip(nn.Module):
    """An open_clip model with its tokenizer and its image normalisation.

    Args:
        config: the architecture.
        chunks: parts in which a training batch is encoded, one after the other. Activations of only one part are kept,
            and recomputed for the gradient, so the loss sees the whole batch (GradCache, Gao et al. 2021).
    """

    def __init__(self, config: ClipConfig, chunks: int = 1) -> None:
        super().__init__()
        self.config, self.chunks = config.filled(), chunks
        self.model = _build(config, config.vision)
        self.tokenizer = _tokenizer(config.name, config.text.get("context_length", 77))
        self.normalise = Normalize(*config.statistics)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, S, S] uint8, [B, T] tokens -> unit image and text features [B, D], logit scale, and SigLIP's bias."""
        features = self._in_chunks(self.encode_images, images), self._in_chunks(self.encode_tokens, tokens)
        bias = () if self.model.logit_bias is None else (self.model.logit_bias,)
        return *features, self.model.logit_scale.exp(), *bias

    def _in_chunks(self, encode: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if self.chunks == 1 or not torch.is_grad_enabled():
            return encode(batch)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _frozen_statistics(self)  # recomputation must not update them again

        parts = batch.chunk(self.chunks)
        return torch.cat([checkpoint(encode, part, use_reentrant=False, context_fn=contexts) for part in parts])

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 RGB of the model's size -> [B, D] unit rows."""
        return F.normalize(self.image_features(images), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 RGB of the model's size -> [B, D] of any norm."""
        return image_features(self.model.visual, self.normalise(images.float() / 255)).float()

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, D] unit rows."""
        return F.normalize(text_features(self.model.text, tokens).float(), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """[B, T] tokens; longer sentences are truncated to the context length."""
        return self.tokenizer(list(texts))

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """Images of any size -> [B, 3, S, S] uint8, by open_clip's own resizing."""
        side = self.config.image_size
        unnormalised = PreprocessCfg(size=side, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=self.config.resize_mode)
        resize = image_transform_v2(unnormalised, is_train=False)
        rows = [(resize(image) * 255).round().to(torch.uint8) for image in images]
        return torch.stack(rows) if rows else torch.zeros(0, 3, side, side, dtype=torch.uint8)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Clamp the logit scale at its bound; called after every optimiser step."""
        self.model.logit_scale.clamp_(max=math.log(self.config.logit_scale_bound))


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms do not update their running means and variances."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def zero_shot_logits(model: Clip, images: Tensor, text_KD: Tensor) -> Tensor:
    """[B, 3, S, S] uint8 -> [B, K] cosines times the learned scale; their softmax gives probabilities."""
    logits: Tensor = model.model.logit_scale.exp() * model.encode_images(images) @ text_KD.T
    return logits


def names_at_a_time(prompt_set: str) -> int:
    """Names whose sentences are at most `SENTENCES`, or one.

    Raises:
        InputError: the prompt set is unknown.
    """
    return max(1, SENTENCES // len(find_prompt_set(prompt_set).templates))


class ClipTextEncoder:
    """The text tower of a CLIP checkpoint, with which a detector embeds new names.

    Args:
        config: the whole model's config.
        tower: open_clip's text tower.
        teacher: identifies the model and its weights.
    """

    def __init__(self, config: ClipConfig, tower: nn.Module, teacher: str) -> None:
        self.config, self.teacher, self.prompt_set = config.filled(), teacher, config.templates
        self.tower = tower.eval().requires_grad_(False)
        self.tokenizer = _tokenizer(config.name, config.text.get("context_length", 77))
        self._cache: dict[str, Tensor] = {}

    def with_prompts(self, prompt_set: str) -> "ClipTextEncoder":
        """The same tower with another prompt set; this encoder if the name is empty.

        Raises:
            InputError: the prompt set is unknown.
        """
        if not prompt_set:
            return self
        find_prompt_set(prompt_set)
        return ClipTextEncoder(replace(self.config, prompt_set=prompt_set), self.tower, self.teacher)

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """[K, D] unit rows: the prompts' unit embeddings averaged and normalised; recent names are cached."""
        if len(self._cache) + len(names) > MAX_CACHED_NAMES:
            self._cache.clear()
        new = [name for name in dict.fromkeys(names) if name not in self._cache]
        rows_ND = self._embed(new)
        if len(new) == len(names) and len(new) > MAX_CACHED_NAMES:
            return rows_ND  # millions of rows are not copied to the cache
        self._cache.update(zip(new, rows_ND, strict=True))
        return torch.stack([self._cache[name] for name in names]) if names else rows_ND

    def _embed(self, names: Sequence[str]) -> Tensor:
        """[N, D] unit rows, a bounded number of sentences at a time."""
        rows_ND = torch.empty(len(names), self.config.embed_dim)
        step = names_at_a_time(self.prompt_set)
        for start in range(0, len(names), step):
            part = names[start : start + step]
            flat = self.embed_captions([prompt for name in part for prompt in prompts_of(name, self.prompt_set)])
            rows_ND[start : start + step] = F.normalize(flat.view(len(part), -1, flat.shape[1]).mean(1), dim=-1)
        return rows_ND

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """[B, T] int64 on the CPU."""
        return trim_tokens(self.tower, self.tokenizer(list(captions)))

    @torch.no_grad()
    def embed_tokens(self, tokens_BT: Tensor) -> Tensor:
        """[B, D] unit rows, on the device of the tower and the tokens."""
        return F.normalize(text_features(self.tower, tokens_BT).float(), dim=-1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """[B, D] unit rows on the CPU, whatever device the tower is on."""
        device = next(self.tower.parameters()).device
        parts = (captions[start : start + SENTENCES] for start in range(0, len(captions), SENTENCES))
        rows = [self.embed_tokens(self.tokenize(part).to(device)).cpu() for part in parts]
        return torch.cat(rows) if rows else torch.empty(0, self.config.embed_dim)


def weights_digest(state: dict[str, Tensor]) -> str:
    """16 hexadecimal digits of all weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_clip(model: Clip, folder: str | Path) -> str:
    """Write `clip.json` and `clip.safetensors`; returns the teacher id."""
    state = model.model.state_dict()
    teacher = f"clip:{weights_digest(state)}"
    _write(state, teacher, model.config, Path(folder))
    return teacher


def save_text_encoder(encoder: ClipTextEncoder, folder: Path) -> None:
    """Write the text tower alone in the same format."""
    state = {f"text.{name}": value for name, value in encoder.tower.state_dict().items()}
    _write(state, encoder.teacher, encoder.config, folder)


def _write(state: dict[str, Tensor], teacher: str, config: ClipConfig, folder: Path) -> None:
    """Write weights, then `clip.json`, so that a folder with it is whole.

    A new weights file replaces the old one, which loaded models may still have mapped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / "clip.safetensors.tmp"
    save_file({name: value.contiguous() for name, value in state.items()}, fresh)
    fresh.replace(folder / "clip.safetensors")
    (folder / "clip.json").write_text(json.dumps({"teacher": teacher, "config": asdict(config)}, indent=1))


def _read(folder: str | Path) -> tuple[ClipConfig, str, dict[str, Tensor]]:
    """Config, teacher id and weights in float32."""
    source = Path(folder)
    if not (source / "clip.json").is_file():
        raise InputError(f"{source}: no CLIP checkpoint (clip.json); `python workflows/clip.py` makes one")
    with as_input_error(f"{source}: not a readable CLIP checkpoint"):
        raw = json.loads((source / "clip.json").read_text())
        triples = {name: tuple(raw["config"][name]) for name in ("mean", "std")}
        config = ClipConfig(**{**raw["config"], **triples})
        if not config.name and any(key.startswith("hf_") for key in (*config.text, *config.vision)):
            raise InputError(f"{source}: its towers are on a hub, expected those that open_clip builds")
        weights = load_file(source / "clip.safetensors")  # mapped: processes that load the same file share its memory
        state = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
        return config, str(raw["teacher"]), state


class SkipInitialisation(TorchFunctionMode):
    """Skips the random initialisation of models whose weights are about to be loaded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leave a tensor as it is where it would be filled."""
        named = kwargs or {}
        if getattr(func, "__name__", "") in FILLS:
            return (*args, *named.values())[0]
        return func(*args, **named)


def load_clip(source: str | Path, pretrained: str = "") -> tuple[Clip, str]:
    """A model in evaluation mode and its teacher id.

    Args:
        source: a checkpoint folder of ours, or an architecture of open_clip.
        pretrained: for an architecture: a tag of released weights, such as `openai`, or a file.

    Raises:
        InputError: there is no such checkpoint or there are no such weights, or they are broken.
    """
    if pretrained:
        model = open_clip_model(ClipConfig(name=str(source)), pretrained)
        return model.eval(), f"clip:{weights_digest(model.model.state_dict())}"
    if not Path(source).exists() and str(source) in open_clip.list_models():
        raise InputError(f"{source}: an architecture without weights, expected --pretrained with a tag or a file")
    config, teacher, state = _read(source)
    with as_input_error(f"{source}: no model can be built from its config"), SkipInitialisation():
        model = Clip(config)
    with as_input_error(f"{source}: weights do not fit the config"):
        model.model.load_state_dict(state, assign=True)
    return model.eval(), teacher


def open_clip_model(config: ClipConfig, pretrained: str) -> Clip:
    """A model of a named architecture with released weights, its config completed by how they were trained.

    Raises:
        InputError: the config has no name, or there are no such weights, or they do not fit.
    """
    if not config.name:
        raise InputError(f"--pretrained {pretrained}: expected --model.name, or a checkpoint folder (clip.json)")
    path, trained = find_weights(config.name, pretrained)
    changes = {key: trained[key] for key in ("mean", "std", "resize_mode") if key in trained}
    quick_gelu = config.quick_gelu or bool(trained.get("quick_gelu"))
    with as_input_error(f"model {config.name}: cannot be built"):
        model = Clip(replace(config, quick_gelu=quick_gelu, **changes))
    load_released(model.model, path)
    return model


def load_text_encoder(source: str | Path, pretrained: str = "") -> ClipTextEncoder:
    """The text encoder of a checkpoint folder, whole or text only, or of released weights (see `load_clip`).

    Raises:
        InputError: there is no such checkpoint, or it is broken.
    """
    if pretrained:
        model, teacher = load_clip(source, pretrained)
        return ClipTextEncoder(model.config, model.model.text, teacher)
    config, teacher, state = _read(source)
    with as_input_error(f"{source}: no model can be built from its config"), SkipInitialisation():
        tower = build_text_tower(config)
    text = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    with as_input_error(f"{source}: weights do not fit the config"):
        tower.load_state_dict(text, assign=True)
    return ClipTextEncoder(config, tower, teacher)


def build_text_tower(config: ClipConfig) -> nn.Module:
    """The text tower of a config.

    open_clip builds one only as part of a whole model: the smallest image tower is built and dropped.
    """
    tower: nn.Module = _build(config, {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}).text
    return tower

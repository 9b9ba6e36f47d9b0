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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2 import Normalize

from ovd_models.clip.pretrained import architecture, find_weights, load_released, offline, told_in_one_line
from ovd_models.clip.towers import image_features, text_features
from ovd_models.errors import InputError
from ovd_models.prompts import find_prompt_set, prompts_of

MAX_KNOWN_NAMES = 100_000
"""Embedded names that a text encoder keeps."""
SENTENCES = 512
"""Sentences that are embedded at a time."""
FILLS = {"normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "trunc_normal_"}
"""Functions of torch by which a layer draws its first weights."""
TOKENIZER = "ViT-B-32"
"""The open_clip model whose byte-pair tokenizer is used: all CLIP models of OpenAI's kind share it."""


def _tiny_vision() -> dict[str, Any]:
    return {"timm_model_name": "flat_convnet_64", "timm_pool": "", "timm_proj": "linear", "image_size": 64}


def _tiny_text() -> dict[str, Any]:
    return {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2}


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """An open_clip architecture; the defaults are a tiny one for 64 px images (7.5 M parameters, 0.8 M for images)."""

    name: str = ""
    """An architecture of open_clip, such as `ViT-B-32`, `RN50` or `convnext_base`, whose towers take the place of
    `vision` and `text`; empty: what these say."""
    embed_dim: int = 128
    vision: dict[str, Any] = field(default_factory=_tiny_vision)
    """open_clip's `vision_cfg`."""
    text: dict[str, Any] = field(default_factory=_tiny_text)
    """open_clip's `text_cfg`."""
    quick_gelu: bool = False
    """The activation of OpenAI's weights, and of some others."""
    loss: Literal["clip", "siglip"] = "clip"
    """Softmax over the batch, or a sigmoid for every pair, which adds a learned bias to the logits."""
    mean: tuple[float, float, float] | None = None
    """Of the images' normalisation; None: 0.5, or OpenAI's where `name` is given."""
    std: tuple[float, float, float] | None = None
    resize_mode: Literal["squash", "shortest", "longest"] = "squash"
    """How pictures become squares: as they are, by a crop of the longer side, or by padding the shorter."""
    max_logit_scale: float | None = None
    """Upper bound of the temperature's inverse in training; None: 50, or CLIP's 100 where `name` is given."""
    prompt_set: str = ""
    """See `ovd_models/prompts.py`; empty: `colours`, or `vild` where `name` is given."""

    def __post_init__(self) -> None:
        """Look the name up."""
        put = partial(object.__setattr__, self)
        if self.name:
            found = architecture(self.name)
            for key, source in (("embed_dim", "embed_dim"), ("vision", "vision_cfg"), ("text", "text_cfg")):
                put(key, found[source])
            put("quick_gelu", self.quick_gelu or bool(found.get("quick_gelu")))
            put("loss", "siglip" if "init_logit_bias" in found else self.loss)
        find_prompt_set(self.templates)

    def filled(self) -> "ClipConfig":
        """The config of a model that is built: what was left open is what it stands for.

        Till then it stays None or empty, since a flag that names an architecture changes it.
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
        """Upper bound of the temperature's inverse in training."""
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
    """open_clip's model; SigLIP starts with the scale and bias of its paper (section 3.2)."""
    scale, bias = (math.log(10), -10.0) if config.loss == "siglip" else (2.7, None)
    return CustomTextCLIP(
        config.embed_dim,
        offline(vision),
        dict(config.text),
        quick_gelu=config.quick_gelu,
        init_logit_scale=scale,
        init_logit_bias=bias,
    )


@functools.cache  # to build one takes a tenth of a second
def _tokenizer(name: str, context_length: int) -> Callable[[list[str]], Tensor]:
    with told_in_one_line(f"tokenizer of {name or 'the model'}"):
        tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(
            name or TOKENIZER, context_length=context_length
        )
    return tokenizer


class Clip(nn.Module):
    """An open_clip model with its tokenizer and its image normalisation.

    Args:
        config: the architecture.
        chunks: parts in which a training batch is encoded, one after the other: activations are kept of one part
            only and computed again for the gradient, so the loss sees the whole batch (GradCache, Gao et al. 2021).
    """

    def __init__(self, config: ClipConfig, chunks: int = 1) -> None:
        super().__init__()
        self.config, self.chunks = config.filled(), chunks
        self.model = _build(config, config.vision)
        self.tokenizer = _tokenizer(config.name, config.text.get("context_length", 77))
        self.normalise = Normalize(*config.statistics)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, S, S] uint8, [B, T] tokens -> unit image and text features [B, D], the scale, SigLIP's bias if any."""
        features = self._in_chunks(self.encode_images, images), self._in_chunks(self.encode_tokens, tokens)
        bias = () if self.model.logit_bias is None else (self.model.logit_bias,)
        return *features, self.model.logit_scale.exp(), *bias

    def _in_chunks(self, encode: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if self.chunks == 1 or not torch.is_grad_enabled():
            return encode(batch)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _frozen_statistics(self)  # the second pass must not count the batch again

        parts = batch.chunk(self.chunks)
        return torch.cat([checkpoint(encode, part, use_reentrant=False, context_fn=contexts) for part in parts])

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 RGB of the model's size -> [B, D] unit rows."""
        return F.normalize(self.image_features(images), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 RGB of the model's size -> [B, D], not normalised."""
        return image_features(self.model.visual, self.normalise(images.float() / 255)).float()

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, D] unit rows."""
        return F.normalize(text_features(self.model.text, tokens).float(), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """[B, T] tokens; sentences longer than the context are cut."""
        return self.tokenizer(list(texts))

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size -> [B, 3, S, S] uint8, by open_clip's own resizing."""
        side = self.config.image_size
        plain = PreprocessCfg(size=side, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=self.config.resize_mode)
        resize = image_transform_v2(plain, is_train=False)
        rows = [(resize(image) * 255).round().to(torch.uint8) for image in images]
        return torch.stack(rows) if rows else torch.zeros(0, 3, side, side, dtype=torch.uint8)

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the logit scale at or below its bound; called after every optimiser step."""
        self.model.logit_scale.clamp_(max=math.log(self.config.logit_scale_bound))


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Running means and variances of batch norm stay as they are."""
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
        self.config, self.teacher, self.prompt_set = config.filled(), teacher, config.templates
        self.tower = tower.eval().requires_grad_(False)
        self.tokenizer = _tokenizer(config.name, config.text.get("context_length", 77))
        self._known: dict[str, Tensor] = {}

    def embed_names(self, names: Sequence[str]) -> Tensor:
        """[K, D] unit rows: the prompts' unit embeddings averaged and normalised; recent names are remembered."""
        if len(self._known) + len(names) > MAX_KNOWN_NAMES:
            self._known.clear()
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        rows_ND = self._embed(new)
        if len(new) == len(names) and len(new) > MAX_KNOWN_NAMES:
            return rows_ND  # of millions of rows no second copy is made
        self._known.update(zip(new, rows_ND, strict=True))
        return torch.stack([self._known[name] for name in names]) if names else rows_ND

    def _embed(self, names: Sequence[str]) -> Tensor:
        """[N, D], a bounded number of sentences at a time."""
        rows_ND = torch.empty(len(names), self.config.embed_dim)
        step = max(1, SENTENCES // len(find_prompt_set(self.prompt_set).templates))
        for start in range(0, len(names), step):
            part = names[start : start + step]
            flat = self._encode([prompt for name in part for prompt in prompts_of(name, self.prompt_set)])
            rows_ND[start : start + step] = F.normalize(flat.view(len(part), -1, flat.shape[1]).mean(1), dim=-1)
        return rows_ND

    def embed_captions(self, captions: Sequence[str]) -> Tensor | None:
        """[B, D] unit rows."""
        return self._encode(captions)

    @torch.no_grad()
    def _encode(self, sentences: Sequence[str]) -> Tensor:
        """[B, D] on the CPU, whatever device the tower is on."""
        if not sentences:
            return torch.empty(0, self.config.embed_dim)
        device = next(self.tower.parameters()).device
        parts = (list(sentences[start : start + SENTENCES]) for start in range(0, len(sentences), SENTENCES))
        rows = [text_features(self.tower, self.tokenizer(part).to(device)).float().cpu() for part in parts]
        return F.normalize(torch.cat(rows), dim=-1)


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
    """Write the text tower alone in the same form."""
    state = {f"text.{name}": value for name, value in encoder.tower.state_dict().items()}
    _write(state, encoder.teacher, encoder.config, folder)


def _write(state: dict[str, Tensor], teacher: str, config: ClipConfig, folder: Path) -> None:
    """Weights, then `clip.json`, so that a folder with it is whole; a file that models are mapped from is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / "clip.safetensors.tmp"
    save_file({name: value.contiguous() for name, value in state.items()}, fresh)
    fresh.replace(folder / "clip.safetensors")
    (folder / "clip.json").write_text(json.dumps({"teacher": teacher, "config": asdict(config)}, indent=1))


def _read(folder: str | Path) -> tuple[ClipConfig, str, dict[str, Tensor]]:
    source = Path(folder)
    if not (source / "clip.json").is_file():
        raise InputError(f"{source}: no CLIP checkpoint (clip.json); `python workflows/clip.py` makes one")
    try:
        raw = json.loads((source / "clip.json").read_text())
        config = ClipConfig(
            **{**raw["config"], "mean": tuple(raw["config"]["mean"]), "std": tuple(raw["config"]["std"])}
        )
        weights = load_file(source / "clip.safetensors")  # mapped: processes that load the same file share its memory
        return config, str(raw["teacher"]), {name: _wide(value) for name, value in weights.items()}
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"{source}: not a readable CLIP checkpoint ({error})") from error


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


class Unfilled(TorchFunctionMode):
    """Models are built without the random numbers that they start from, for weights that are about to be loaded."""

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
        pretrained: of an architecture: a tag of released weights, such as `openai`, or a file.

    Raises:
        InputError: there is no such checkpoint or there are no such weights, or they are broken.
    """
    if pretrained:
        model = open_clip_model(ClipConfig(name=str(source)), pretrained)
        return model.eval(), f"clip:{weights_digest(model.model.state_dict())}"
    if not Path(source).exists() and str(source) in open_clip.list_models():
        raise InputError(f"{source}: an architecture without weights, expected --pretrained with a tag or a file")
    config, teacher, state = _read(source)
    with told_in_one_line(f"{source}: no model can be built from its config"), Unfilled():
        model = Clip(config)
    with told_in_one_line(f"{source}: weights do not fit the config"):
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
    told = {key: trained[key] for key in ("mean", "std", "resize_mode") if key in trained}
    model = _built(replace(config, quick_gelu=config.quick_gelu or bool(trained.get("quick_gelu")), **told))
    load_released(model.model, path)
    return model


def _built(config: ClipConfig) -> Clip:
    with told_in_one_line(f"model {config.name}: cannot be built"):
        return Clip(config)


def load_text_encoder(source: str | Path, pretrained: str = "") -> ClipTextEncoder:
    """The text half of a checkpoint folder, whole or text only, or of released weights (see `load_clip`).

    Raises:
        InputError: there is no such checkpoint, or it is broken.
    """
    if pretrained:
        model, teacher = load_clip(source, pretrained)
        return ClipTextEncoder(model.config, model.model.text, teacher)
    config, teacher, state = _read(source)
    with told_in_one_line(f"{source}: no model can be built from its config"), Unfilled():
        tower = build_text_tower(config)
    text = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    with told_in_one_line(f"{source}: weights do not fit the config"):
        tower.load_state_dict(text, assign=True)
    return ClipTextEncoder(config, tower, teacher)


def build_text_tower(config: ClipConfig) -> nn.Module:
    """The text tower of a config.

    open_clip builds one only as part of a whole model: the smallest image tower is built and dropped.
    """
    tower: nn.Module = _build(config, {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}).text
    return tower

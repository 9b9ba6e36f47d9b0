"""Released CLIPs of unknown architecture: OpenAI's files, open_clip's state dicts, and those of HF transformers.

All become the names of open_clip's `CustomTextCLIP`; the architecture is the one of open_clip whose tensors they are.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor

from ovd_models.clip.pretrained import architecture
from ovd_models.errors import InputError
from ovd_models.weights import TensorAccount

Shapes = Mapping[str, Sequence[int]]
TEXT = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
"""The text tower in the layout of OpenAI and of open_clip's older models; newer ones have `text.` before it."""
TRANSFORMERS: Sequence[tuple[str, str]] = (
    (r"^vision_model\.embeddings\.class_embedding$", r"visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", r"visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", r"visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", r"visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", r"visual.ln_post."),
    (r"^visual_projection\.weight$", r"visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", r"text.token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", r"text.positional_embedding"),
    (r"^text_model\.final_layer_norm\.", r"text.ln_final."),
    (r"^text_projection\.weight$", r"text.text_projection"),
    (r"^vision_model\.encoder\.layers\.", r"visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", r"text.transformer.resblocks."),
    (r"\.self_attn\.out_proj\.", r".attn.out_proj."),
    (r"\.self_attn\.([qkv])_proj\.(weight|bias)$", r".attn.in_proj_\2.\1"),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", r".mlp.c_fc."),
    (r"\.mlp\.fc2\.", r".mlp.c_proj."),
)
"""Names of HF transformers' `CLIPModel` to open_clip's."""
IGNORED: Sequence[tuple[str, str]] = (
    (r"^(input_resolution|context_length|vocab_size)$", "a size, which the tensors show"),
    (r"attn_mask$|position_ids$", "computed from the context length"),
)


def is_clip(names: Mapping[str, Any]) -> bool:
    """Whether tensor names are those of a CLIP with both towers."""
    image = any(name.startswith(("visual.", "vision_model.")) for name in names)
    return image and any(name.endswith("token_embedding.weight") for name in names)


def our_names(names: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Released name -> open_clip's, and released name -> reason for those left out.

    The parts `q`, `k` and `v` of a joint projection have the joint name and a letter.
    """
    ignored = {name: reason for name in names for pattern, reason in IGNORED if re.search(pattern, name)}
    found = {}
    for name in names:
        if name in ignored:
            continue
        ours = name
        if any(key.startswith("vision_model.") for key in names):
            for pattern, replacement in TRANSFORMERS:
                ours = re.sub(pattern, replacement, ours)
        elif name.startswith(TEXT):
            ours = f"text.{name}"
        found[name] = ours
    return found, ignored


def clip_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], TensorAccount]:
    """The state dict with open_clip's names, in float32, and the account of the released tensors."""
    used, ignored = our_names(state)
    transposed = {ours for name, ours in used.items() if name in ("visual_projection.weight", "text_projection.weight")}
    parts = {ours: state[name] for name, ours in used.items()}
    translated: dict[str, Tensor] = {}
    for ours, value in parts.items():
        joint, _, part = ours.rpartition(".")
        if part in ("q", "k", "v") and "in_proj_" in joint:
            if part == "q" and {f"{joint}.k", f"{joint}.v"} <= set(parts):
                translated[joint] = torch.cat([parts[f"{joint}.{each}"] for each in "qkv"])
        else:
            translated[ours] = value.T if ours in transposed else value
    as_float = {name: value.float() if value.is_floating_point() else value for name, value in translated.items()}
    return as_float, TensorAccount(used, ignored, ())


def shapes_of(name: str) -> dict[str, list[int]]:
    """Shapes of an architecture of open_clip, without memory for its weights."""
    config = architecture(name)
    with torch.device("meta"):
        bias = 0.0 if "init_logit_bias" in config else None
        model = CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], init_logit_bias=bias)
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def fitting_architectures(state: Mapping[str, Tensor]) -> list[str]:
    """The architectures of open_clip with exactly these tensors, under `CustomTextCLIP`'s names.

    Those whose text tower is downloaded from a hub are left out.
    """
    shapes = {name: list(value.shape) for name, value in state.items()}
    vocabulary, width = shapes.get("text.token_embedding.weight", [0, 0])
    layers = len({name.split(".")[3] for name in shapes if name.startswith("text.transformer.resblocks.")})
    tower = any(name.startswith("visual.trunk.") for name in shapes), "visual.layer1.0.conv1.weight" in shapes
    found = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        text, vision = config["text_cfg"], config["vision_cfg"]
        if tower != ("timm_model_name" in vision, isinstance(vision.get("layers"), list)):
            continue
        sizes = text.get("vocab_size", 49408), text.get("width", 512), text.get("layers", 12)
        if "multimodal_cfg" in config or "hf_model_name" in text or sizes != (vocabulary, width, layers):
            continue
        if config["embed_dim"] in shapes.get("text.text_projection", shapes.get("text.text_projection.weight", [])):
            try:
                fits = shapes_of(name) == shapes
            except InputError:  # such as an architecture for images that are not square
                continue
            if fits:
                found.append(name)
    return found


def choose_architecture(state: Mapping[str, Tensor], given: str, origin: str, *, quick_gelu: bool) -> str:
    """The architecture of a released CLIP: the given one, or the only one that fits.

    Args:
        state: with the names of `CustomTextCLIP`.
        given: an architecture; empty to look for it.
        origin: the file.
        quick_gelu: whether the file is OpenAI's, whose activation is known.

    Raises:
        InputError: none fits, the given one does not, or several do.
    """
    fitting = fitting_architectures(state)
    plain = [name for name in fitting if not name.endswith("-quickgelu")]
    if quick_gelu and plain:
        fitting = plain
    if given:
        if given not in fitting:
            near = ", ".join(fitting) or "another file, since no architecture of open_clip fits"
            raise InputError(f"--clip {given}: not the architecture of {origin}, expected {near}")
        return given
    if len(fitting) != 1:
        known = f"expected --clip with one of {', '.join(fitting)}" if fitting else "expected one that open_clip knows"
        reason = "several architectures have its tensors" if fitting else "a CLIP of unknown architecture"
        raise InputError(f"{origin}: {reason}, {known}")
    return fitting[0]

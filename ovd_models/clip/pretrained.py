"""open_clip's architectures and the files of their released weights."""

import difflib
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import open_clip
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.factory import load_checkpoint
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from torch import nn

from ovd_models.errors import InputError, as_input_error, first_line
from ovd_models.torchscript import is_torchscript, read_torchscript

CONNECT_SECONDS = 5
"""Timeout of the test for a network; the hub's own client retries for 50 seconds without one."""


def offline(vision: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's `vision_cfg`, changed so that timm downloads nothing: a checkpoint's config is not trusted.

    Raises:
        InputError: its tower is on a hub or in another folder.
    """
    if ":" in str(vision.get("timm_model_name", "")):
        raise InputError(f"timm_model_name {vision['timm_model_name']!r}: an address, expected a name that timm knows")
    return {**vision, "timm_model_pretrained": False}


def architecture(name: str) -> dict[str, Any]:
    """open_clip's config of an architecture: `embed_dim`, `vision_cfg`, `text_cfg`, perhaps `quick_gelu` and others.

    Raises:
        InputError: the name is unknown, or the model does not consist of two towers.
    """
    known = open_clip.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.3)
        raise InputError(f"model {name!r}: unknown to open_clip; near ones are {', '.join(near) or 'none'}")
    config: dict[str, Any] = open_clip.get_model_config(name)
    if "multimodal_cfg" in config:
        raise InputError(f"model {name}: writes captions, expected one of two towers")
    if not isinstance(config["vision_cfg"].get("image_size", 224), int):
        raise InputError(f"model {name}: takes images that are not square")
    config["vision_cfg"].setdefault("image_size", 224)
    config["vision_cfg"] = offline(config["vision_cfg"])  # weights come from `find_weights` alone
    config["text_cfg"]["hf_model_pretrained"] = False
    return config


def find_weights(name: str, pretrained: str) -> tuple[Path, dict[str, Any]]:
    """The file of released weights, downloaded if need be, and open_clip's config of them: `mean`, `std` and so on.

    Args:
        name: an architecture of open_clip.
        pretrained: one of its tags, or a file.

    Raises:
        InputError: there is no such tag or file, or it cannot be downloaded.
    """
    if Path(pretrained).is_file():
        return Path(pretrained), published_pixels(name) | ({"quick_gelu": True} if is_torchscript(pretrained) else {})
    config: dict[str, Any] = get_pretrained_cfg(name, pretrained)
    if not config:
        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise InputError(f"--pretrained {pretrained}: no such file and no weights of {name}, whose tags are {tags}")
    if config.get("hf_hub") and not _hub_is_reachable():
        cached = _cached(config["hf_hub"])
        if cached is None:
            raise InputError(
                f"--pretrained {pretrained}: {ENDPOINT} cannot be reached and no copy is on this machine, "
                "expected a network, or a file (docs/weights.md)"
            )
        return cached, config
    try:
        return Path(download_pretrained(config)), config
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"--pretrained {pretrained}: download failed ({first_line(error)}), expected a file"
        ) from error


def published_pixels(name: str) -> dict[str, Any]:
    """`mean`, `std` and `resize_mode` of an architecture's released weights, as far as all of them agree."""
    configs = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    found = {}
    for key in ("mean", "std", "resize_mode"):
        values = {config.get(key) for config in configs}
        if len(values) == 1:
            found[key] = values.pop()
    return {key: value for key, value in found.items() if value is not None}


def _hub_is_reachable() -> bool:
    if HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    host = urlsplit(ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _cached(location: str) -> Path | None:
    repository, _, file = location.rpartition("/")
    for name in [file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]:
        path = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            return Path(path)
    return None


def load_released(model: nn.Module, path: Path) -> None:
    """Load weights into open_clip's `CustomTextCLIP` from a state dict (.safetensors or torch's) or OpenAI's file.

    Raises:
        InputError: the file is unreadable, or its weights belong to another architecture.
    """
    with as_input_error(str(path)):
        if is_torchscript(path):
            state = read_torchscript(path)
            for name in ("input_resolution", "context_length", "vocab_size", "attn_mask"):
                state.pop(name, None)
            model.load_state_dict(convert_to_custom_text_state_dict(state))
        else:
            load_checkpoint(model, str(path))

"""A frozen CLIP image tower as a feature pyramid, and its embeddings of regions, masks and cut-outs.

B images, R regions or masks, C channels of a level, p side of the head's grid, S side of the square input, s side of
CLIP's own input, D embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from open_clip.model import CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.ops import roi_align

from ovd_models.clip.model import ClipConfig
from ovd_models.clip.pretrained import offline
from ovd_models.clip.towers import FlatConvNet
from ovd_models.errors import InputError
from ovd_models.ovsam.crops import Background, crop_masks
from ovd_models.segments import PROMPTS_AT_A_TIME

NUM_LEVELS = 4


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """An open_clip image tower, without its text tower."""

    embed_dim: int = ClipConfig().embed_dim
    vision: dict[str, Any] = field(default_factory=lambda: dict(ClipConfig().vision))
    """open_clip's `vision_cfg`."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of the images' normalisation, colours in 0 to 1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    quick_gelu: bool = False
    """The activation of OpenAI's transformers."""

    @classmethod
    def of(cls, config: ClipConfig) -> "TowerConfig":
        """The image tower of a CLIP."""
        mean, std = config.statistics
        return cls(embed_dim=config.embed_dim, vision=config.vision, mean=mean, std=std, quick_gelu=config.quick_gelu)

    @property
    def image_size(self) -> int:
        """s: side of CLIP's own square input in pixels."""
        return int(self.vision["image_size"])


def build_tower(config: TowerConfig, image_size: int) -> nn.Module:
    """open_clip's image tower of a config, with random weights.

    Args:
        config: of the tower.
        image_size: S. A transformer gets position embeddings for this size, and keeps those of CLIP's own size as
            `own_places`. Other towers do not depend on it.
    """
    vision = offline(config.vision)
    patch = int(vision.get("patch_size") or 1)
    if vision.get("patch_size") and "timm_model_name" not in vision and isinstance(vision.get("layers", 0), int):
        vision["image_size"] = image_size // patch * patch
    # open_clip builds towers in pairs: the smallest text tower is built and dropped.
    text = {"context_length": 8, "vocab_size": 8, "width": 64, "heads": 1, "layers": 1}
    tower: nn.Module = CustomTextCLIP(config.embed_dim, vision, text, quick_gelu=config.quick_gelu).visual
    if isinstance(tower, VisionTransformer):
        own_places = resize_places(tower.positional_embedding.detach(), config.image_size // patch)
        tower.register_buffer("own_places", own_places.clone())  # safetensors refuses tensors that share memory
    return tower


class ClipPyramid(nn.Module):
    """The four levels of a frozen CLIP image tower.

    Args:
        tower: open_clip's, a ResNet, a ConvNeXt or a `FlatConvNet`; or a vision transformer, which has one scale only.
        config: of the tower.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, config: TowerConfig) -> None:
        super().__init__()
        self.tower, self.config = tower.requires_grad_(False), config
        for name, values in (("mean", config.mean), ("std", config.std)):  # in grey levels
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1) * 255, persistent=False)
        trunk = getattr(tower, "trunk", None)
        if isinstance(tower, ModifiedResNet):
            layers = (tower.layer1, tower.layer2, tower.layer3, tower.layer4)
            self.channels = tuple(int(layer[-1].conv3.out_channels) for layer in layers)
            self.strides: tuple[int, ...] = (4, 8, 16, 32)
            self.grid = int(tower.image_size) // 32
        elif isinstance(tower, VisionTransformer):
            self.channels = (int(tower.conv1.out_channels),) * NUM_LEVELS
            self.strides = (1 << round(torch.tensor(float(tower.patch_size[0])).log2().item()),) * NUM_LEVELS
            self.grid = 7
        elif isinstance(trunk, FlatConvNet):
            self.channels = tuple(len(cast(nn.BatchNorm2d, part[-2]).bias) for part in _flat_stages(trunk))
            self.strides = (2, 4, 8, 16)
            self.grid = int((trunk.num_features // self.channels[-1]) ** 0.5)
        elif trunk is not None and hasattr(trunk, "stages") and hasattr(trunk, "feature_info"):
            self.channels = tuple(int(entry["num_chs"]) for entry in trunk.feature_info)
            self.strides = tuple(int(entry["reduction"]) for entry in trunk.feature_info)
            self.grid = 7
        else:
            kind = type(tower if trunk is None else trunk).__name__
            raise InputError(f"CLIP image tower {kind}: has no levels, expected a ResNet, ConvNeXt or transformer")
        self.eval()

    def train(self, mode: bool = True) -> "ClipPyramid":
        """Stay in evaluation mode: the tower is frozen, its batch norm too."""
        return super().train(False)

    def load_tower(self, state: Mapping[str, Tensor]) -> None:
        """Load an image tower's weights; a transformer's position embeddings are resized to this one's grid."""
        name = "positional_embedding"
        if isinstance(self.tower, VisionTransformer):
            own_places = state.get("own_places", state[name])
            state = {**state, "own_places": own_places, name: resize_places(own_places, int(self.tower.grid_size[0]))}
        self.tower.load_state_dict(state)

    def normalise(self, image_3HW: Tensor, side: int) -> Tensor:
        """An image [3, H, W] in grey levels -> [3, S, S] normalised, padded at the end."""
        height, width = image_3HW.shape[1:]
        return F.pad((image_3HW - self.mean) / self.std, (0, side - width, 0, side - height))

    @torch.no_grad()
    def forward(self, images_B3SS: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, S, S] -> four maps [B, C, S / stride, S / stride], fine to coarse."""
        tower = self.tower
        if isinstance(tower, ModifiedResNet):
            levels = tower.forward_intermediates(images_B3SS, [1, 2, 3, 4], intermediates_only=True)
            return list(levels["image_intermediates"])
        if isinstance(tower, VisionTransformer):
            return self._transformer_levels(tower, images_B3SS)
        trunk: Any = tower.trunk
        if isinstance(trunk, FlatConvNet):
            levels, hidden = [], images_B3SS
            for stage in _flat_stages(trunk):
                hidden = stage(hidden)
                levels.append(hidden)
            return levels
        return list(trunk.forward_intermediates(images_B3SS, indices=NUM_LEVELS, intermediates_only=True))

    def _transformer_levels(self, tower: VisionTransformer, images_B3SS: Tensor) -> list[Tensor]:
        """Four depths of a transformer on one grid, each resized to the next power of two as its stride."""
        side = images_B3SS.shape[-1]
        own_side = int(tower.image_size[0])
        if own_side != side:
            images_B3SS = F.interpolate(images_B3SS, (own_side, own_side), mode="bilinear", align_corners=False)
        depth = len(tower.transformer.resblocks)
        # Rounded up, so that towers of fewer blocks than levels repeat their last maps.
        indices = [-(-depth * (level + 1) // NUM_LEVELS) - 1 for level in range(NUM_LEVELS)]
        unique = sorted(set(indices))
        maps = tower.forward_intermediates(images_B3SS, unique, intermediates_only=True)["image_intermediates"]
        grid = side // self.strides[0]
        levels = [F.interpolate(level, (grid, grid), mode="bilinear", align_corners=False) for level in maps]
        return [levels[unique.index(index)] for index in indices]

    def head(self, grid_RCpp: Tensor) -> Tensor:
        """CLIP's own head on the last level's features of a region: [R, C, p, p] -> [R, D] of any norm."""
        tower: Any = self.tower
        if isinstance(tower, ModifiedResNet):
            embedding: Tensor = tower.attnpool(grid_RCpp)
        elif isinstance(tower, VisionTransformer):
            embedding = tower.ln_post(grid_RCpp.flatten(2).mean(2))
            embedding = embedding if tower.proj is None else embedding @ tower.proj
        elif isinstance(tower.trunk, FlatConvNet):
            embedding = tower.head(grid_RCpp.flatten(1))
        else:
            embedding = tower.head(tower.trunk.forward_head(tower.trunk.norm_pre(grid_RCpp)))
        return embedding

    def embed(self, images_R3ss: Tensor) -> Tensor:
        """Normalised whole images [R, 3, s, s] of CLIP's own size -> [R, D] unit rows."""
        places = {}
        if isinstance(self.tower, VisionTransformer):
            places["positional_embedding"] = self.tower.get_buffer("own_places")
        embedding_RD: Tensor = functional_call(self.tower, places, (images_R3ss,))
        return F.normalize(embedding_RD.float(), dim=-1)

    def embed_crops(self, image_3HW: Tensor, masks_RHW: Tensor, margin: float, background: Background) -> Tensor:
        """[R, D] unit rows of square crops around masks of a uint8 image, see `crop_masks`."""
        colours = (image_3HW.float() - self.mean) / self.std
        black = -self.mean / self.std
        side, parts = self.config.image_size, torch.split(masks_RHW, PROMPTS_AT_A_TIME)
        return torch.cat([self.embed(crop_masks(colours, part, black, margin, background, side)) for part in parts])

    def region_embeddings(self, top_BCHW: Tensor, rois_R5: Tensor) -> Tensor:
        """CLIP's embeddings of boxes: RoIAlign on the last level to the grid of its head, then the head.

        Args:
            top_BCHW: the last level.
            rois_R5: [R, 5] image index and xyxy, pixels of the input.

        Returns:
            [R, D] unit rows.
        """
        grid_RCpp = roi_align(top_BCHW, rois_R5, self.grid, 1 / self.strides[-1], -1, aligned=True)
        return F.normalize(self.head(grid_RCpp).float(), dim=-1)

    def mask_embeddings(self, top_RCHW: Tensor, masks_RHW: Tensor) -> Tensor:
        """CLIP's embeddings of masks: the last level averaged under each mask, then the head on that one feature.

        Args:
            top_RCHW: the last level of each mask's image.
            masks_RHW: [R, H, W] weights on the last level's grid; all zeros give the plain average.

        Returns:
            [R, D] unit rows.
        """
        weights_RHW = torch.where(masks_RHW.sum((1, 2), keepdim=True) > 0, masks_RHW, torch.ones_like(masks_RHW))
        mean_RC = torch.einsum("rchw,rhw->rc", top_RCHW, weights_RHW) / weights_RHW.sum((1, 2))[:, None]
        grid_RCpp = mean_RC[:, :, None, None].expand(-1, -1, self.grid, self.grid)
        return F.normalize(self.head(grid_RCpp).float(), dim=-1)


def resize_places(codes_NW: Tensor, side: int) -> Tensor:
    """Position embeddings [1 + g * g, W] of a transformer, its class token's first -> [1 + side * side, W]."""
    before = round((len(codes_NW) - 1) ** 0.5)
    if before == side:
        return codes_NW
    grid_1Wgg = codes_NW[1:].T.reshape(1, -1, before, before)
    resized = F.interpolate(grid_1Wgg, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([codes_NW[:1], resized[0].flatten(1).T])


def _flat_stages(trunk: FlatConvNet) -> Sequence[nn.Sequential]:
    """The stem and the three stages of a `FlatConvNet`; each ends with batch norm and ReLU."""
    layers = trunk.layers
    starts = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
    return [layers[start:stop] for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True)]

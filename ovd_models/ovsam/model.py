"""OV-SAM: one frozen CLIP that segments like SAM and names what it segments (arXiv 2401.02955).

SAM2CLIP (`ovsam_adapter.py`) turns CLIP's levels into SAM's image embedding; CLIP2SAM (`ovsam_head.py`) names the
masks.

B images, P prompts of an image, C prompt width, S side of the square input, h side of the embedding, L = 4 h, K names,
Y synonyms, D embedding width of names.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.utils.amg import build_point_grid, calculate_stability_score
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ovd_models.errors import InputError
from ovd_models.ovsam.adapter import Sam2Clip
from ovd_models.ovsam.clip_pyramid import ClipPyramid, TowerConfig, build_tower
from ovd_models.ovsam.crops import cut_outs
from ovd_models.ovsam.head import LOGIT_SCALE, RegionNamer, fuse_scores, name_logits, text_of
from ovd_models.sam.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VIT_H,
    EncodedImage,
    EverythingConfig,
    SamConfig,
    SamModel,
    add_edge,
    build_mask_decoder,
    build_prompt_encoder,
    fit_image,
    run_decoder,
    scale_prompts,
    unnamed,
)
from ovd_models.segments import PIXELS_AT_A_TIME, Prompts, Segments, boxes_of
from ovd_models.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class OvSamConfig:
    """An OV-SAM in numbers; the defaults are a tiny one for 128 px images."""

    sam: SamConfig = field(default_factory=SamConfig)
    """The teacher: its embedding, prompt encoder and mask decoder are taken over."""
    tower: TowerConfig = field(default_factory=TowerConfig)
    """CLIP's image tower, frozen."""
    adapter_depth: int = 2
    """Blocks of the adapter; the last one attends to the whole image, the others to windows."""
    pyramid_width: int = 64
    label_hidden: int = 256
    """Width of the label branch's MLP; 0 leaves it out, as in the released weights."""
    label_token: bool = False
    """Whether the mask decoder gets the released weights' label token, which only disturbs the masks."""
    iou_head: bool = True
    """Whether SAM's IoU token and head are kept; the released weights have none."""
    alpha: float = 0.1
    """CLIP's part in the score of base names."""
    beta: float = 0.9
    """CLIP's part in the score of novel names."""
    novel_bias: float = 0.0
    """What the log scores of novel names gain, see `fuse_scores`."""
    log_scale: float = LOGIT_SCALE
    """Log of the cosines' factor; a CLIP that learnt a smaller one is too sure of itself with the released one."""
    clip_view: Literal["features", "cut_out"] = "features"
    """How CLIP is asked about a mask: by its own head on its last level's features of the mask's box, as the released
    weights do, or by a second, small look at the picture cut out along the predicted mask."""
    cut_out_margin: float = 1.5
    """Side of a cut-out relative to the longer side of the mask's box."""


@dataclass(frozen=True)
class EncodedOvSam:
    """An image that OV-SAM has looked at; any number of prompts and vocabularies can follow."""

    sam: EncodedImage
    """SAM's embedding, as the adapter sees it."""
    pyramid: tuple[Tensor, ...]
    """The label branch's levels."""
    top: Tensor
    """CLIP's last level."""
    image: Tensor
    """[3, H, W] uint8, for cut-outs."""


class OvSam(nn.Module):
    """The whole model: frozen CLIP, adapter, SAM's prompt encoder and mask decoder, label branch."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: OvSamConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = ClipPyramid(build_tower(config.tower, config.sam.image_size))
        self.adapter = Sam2Clip(self.clip.channels, self.clip.strides, config.sam, config.adapter_depth)
        self.prompt_encoder = build_prompt_encoder(config.sam).requires_grad_(False)
        self.mask_decoder: MaskDecoder = build_mask_decoder(config.sam, num_multimask=0)
        self.label_token = nn.Embedding(1, config.sam.prompt_width) if config.label_token else None
        if not config.iou_head:
            del self.mask_decoder.iou_token, self.mask_decoder.iou_prediction_head
        self.namer = RegionNamer(
            self.clip.channels, self.clip.strides, config.pyramid_width, config.tower.embed_dim, config.label_hidden
        )
        mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (config.tower.mean, config.tower.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def adopt(self, teacher: SamModel, tower: nn.Module) -> None:
        """Take over what is not learnt anew: SAM's place codes, prompt encoder and single-mask decoder, and CLIP.

        Args:
            teacher: a SAM of this config.
            tower: open_clip's image tower of this config.
        """
        sam = teacher.sam
        self.clip.load_tower(tower.state_dict())
        self.adapter.pos_embed.copy_(sam.image_encoder.pos_embed.detach())
        self.prompt_encoder.load_state_dict(sam.prompt_encoder.state_dict())
        self.mask_decoder.load_state_dict(single_mask(sam.mask_decoder.state_dict(), self.mask_decoder.state_dict()))

    def preprocess(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Images [3, H, W] uint8 -> [B, 3, S, S] normalised and padded at the end; resized heights and widths."""
        side = self.config.sam.image_size
        fitted = [fit_image(image, side)[0] for image in images]
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in fitted]
        padded = [
            F.pad((image - self.mean) / self.std, (0, side - width, 0, side - height))
            for image, (height, width) in zip(fitted, sizes, strict=True)
        ]
        return torch.stack(padded), sizes

    @torch.no_grad()
    def encode(self, image: Tensor) -> EncodedOvSam:
        """Look at an image [3, H, W] uint8 once."""
        pixels, sizes = self.preprocess([image])
        levels = self.clip(pixels)
        edged = add_edge(image, self.config.sam.image_size)
        size, padded_size = ((int(entry.shape[-2]), int(entry.shape[-1])) for entry in (image, edged))
        sam = EncodedImage(self.adapter(levels), sizes[0], padded_size, size)
        return EncodedOvSam(sam, tuple(self.namer.pyramid(levels)), levels[-1], image)

    def decode(self, embedding_PChw: Tensor, sparse_PnC: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits [P, L, L] and predicted qualities [P] of prompts, NaN without an IoU head."""
        decoder, tokens = self.mask_decoder, []
        if self.config.iou_head:
            tokens.append(decoder.iou_token.weight)
        if self.label_token is not None:
            tokens.append(self.label_token.weight)
        first_TC = torch.cat(tokens) if tokens else decoder.mask_tokens.weight[:0]
        position = self.prompt_encoder.get_dense_pe()
        hidden_PTC, masks_P1LL = run_decoder(decoder, first_TC, embedding_PChw, position, sparse_PnC, dense)
        if not self.config.iou_head:
            return masks_P1LL[:, 0], masks_P1LL.new_full((len(masks_P1LL),), float("nan"))
        return masks_P1LL[:, 0], decoder.iou_prediction_head(hidden_PTC[:, 0])[:, 0]

    def rois_of(self, low_PLL: Tensor, boxes_P4: Tensor | None) -> Tensor:
        """[P, 4] where names are looked for, pixels of the input: the box prompt, else the predicted mask's tight box.

        An empty mask gives the whole input.
        """
        if boxes_P4 is not None:
            return boxes_P4
        side = self.config.sam.image_size
        found_P4 = boxes_of(low_PLL > 0) * (side / low_PLL.shape[-1])
        whole = found_P4.new_tensor([0, 0, side, side])
        return torch.where((found_P4[:, 2:] > found_P4[:, :2]).all(1, keepdim=True), found_P4, whole)

    def head_logits(self, pyramid: Sequence[Tensor], rois_P5: Tensor, text_KYD: Tensor) -> Tensor:
        """[P, K + 1] what the label branch says about regions of the input."""
        return name_logits(self.namer(pyramid, rois_P5), text_KYD, self.config.log_scale)

    def clip_logits(self, encoded: EncodedOvSam, rois_P5: Tensor, masks_PHW: Tensor, text_KYD: Tensor) -> Tensor:
        """[P, K + 1] what CLIP itself says about regions of the input, or about the masks cut out of the picture."""
        if self.config.clip_view == "features":
            embedding_PD = self.clip.region_embeddings(encoded.top, rois_P5)
        else:
            tower, margin = self.config.tower, self.config.cut_out_margin
            side = int(tower.vision["image_size"])
            look = partial(cut_outs, mean=self.mean, std=self.std, margin=margin, background="mean", side=side)
            embedding_PD = self.clip.embed(look(encoded.image, masks_PHW))
        return name_logits(embedding_PD, text_KYD, self.config.log_scale)

    @torch.no_grad()
    def segment(self, image: Tensor | EncodedOvSam, prompts: Prompts, vocabulary: Vocabulary | None = None) -> Segments:
        """One mask a prompt, named if a vocabulary is given.

        Args:
            image: [3, H, W] uint8, or what `encode` made of it.
            prompts: in pixels of the original image.
            vocabulary: any names; without base flags, all of them count as novel.

        Raises:
            InputError: the prompts do not fit the image, see `Prompts.checked`.
        """
        encoded = self.encode(image) if isinstance(image, Tensor) else image
        found, boxes_P4 = self.masks(encoded, prompts)
        return found if vocabulary is None else self.name(encoded, found, vocabulary, boxes_P4)

    @torch.no_grad()
    def masks(self, encoded: EncodedOvSam, prompts: Prompts) -> tuple[Segments, Tensor | None]:
        """One mask a prompt of an encoded image, and the box prompts [P, 4] in pixels of the input, if they are boxes.

        Raises:
            InputError: the prompts do not fit the image, see `Prompts.checked`.
        """
        height, width = encoded.sam.size
        prompts = prompts.checked(width, height, 4 * self.config.sam.embedding_side).to(encoded.top.device)
        scale = partial(scale_prompts, encoded=encoded.sam)
        boxes_P4 = None if prompts.boxes is None else scale(prompts.boxes.view(-1, 2, 2)).view(-1, 4)
        points = None if prompts.points is None else (scale(prompts.points), prompts.point_labels)
        sparse, dense = self.prompt_encoder(points, boxes_P4, None if prompts.masks is None else prompts.masks[:, None])
        low_PLL, ious_P = self.decode(encoded.sam.embedding.expand(len(sparse), -1, -1, -1), sparse, dense)
        return unnamed(self.full_size(low_PLL, encoded.sam), ious_P, low_PLL), boxes_P4

    def full_size(self, low_PLL: Tensor, encoded: EncodedImage) -> Tensor:
        """[P, L, L] logits -> masks [P, H, W] of the original image; its logits are made a few at a time."""
        few = max(1, PIXELS_AT_A_TIME // math.prod(encoded.padded_size))
        side = self.config.sam.image_size
        return torch.cat([enlarge(part, encoded, side) > 0 for part in torch.split(low_PLL, few)])

    @torch.no_grad()
    def name(
        self, encoded: EncodedOvSam, found: Segments, vocabulary: Vocabulary, boxes_P4: Tensor | None = None
    ) -> Segments:
        """The same masks of an encoded image, named.

        Args:
            encoded: the image.
            found: its masks.
            vocabulary: any names; without base flags, all of them count as novel.
            boxes_P4: the box prompts that asked for the masks, in pixels of the input.
        """
        if not len(found):
            return replace(found, names=vocabulary.names)
        head_PK, clip_PK, seen_P = self.opinions(encoded, found, vocabulary, boxes_P4)
        own = self.config
        fused_PK = fuse_scores(
            head_PK,
            clip_PK,
            vocabulary.is_base,
            seen_P,
            alpha=own.alpha,
            beta=own.beta,
            novel_bias=own.novel_bias,
        )
        return named(found, fused_PK, vocabulary)

    @torch.no_grad()
    def opinions(
        self, encoded: EncodedOvSam, found: Segments, vocabulary: Vocabulary, boxes_P4: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of `fuse_scores`: logits [P, K + 1] of the label branch and of CLIP, [P] whether CLIP saw anything."""
        rois_P5, text_KYD = F.pad(self.rois_of(found.low_res, boxes_P4), (1, 0)), text_of(vocabulary)
        head_PK = self.head_logits(encoded.pyramid, rois_P5, text_KYD)
        clip_PK = self.clip_logits(encoded, rois_P5, found.masks, text_KYD)
        return head_PK, clip_PK, found.masks.flatten(1).any(1)

    def everything(
        self, image: Tensor, vocabulary: Vocabulary | None = None, settings: EverythingConfig | None = None
    ) -> Segments:
        """The masks of a whole picture, best first by the model's own estimate, each named if names are given.

        A grid of clicks, as the package's automatic mask generator makes it; masks that the model itself thinks poor,
        that change with the threshold, or that repeat a better one are left out.

        Raises:
            InputError: the model has no IoU head.
        """
        if not self.config.iou_head:
            raise InputError("everything: this model has no IoU head to choose masks by")
        settings = settings or EverythingConfig()
        encoded = self.encode(image)
        height, width = encoded.sam.size
        grid = torch.from_numpy(build_point_grid(settings.points_per_side)).float()
        points = grid * grid.new_tensor([width, height])
        parts = []
        for clicks in torch.split(points, settings.points_per_batch):
            prompts = Prompts(points=clicks[:, None], point_labels=torch.ones(len(clicks), 1).long())
            part, _ = self.masks(encoded, prompts)
            good = (part.ious >= settings.min_iou) & part.masks.flatten(1).any(1)
            good &= calculate_stability_score(part.low_res, 0.0, 1.0) >= settings.min_stability
            # not the masks: before suppression there are hundreds, each of the picture's size
            parts.append((part.low_res[good], part.ious[good], part.boxes[good]))
        low_PLL, ious_P, boxes_P4 = map(torch.cat, zip(*parts, strict=True))
        best = nms(boxes_P4, ious_P, settings.nms_iou)
        found = unnamed(self.full_size(low_PLL[best], encoded.sam), ious_P[best], low_PLL[best])
        return found if vocabulary is None else self.name(encoded, found, vocabulary)


def named(segments: Segments, scores_PK: Tensor, vocabulary: Vocabulary) -> Segments:
    """Segments with the best name of each.

    Args:
        segments: without names.
        scores_PK: [P, K] logits or log scores of the names; a further column is the background's, which takes its
            part of the probability but is never the answer.
        vocabulary: the names.
    """
    probability_PK = scores_PK.softmax(-1)[:, : len(vocabulary)]
    scores_P, labels_P = probability_PK.max(1)
    return replace(segments, labels=labels_P, scores=scores_P, names=vocabulary.names)


def enlarge(low_PLL: Tensor, encoded: EncodedImage, side: int) -> Tensor:
    """[P, L, L] logits -> [P, H, W] of the original image, padding cut off on the way (as the package does)."""
    whole = F.interpolate(low_PLL[:, None], (side, side), mode="bilinear", align_corners=False)
    inside = whole[..., : encoded.input_size[0], : encoded.input_size[1]]
    full = F.interpolate(inside, encoded.padded_size, mode="bilinear", align_corners=False)
    return full[:, 0, : encoded.size[0], : encoded.size[1]]


def single_mask(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of SAM's mask decoder that concern its first mask token, under the names and shapes `wanted`."""
    return {name: state[name][: len(value)] for name, value in wanted.items()}


def published(tower: TowerConfig, sam: SamConfig = VIT_H) -> OvSamConfig:
    """The released models' numbers around a CLIP tower and a SAM; CLIP, too, gets SAM's normalisation there."""
    (red, green, blue), (red_std, green_std, blue_std) = IMAGENET_MEAN, IMAGENET_STD
    mean = (red / 255, green / 255, blue / 255)
    std = (red_std / 255, green_std / 255, blue_std / 255)
    return OvSamConfig(
        sam=sam,
        tower=replace(tower, mean=mean, std=std),
        adapter_depth=5,
        pyramid_width=256,
        label_hidden=0,
        label_token=True,
        iou_head=False,
    )


RN50X16 = TowerConfig(embed_dim=768, vision={"image_size": 384, "layers": [6, 8, 18, 8], "width": 96})
"""CLIP's largest but one ResNet."""

"""OV-SAM: one frozen CLIP that segments like SAM and names what it segments (arXiv 2401.02955).

SAM2CLIP (`adapter.py`) turns CLIP's levels into SAM's image embedding; CLIP2SAM (`head.py`) names the masks.

B images, P prompts of an image, C prompt width, S side of the square input, h side of the embedding, L = 4 h, K names,
Y synonyms, D embedding width of names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.utils.amg import build_point_grid, calculate_stability_score
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ovd_models.batches import TensorRecord
from ovd_models.errors import InputError
from ovd_models.ovsam.adapter import Sam2Clip
from ovd_models.ovsam.clip_pyramid import NUM_LEVELS, ClipPyramid, TowerConfig, build_tower
from ovd_models.ovsam.head import LOGIT_SCALE, RegionNamer, fuse_scores, name_logits, synonym_rows
from ovd_models.sam.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VIT_H,
    EncodedImage,
    EverythingConfig,
    SamConfig,
    SamModel,
    build_mask_decoder,
    build_prompt_encoder,
    fit_image,
    fit_on_device,
    in_order,
    input_prompts,
    prompts_at_a_time,
    run_decoder,
    unnamed,
)
from ovd_models.segments import PROMPTS_AT_A_TIME, Prompts, Segments, boxes_of
from ovd_models.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class OvSamConfig:
    """An OV-SAM's architecture; the default is a tiny one for 128 px images."""

    sam: SamConfig = field(default_factory=SamConfig)
    """The teacher, whose prompt encoder and mask decoder are copied and whose embedding is distilled."""
    tower: TowerConfig = field(default_factory=TowerConfig)
    """CLIP's image tower, frozen."""
    adapter_depth: int = 2
    """Blocks of the adapter; the last attends to the whole image, the others to windows."""
    pyramid_width: int = 64
    label_levels: int = NUM_LEVELS
    """CLIP's levels in the label branch's pyramid, the coarsest ones; 1 is CLIP's last level alone."""
    label_hidden: int = 256
    """Width of the label branch's MLP; 0 for none, as in the released weights."""
    label_token: bool = False
    """Whether the mask decoder has the released weights' label token, which only disturbs the masks."""
    iou_head: bool = True
    """Whether SAM's IoU token and head are kept; the released weights have none."""
    alpha: float = 0.1
    """CLIP's exponent in the score of base names, see `fuse_scores`."""
    beta: float = 0.9
    """CLIP's exponent in the score of novel names."""
    novel_bias: float = 0.0
    """Added to the log scores of novel names."""
    log_scale: float = LOGIT_SCALE
    """Log of the cosines' factor; the released one is overconfident for a CLIP that learnt a smaller one."""
    clip_view: Literal["features", "cut_out"] = "features"
    """Input of CLIP's own classification: its last level's features of the mask's box, as in the released weights, or
    the image cut out along the predicted mask, which takes a second, small forward pass."""
    cut_out_margin: float = 1.5
    """Side of a cut-out relative to the longer side of the mask's box."""


@dataclass(frozen=True)
class EncodedOvSam(TensorRecord):
    """An encoded image, for any number of prompts and vocabularies."""

    sam: EncodedImage
    """The adapter's estimate of SAM's embedding."""
    pyramid: tuple[Tensor, ...]
    """The label branch's levels."""
    top: Tensor
    """CLIP's last level."""
    image: Tensor
    """[3, H, W] uint8, for cut-outs."""


class OvSam(nn.Module):
    """The whole model: frozen CLIP, adapter, SAM's prompt encoder and mask decoder, label branch."""

    def __init__(self, config: OvSamConfig) -> None:
        super().__init__()
        self.config = config
        self.clip = ClipPyramid(build_tower(config.tower, config.sam.image_size), config.tower)
        self.adapter = Sam2Clip(self.clip.channels, self.clip.strides, config.sam, config.adapter_depth)
        self.prompt_encoder = build_prompt_encoder(config.sam).requires_grad_(False)
        self.mask_decoder: MaskDecoder = build_mask_decoder(config.sam, num_multimask=0)
        self.label_token = nn.Embedding(1, config.sam.prompt_width) if config.label_token else None
        if not config.iou_head:
            del self.mask_decoder.iou_token, self.mask_decoder.iou_prediction_head
        if not 1 <= config.label_levels <= NUM_LEVELS:
            raise InputError(f"label_levels: {config.label_levels}, expected 1 to {NUM_LEVELS}")
        channels, strides = (each[-config.label_levels :] for each in (self.clip.channels, self.clip.strides))
        self.namer = RegionNamer(channels, strides, config.pyramid_width, config.tower.embed_dim, config.label_hidden)

    def load_teachers(self, teacher: SamModel, tower: nn.Module) -> None:
        """Copy the pretrained parts: SAM's position embeddings, prompt encoder and single-mask decoder, and CLIP.

        Both are of this model's config; `tower` is open_clip's image tower.
        """
        sam = teacher.sam
        self.clip.load_tower(tower.state_dict())
        self.adapter.pos_embed.copy_(sam.image_encoder.pos_embed.detach())
        self.prompt_encoder.load_state_dict(sam.prompt_encoder.state_dict())
        decoder, own = sam.mask_decoder.state_dict(), self.mask_decoder.state_dict()
        self.mask_decoder.load_state_dict({name: decoder[name][: len(value)] for name, value in own.items()})

    def preprocess(self, images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Images for training, [3, H, W] uint8, normalised and padded at the end: [B, 3, S, S].

        Also the resized heights and widths.
        """
        side = self.config.sam.image_size
        fitted = [fit_on_device(image, side) for image in images]
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in fitted]
        return torch.stack([self.clip.normalise(image, side) for image in fitted]), sizes

    @torch.no_grad()
    def encode(self, image: Tensor) -> EncodedOvSam:
        """Encode an image [3, H, W] uint8."""
        fitted, padded_size = fit_image(image, self.config.sam.image_size)
        levels = self.clip(self.clip.normalise(fitted, self.config.sam.image_size)[None])
        input_size, size = ((int(entry.shape[1]), int(entry.shape[2])) for entry in (fitted, image))
        sam = EncodedImage(self.adapter(levels), input_size, padded_size, size)
        return EncodedOvSam(sam, tuple(self.namer.pyramid(levels)), levels[-1], image)

    def decode(self, embedding_PChw: Tensor, sparse_PnC: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits [P, L, L] and predicted IoUs [P] of prompts, NaN without an IoU head."""
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
        """[P, 4] regions to name, pixels of the input: the box prompt, else the predicted mask's tight box.

        An empty mask gives the whole input.
        """
        if boxes_P4 is not None:
            return boxes_P4
        return boxes_of(low_PLL > 0, whole_if_empty=True) * (self.config.sam.image_size / low_PLL.shape[-1])

    def head_logits(self, pyramid: Sequence[Tensor], rois_P5: Tensor, text_KYD: Tensor) -> Tensor:
        """[P, K + 1] the label branch's logits of regions of the input."""
        return name_logits(self.namer(pyramid, rois_P5), text_KYD, self.config.log_scale)

    def clip_logits(self, encoded: EncodedOvSam, rois_P5: Tensor, masks_PHW: Tensor, text_KYD: Tensor) -> Tensor:
        """[P, K + 1] CLIP's own logits of regions of the input, or of the masks cut out of the image."""
        if self.config.clip_view == "features":
            embedding_PD = self.clip.region_embeddings(encoded.top, rois_P5)
        else:
            embedding_PD = self.clip.embed_crops(encoded.image, masks_PHW, self.config.cut_out_margin, "mean")
        return name_logits(embedding_PD, text_KYD, self.config.log_scale)

    @torch.no_grad()
    def segment(self, image: Tensor | EncodedOvSam, prompts: Prompts, vocabulary: Vocabulary | None = None) -> Segments:
        """One mask for each prompt, named if a vocabulary is given.

        Args:
            image: [3, H, W] uint8, or the result of `encode`.
            prompts: in pixels of the original image.
            vocabulary: any names; without base flags, all count as novel.

        Raises:
            InputError: the prompts do not fit the image, see `Prompts.checked`.
        """
        encoded = self.encode(image) if isinstance(image, Tensor) else image
        segments, boxes_P4 = self.masks(encoded, prompts)
        return segments if vocabulary is None else self.name(encoded, segments, vocabulary, boxes_P4)

    @torch.no_grad()
    def masks(self, encoded: EncodedOvSam, prompts: Prompts) -> tuple[Segments, Tensor | None]:
        """One mask for each prompt of an encoded image, and box prompts [P, 4] in pixels of the input, if any.

        Raises:
            InputError: the prompts do not fit the image, see `Prompts.checked`.
        """
        low_PLL, ious_P, boxes_P4 = self.low_masks(encoded, prompts)
        return unnamed(self.full_size(low_PLL, encoded.sam), ious_P, low_PLL), boxes_P4

    @torch.no_grad()
    def low_masks(self, encoded: EncodedOvSam, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor | None]:
        """`masks` before they are enlarged: logits [P, L, L], predicted IoUs [P], and the box prompts."""
        given = input_prompts(prompts, encoded.sam)
        found = []
        for rows_P, part in given.without_padding(PROMPTS_AT_A_TIME):
            points = None if part.points is None else (part.points, part.point_labels)
            masks = None if part.masks is None else part.masks[:, None]
            sparse, dense = self.prompt_encoder(points, part.boxes, masks)
            found.append((rows_P, *self.decode(encoded.sam.embedding.expand(len(sparse), -1, -1, -1), sparse, dense)))
        low_PLL, ious_P = in_order(found)
        return low_PLL, ious_P, given.boxes

    def full_size(self, low_PLL: Tensor, encoded: EncodedImage) -> Tensor:
        """[P, L, L] logits -> masks [P, H, W] of the original image, in parts that bound the memory."""
        side = self.config.sam.image_size
        count = prompts_at_a_time(encoded.padded_size, side)
        return torch.cat([enlarge(part, encoded, side) > 0 for part in torch.split(low_PLL, count)])

    @torch.no_grad()
    def name(
        self, encoded: EncodedOvSam, segments: Segments, vocabulary: Vocabulary, boxes_P4: Tensor | None = None
    ) -> Segments:
        """The same segments, named; `boxes_P4` are their box prompts, in pixels of the input.

        Without base flags, all names of the vocabulary count as novel.
        """
        if not len(segments):
            return replace(segments, names=vocabulary.names)
        head_PK, clip_PK, filled_P = self.score_names(encoded, segments, vocabulary, boxes_P4)
        alpha, beta, bias = self.config.alpha, self.config.beta, self.config.novel_bias
        is_base = vocabulary.is_base
        fused_PK = fuse_scores(head_PK, clip_PK, is_base, filled_P, alpha=alpha, beta=beta, novel_bias=bias)
        return with_names(segments, fused_PK, vocabulary)

    @torch.no_grad()
    def score_names(
        self, encoded: EncodedOvSam, segments: Segments, vocabulary: Vocabulary, boxes_P4: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of `fuse_scores`: logits [P, K + 1] of the label branch and of CLIP, and [P] bool, not empty."""
        rois_P5, text_KYD = F.pad(self.rois_of(segments.low_res, boxes_P4), (1, 0)), synonym_rows(vocabulary)
        parts = zip(*(torch.split(rows, PROMPTS_AT_A_TIME) for rows in (rois_P5, segments.masks)), strict=True)
        logits = [
            (self.head_logits(encoded.pyramid, rois, text_KYD), self.clip_logits(encoded, rois, masks, text_KYD))
            for rois, masks in parts
        ]
        head_PK, clip_PK = map(torch.cat, zip(*logits, strict=True))
        return head_PK, clip_PK, segments.masks.flatten(1).any(1)

    def everything(
        self,
        image: Tensor | EncodedOvSam,
        vocabulary: Vocabulary | None = None,
        settings: EverythingConfig | None = None,
    ) -> Segments:
        """The masks of a whole image, best first by predicted IoU, named if a vocabulary is given.

        The image is [3, H, W] uint8, or the result of `encode`.

        As in the package's automatic mask generator, prompts are a grid of clicks, and masks of low predicted IoU, low
        stability or high overlap with a better one are dropped. By default, the number of clicks follows the image's
        size. If nothing remains, `Segments.reason` says why.

        Raises:
            InputError: the model has no IoU head.
        """
        if not self.config.iou_head:
            raise InputError("everything: this model has no IoU head to choose masks by")
        encoded = self.encode(image) if isinstance(image, Tensor) else image
        height, width = encoded.sam.size
        settings = settings or EverythingConfig()
        grid = torch.from_numpy(build_point_grid(settings.clicks_along(width, height))).float()
        points = grid * grid.new_tensor([width, height])
        parts, confident, best_iou = [], 0, 0.0
        for clicks in torch.split(points, settings.points_per_batch):
            prompts = Prompts(points=clicks[:, None], point_labels=torch.ones(len(clicks), 1).long())
            low_PLL, ious_P, _ = self.low_masks(encoded, prompts)
            good = (ious_P >= settings.min_iou) & (low_PLL > 0).flatten(1).any(1)
            confident, best_iou = confident + int(good.sum()), max(best_iou, float(ious_P.max()))
            good &= calculate_stability_score(low_PLL, 0.0, 1.0) >= settings.min_stability
            low_PLL, ious_P = low_PLL[good], ious_P[good]
            part = unnamed(self.full_size(low_PLL, encoded.sam), ious_P, low_PLL)
            shown = part.masks.flatten(1).any(1)  # not only in the padding
            # not the masks: before suppression there are hundreds, each of the image's size
            parts.append((low_PLL[shown], ious_P[shown], part.boxes[shown]))
        low_PLL, ious_P, boxes_P4 = map(torch.cat, zip(*parts, strict=True))
        best = nms(boxes_P4, ious_P, settings.nms_iou)[: settings.max_masks]
        segments = unnamed(self.full_size(low_PLL[best], encoded.sam), ious_P[best], low_PLL[best])
        if not len(segments):
            reason = (
                f"{confident:,} of {len(points):,} clicks give a mask with a predicted IoU of {settings.min_iou:g} or "
                f"more (the best has {best_iou:.2f}), and none of these a stability of {settings.min_stability:g}"
            )
            segments = replace(segments, reason=reason)
        return segments if vocabulary is None else self.name(encoded, segments, vocabulary)


def with_names(segments: Segments, scores_PK: Tensor, vocabulary: Vocabulary) -> Segments:
    """Segments, each with its best name by logits or log scores [P, K].

    A further column is the background's, which takes probability but is never the label.
    """
    probability_PK = scores_PK.softmax(-1)[:, : len(vocabulary)]
    scores_P, labels_P = probability_PK.max(1)
    return replace(segments, labels=labels_P, scores=scores_P, names=vocabulary.names)


def enlarge(low_PLL: Tensor, encoded: EncodedImage, side: int) -> Tensor:
    """[P, L, L] logits -> [P, H, W] of the original image, padding cropped in between as in the package."""
    whole = F.interpolate(low_PLL[:, None], (side, side), mode="bilinear", align_corners=False)
    inside = whole[..., : encoded.input_size[0], : encoded.input_size[1]]
    full = F.interpolate(inside, encoded.padded_size, mode="bilinear", align_corners=False)
    return full[:, 0, : encoded.size[0], : encoded.size[1]]


def published(tower: TowerConfig, sam: SamConfig = VIT_H) -> OvSamConfig:
    """The released models' config for a CLIP tower and a SAM; they use SAM's normalisation for CLIP too."""
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
"""CLIP's second largest ResNet."""

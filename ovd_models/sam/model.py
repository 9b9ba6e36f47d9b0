"""SAM through the segment-anything package: official or tiny, prompted or on everything (arXiv 2304.02643).

B images, P prompts, C prompt width, T tokens, K mask tokens, S side of the model's square input, h x w embedding,
L = 4 h side of the decoder's maps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.batches import TensorRecord
from ovd_models.errors import InputError
from ovd_models.images import fitted_size
from ovd_models.preprocess import add_edge
from ovd_models.segments import OFF, ON, PADDING, PIXELS_AT_A_TIME, PROMPTS_AT_A_TIME, Prompts, Segments
from ovd_models.weights import load_strict, read_state

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
"""In grey levels of 0 to 255."""


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """A SAM's architecture; the default is a tiny one for 128 px images."""

    image_size: int = 128
    """S: the longer side of an image is resized to it, the other padded; a multiple of `patch_size`."""
    patch_size: int = 8
    """Stride of the embeddings, in pixels."""
    width: int = 128
    depth: int = 4
    heads: int = 4
    window: int = 8
    """Side of the attention windows, in embeddings."""
    global_blocks: tuple[int, ...] = (1, 3)
    """Blocks that attend to the whole image."""
    norm_eps: float = 1e-6
    """Epsilon of the image encoder's layer norms."""
    prompt_width: int = 128
    """C."""
    mask_channels: int = 8
    decoder_heads: int = 4
    decoder_mlp: int = 256
    iou_width: int = 64

    @property
    def embedding_side(self) -> int:
        """Side h of the image embedding."""
        return self.image_size // self.patch_size


VIT_B = SamConfig(
    image_size=1024,
    patch_size=16,
    width=768,
    depth=12,
    heads=12,
    window=14,
    global_blocks=(2, 5, 8, 11),
    prompt_width=256,
    mask_channels=16,
    decoder_heads=8,
    decoder_mlp=2048,
    iou_width=256,
)
VIT_L = replace(VIT_B, width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23))
VIT_H = replace(VIT_B, width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31))
"""The published models."""


class SamPromptEncoder(PromptEncoder):  # type: ignore[misc]
    """The package's prompt encoder without host waits, in float32.

    The package selects points by boolean masks of their labels, and the host waits for the number of selected points.
    Under autocast it would round coordinates: bfloat16 has steps of 4 px at 1,024 px.
    """

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The package's sparse [P, n, C] and dense [P, C, h, h] embeddings."""
        with torch.autocast(self._get_device().type, enabled=False):
            embedded: tuple[Tensor, Tensor] = super().forward(points, boxes, None if masks is None else masks.float())
        return embedded

    def get_dense_pe(self) -> Tensor:
        """[1, C, h, h] positions of the image embedding's cells."""
        with torch.autocast(self._get_device().type, enabled=False):
            positions: Tensor = super().get_dense_pe()
        return positions

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        """[P, n, 2] xy and [P, n] labels -> [P, n, C], or [P, n + 1, C] with a padding point."""
        if pad:
            points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=PADDING)
        place_PnC = self.pe_layer.forward_with_coords(points + 0.5, self.input_image_size)
        label_Pn1, (off, on) = labels[..., None], self.point_embeddings[:2]
        kind_PnC = torch.where(label_Pn1 == OFF, off.weight, self.not_a_point_embed.weight)
        kind_PnC = torch.where(label_Pn1 == ON, on.weight, kind_PnC)
        return torch.where(label_Pn1 == PADDING, 0.0, place_PnC) + kind_PnC


def build_prompt_encoder(config: SamConfig) -> PromptEncoder:
    """The package's prompt encoder, with random weights."""
    return SamPromptEncoder(
        embed_dim=config.prompt_width,
        image_embedding_size=(config.embedding_side, config.embedding_side),
        input_image_size=(config.image_size, config.image_size),
        mask_in_chans=config.mask_channels,
    )


def build_mask_decoder(config: SamConfig, num_multimask: int = 3) -> MaskDecoder:
    """The package's mask decoder, with random weights."""
    return MaskDecoder(
        transformer_dim=config.prompt_width,
        transformer=TwoWayTransformer(
            depth=2, embedding_dim=config.prompt_width, num_heads=config.decoder_heads, mlp_dim=config.decoder_mlp
        ),
        num_multimask_outputs=num_multimask,
        iou_head_depth=3,
        iou_head_hidden_dim=config.iou_width,
    )


def build_sam(config: SamConfig) -> Sam:
    """The package's model of this config, with random weights.

    Raises:
        InputError: sizes do not divide as they must.
    """
    if config.image_size % config.patch_size:
        raise InputError(f"image_size: {config.image_size}, expected a multiple of patch_size {config.patch_size}")
    if config.prompt_width % (2 * config.decoder_heads):
        raise InputError(
            f"prompt_width: {config.prompt_width}, expected a multiple of 2 x {config.decoder_heads} heads"
        )
    encoder = ImageEncoderViT(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        out_chans=config.prompt_width,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        use_rel_pos=True,
        window_size=config.window,
        global_attn_indexes=config.global_blocks,
    )
    prompt_encoder = build_prompt_encoder(config)
    return Sam(encoder, prompt_encoder, build_mask_decoder(config), list(IMAGENET_MEAN), list(IMAGENET_STD))


def run_decoder(
    decoder: MaskDecoder, first_TC: Tensor, image_PChw: Tensor, position_1Chw: Tensor, sparse_PnC: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """The package's mask decoder on prompts of several images at once, with a free choice of first tokens.

    Args:
        decoder: provides the weights.
        first_TC: [T, C] tokens before the mask tokens, such as the IoU token.
        image_PChw: each prompt's image embedding.
        position_1Chw: the embedding's position encoding.
        sparse_PnC: point and box embeddings.
        dense: [P, C, h, w] or [P, C, 1, 1] mask embeddings.

    Returns:
        Outputs of the first tokens [P, T, C], and logits [P, K, L, L] of the mask tokens.
    """
    count, num_first = sparse_PnC.shape[0], len(first_TC)  # a shape, for tracing
    own_TC = torch.cat([first_TC, decoder.mask_tokens.weight])
    tokens_PTC = torch.cat([own_TC.expand(count, -1, -1), sparse_PnC], dim=1)
    source_PChw = image_PChw + dense
    hidden_PTC, keys_PNC = decoder.transformer(source_PChw, position_1Chw.expand_as(source_PChw), tokens_PTC)
    upscaled_PcLL = decoder.output_upscaling(keys_PNC.transpose(1, 2).reshape(source_PChw.shape))
    masks_PKC = hidden_PTC[:, num_first : len(own_TC)].unbind(1)
    filters_PKc = torch.stack(
        [head(token) for head, token in zip(decoder.output_hypernetworks_mlps, masks_PKC, strict=True)], dim=1
    )
    return hidden_PTC[:, :num_first], torch.einsum("pkc,pcyx->pkyx", filters_PKc, upscaled_PcLL)


@dataclass(frozen=True)
class EncodedImage(TensorRecord):
    """An encoded image, for any number of prompts."""

    embedding: Tensor
    """[1, C, h, w]."""
    input_size: tuple[int, int]
    """Height and width of the resized image inside the model's square."""
    padded_size: tuple[int, int]
    """Height and width before resizing, with the padding of an extremely long image."""
    size: tuple[int, int]
    """Height and width of the original image."""


def fit_image(image: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """An image resized by Pillow as the package does it, before normalisation and padding.

    Args:
        image: [3, H, W] uint8; padded by `add_edge` if its shorter side would vanish.
        side: S.

    Returns:
        [3, h, w] uint8 with a longer side S, and height and width after `add_edge`.
    """
    image = add_edge(image, side)
    size = (int(image.shape[-2]), int(image.shape[-1]))
    if max(size) == side:
        return image, size
    resized = ResizeLongestSide(side).apply_image(image.permute(1, 2, 0).cpu().numpy())
    return torch.from_numpy(resized).permute(2, 0, 1).to(image.device), size


def fit_on_device(image: Tensor, side: int) -> Tensor:
    """An image for training, resized on its own device: [3, H, W] uint8 -> [3, h, w] of `fitted_size`.

    An image of that size is returned as it is. Others differ from `fit_image`'s, which Pillow resizes on the CPU, by a
    grey level at most, if they are not so long that `fit_image` pads them.
    """
    size = fitted_size(int(image.shape[1]), int(image.shape[2]), side)
    if image.shape[1:] == size:
        return image
    resized = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)[0]
    return resized.round().to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class EverythingConfig:
    """Settings of the automatic mask generator; the defaults of all but the clicks are the package's."""

    points_per_side: int | None = None
    """Clicks along each side; if None, one every 8 pixels of the longer side, 8 to 32 (the package's)."""
    points_per_batch: int = 64
    min_iou: float = 0.88
    """Minimum predicted IoU of a mask."""
    min_stability: float = 0.95
    """Minimum IoU of the masks at a higher and a lower threshold."""
    nms_iou: float = 0.7
    max_masks: int = 1024
    """Maximum number of masks, the best by predicted IoU."""

    def clicks_along(self, width: int, height: int) -> int:
        """Clicks along each side of an image."""
        return self.points_per_side or min(32, max(8, round(max(width, height) / 8)))


class SamModel(nn.Module):
    """A segment-anything model with prompts as records."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.config = config
        self.sam = build_sam(config)

    @torch.no_grad()
    def encode(self, image: Tensor) -> EncodedImage:
        """Encode an image [3, H, W] uint8."""
        fitted, padded_size = fit_image(image, self.config.image_size)
        embedding = self.sam.image_encoder(self.sam.preprocess(fitted[None]))
        size = (int(image.shape[-2]), int(image.shape[-1]))
        return EncodedImage(embedding, (int(fitted.shape[-2]), int(fitted.shape[-1])), padded_size, size)

    def decode(self, embedding_PChw: Tensor, sparse_PnC: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits [P, K, L, L] and predicted IoUs [P, K] of embedded prompts, see `run_decoder`."""
        decoder, position = self.sam.mask_decoder, self.sam.prompt_encoder.get_dense_pe()
        first_TC = decoder.iou_token.weight
        hidden_PTC, low_PKLL = run_decoder(decoder, first_TC, embedding_PChw, position, sparse_PnC, dense)
        return low_PKLL, decoder.iou_prediction_head(hidden_PTC[:, 0])

    def predictor(self, encoded: EncodedImage) -> SamPredictor:
        """The package's predictor, set to an encoded image."""
        predictor = SamPredictor(self.sam)
        predictor.features, predictor.is_image_set = encoded.embedding, True
        predictor.input_size, predictor.original_size = encoded.input_size, encoded.padded_size
        return predictor

    @torch.no_grad()
    def segment(self, image: Tensor | EncodedImage, prompts: Prompts) -> Segments:
        """One mask for each prompt, by the package's predictor: the best of three for a single click.

        Args:
            image: [3, H, W] uint8, or the result of `encode`.
            prompts: in pixels of the original image.

        Raises:
            InputError: the prompts do not fit the image, see `Prompts.checked`.
        """
        encoded = self.encode(image) if isinstance(image, Tensor) else image
        height, width = encoded.size
        given = input_prompts(prompts, encoded)
        points_only = given.boxes is None and given.masks is None
        predictor, found = self.predictor(encoded), []
        maps = self.sam.mask_decoder.num_multimask_outputs if points_only else 1
        for rows_P, part in given.without_padding(prompts_at_a_time(encoded.padded_size, self.config.image_size, maps)):
            masks_PKHW, ious_PK, low_PKLL = predictor.predict_torch(
                part.points,
                part.point_labels,
                part.boxes,
                None if part.masks is None else part.masks[:, None],
                points_only and part.points is not None and part.points.shape[1] == 1,
            )
            best_P = ious_PK.argmax(1)
            own = torch.arange(len(best_P), device=best_P.device), best_P
            found.append((rows_P, masks_PKHW[own][:, :height, :width], ious_PK[own], low_PKLL[own]))
        return unnamed(*in_order(found))

    def everything(self, image: Tensor, settings: EverythingConfig) -> Segments:
        """The masks of a whole image, best first, by the package's automatic mask generator."""
        height, width = image.shape[-2:]
        pixels = add_edge(image, self.config.image_size).permute(1, 2, 0).cpu().numpy()
        maps = self.sam.mask_decoder.num_multimask_outputs
        most = prompts_at_a_time((pixels.shape[0], pixels.shape[1]), self.config.image_size, maps)
        generator = SamAutomaticMaskGenerator(
            self.sam,
            points_per_side=settings.clicks_along(int(image.shape[-1]), int(image.shape[-2])),
            points_per_batch=min(settings.points_per_batch, most),
            pred_iou_thresh=settings.min_iou,
            stability_score_thresh=settings.min_stability,
            box_nms_thresh=settings.nms_iou,
        )
        with torch.autocast(self.sam.device.type, enabled=False):  # the package makes arrays, which have no bfloat16
            generated = generator.generate(pixels)
        records = sorted(generated, key=lambda record: -float(record["predicted_iou"]))
        records = records[: settings.max_masks]
        masks = np.zeros((len(records), height, width), bool)
        for row, record in enumerate(records):
            masks[row] = record["segmentation"][:height, :width]
        ious = torch.tensor([float(record["predicted_iou"]) for record in records])
        masks_PHW = torch.from_numpy(masks)
        side = 4 * self.config.embedding_side
        size = [max(1, round(length * side / max(height, width))) for length in (height, width)]
        edge = (0, side - size[1], 0, side - size[0])  # of the model's square; a long image's own would be huge
        shares = [
            F.pad(F.interpolate(part[:, None].float(), size, mode="area")[:, 0], edge)
            for part in torch.split(masks_PHW, settings.points_per_batch)
        ]
        return unnamed(masks_PHW, ious, 20 * (torch.cat(shares) - 0.5))


def input_prompts(prompts: Prompts, encoded: EncodedImage) -> Prompts:
    """Checked prompts in pixels of the model's input, on its device.

    Raises:
        InputError: the prompts do not fit the image, see `Prompts.checked`.
    """
    height, width = encoded.size
    given = prompts.checked(width, height, 4 * encoded.embedding.shape[-1]).to(encoded.embedding.device)
    points = None if given.points is None else scale_prompts(given.points, encoded)
    boxes = None if given.boxes is None else scale_prompts(given.boxes.view(-1, 2, 2), encoded).view(-1, 4)
    return replace(given, points=points, boxes=boxes)


def prompts_at_a_time(size: tuple[int, int], side: int, maps: int = 1) -> int:
    """Prompts whose masks, `maps` for each, are enlarged at a time, to bound memory.

    Masks are enlarged to the model's square of `side` pixels, then to the image's `size` (height and width).
    """
    return max(1, min(PROMPTS_AT_A_TIME, PIXELS_AT_A_TIME // (maps * max(side * side, math.prod(size)))))


def in_order(parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The results of all parts of prompts, joined and in the order of the rows, which come first in each part."""
    rows_P, *values = map(torch.cat, zip(*parts, strict=True))
    order_P = rows_P.argsort()
    return [value[order_P.to(value.device)] for value in values]


def scale_prompts(points: Tensor, encoded: EncodedImage) -> Tensor:
    """[..., 2] xy of the original image -> of the model's input."""
    resize = ResizeLongestSide(max(encoded.input_size))
    scaled: Tensor = resize.apply_coords_torch(points, encoded.padded_size)
    return scaled


def unnamed(masks_PHW: Tensor, ious_P: Tensor, low_res_PLL: Tensor) -> Segments:
    """Segments without a vocabulary."""
    count, device = len(masks_PHW), masks_PHW.device
    nothing = torch.full((count,), float("nan"), device=device)
    labels_P = torch.full((count,), -1, device=device)
    return Segments(masks_PHW, ious_P.float(), labels_P, nothing, (), low_res_PLL.float())  # bfloat16 under autocast


def load_sam(path: str | Path, config: SamConfig) -> SamModel:
    """A SAM from a published checkpoint, a bare state dict; no code in the file is run.

    Raises:
        InputError: the file is unreadable, or its weights do not fit the config.
    """
    state = read_state(path)
    model = SamModel(config)
    load_strict(model.sam, state, path)
    return model.eval()

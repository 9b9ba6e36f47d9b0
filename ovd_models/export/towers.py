"""CLIP's towers and the encoders and decoders of SAM as traceable functions.

B images or texts, T tokens, D embedding width, P prompts, n points, K masks of a prompt, C prompt width, S side of the
model's square input, h x w its embedding, L = 4 h.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.clip.model import Clip
from ovd_models.ovsam.model import OvSam
from ovd_models.sam.model import SamModel
from ovd_models.segments import OFF, ON, PADDING

CORNERS = (2, 3)
"""Labels of the upper left and the lower right corner of a box, among those of points."""


class ExportedImageTower(nn.Module):
    """CLIP's image tower."""

    def __init__(self, model: Clip) -> None:
        super().__init__()
        self.tower, self.normalise = model.model.visual, model.normalise

    def forward(self, images: Tensor) -> Tensor:
        """[B, S, S, 3] uint8 RGB -> [B, D] unit rows."""
        return F.normalize(self.tower(self.normalise(images.permute(0, 3, 1, 2).float() / 255)), dim=-1)


class ExportedTextTower(nn.Module):
    """CLIP's text tower."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] int64, T the context length -> [B, D] unit rows."""
        return F.normalize(self.tower(tokens), dim=-1)


class ExportedSamEncoder(nn.Module):
    """SAM's image encoder."""

    def __init__(self, model: SamModel) -> None:
        super().__init__()
        self.sam = model.sam

    def forward(self, image: Tensor) -> Tensor:
        """[H, W, 3] uint8 RGB with a longer side S -> [1, C, h, w]."""
        return torch.as_tensor(self.sam.image_encoder(self.sam.preprocess(image.permute(2, 0, 1)[None].float())))


class ExportedSamDecoder(nn.Module):
    """The prompt encoder and mask decoder of a SAM or an OV-SAM, for points and boxes."""

    def __init__(self, model: SamModel | OvSam) -> None:
        super().__init__()
        self.model = model
        config = model.config if isinstance(model, SamModel) else model.config.sam
        self.side = config.image_size
        self.prompt_encoder: Any = model.sam.prompt_encoder if isinstance(model, SamModel) else model.prompt_encoder

    def forward(
        self, embedding: Tensor, points: Tensor, labels: Tensor, input_size: Tensor, size: Tensor
    ) -> tuple[Tensor, ...]:
        """Masks of each prompt.

        Args:
            embedding: [1, C, h, w] of the image.
            points: [P, n, 2] xy in pixels of the encoder's input.
            labels: [P, n] int64: 1 inside the object, 0 outside, 2 and 3 corners of its box, -1 padding. A prompt of
                points without a box ends with a padding point.
            input_size: [2] int64, height and width of the encoder's input.
            size: [2] int64, height and width of the original image.

        Returns:
            [P, K, H, W] logits, positive inside, in the size of the original image; [P, K] estimated IoUs. The first
            mask is the best for several points or a box, the others are for a single point. Of an OV-SAM one mask, its
            tight box [P, 4] in pixels of the encoder's input and, unless it is a released one, its estimated IoU.
        """
        encoder, side = self.prompt_encoder, self.side
        sparse_PnC = self._embed(points, labels[..., None])
        dense = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        image_PChw = embedding.expand(sparse_PnC.shape[0], -1, -1, -1)
        low_PKLL, iou_PK = self.model.decode(image_PChw, sparse_PnC, dense)
        others: tuple[Tensor, ...] = (iou_PK,)
        if isinstance(self.model, OvSam):
            others = (self.model.rois_of(low_PKLL, None), *([iou_PK[:, None]] if self.model.config.iou_head else []))
            low_PKLL = low_PKLL[:, None]
        square = F.interpolate(low_PKLL, (side, side), mode="bilinear", align_corners=False)
        inside = square[..., : input_size[0], : input_size[1]]
        sides: list[int] = [size[0], size[1]]  # type: ignore[list-item]  # tensors, which tracing follows
        return F.interpolate(inside, sides, mode="bilinear", align_corners=False), *others

    def _embed(self, points: Tensor, label_Pn1: Tensor) -> Tensor:
        """[P, n, C], as the package embeds points and boxes."""
        encoder = self.prompt_encoder
        place_PnC = encoder.pe_layer.forward_with_coords(points + 0.5, encoder.input_image_size)
        kind_PnC = encoder.not_a_point_embed.weight.expand_as(place_PnC)
        for value, index in ((OFF, 0), (ON, 1), (CORNERS[0], 2), (CORNERS[1], 3)):
            kind_PnC = torch.where(label_Pn1 == value, encoder.point_embeddings[index].weight, kind_PnC)
        return torch.as_tensor(torch.where(label_Pn1 == PADDING, torch.zeros_like(place_PnC), place_PnC) + kind_PnC)

"""Text to mask: SAM prompted by CLIP embeddings of crops in training, of names at test time (arXiv 2304.02643, D.5).

SAM's own features say little about what a thing is, so a name also becomes a point: the centre of the window of the
image whose CLIP embedding is nearest to it. Training puts the point near the centre of the object. The paper has the
embedding alone (`windows` empty).

B images, P prompts, D width of CLIP's space, C prompt width, L side of the decoder's maps, S side of the input, N
windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.batches import TensorRecord
from ovd_models.errors import InputError
from ovd_models.losses import zero_loss
from ovd_models.ovsam.clip_pyramid import ClipPyramid, TowerConfig, build_tower
from ovd_models.ovsam.crops import square_crops
from ovd_models.sam.model import (
    EncodedImage,
    SamConfig,
    SamModel,
    fit_on_device,
    in_order,
    input_prompts,
    prompts_at_a_time,
    unnamed,
)
from ovd_models.sam.training import (
    SampledObjects,
    SamTrainingConfig,
    corrective_clicks,
    prompt_losses,
    sample_objects,
)
from ovd_models.segments import ON, MaskBatch, Prompts, Segments

CENTRE_MOMENTUM = 0.99
WINDOWS = (0.15, 0.3, 0.6)
"""Sides of windows for objects of any size."""
WINDOW_STEPS = 16
"""Windows are a sixteenth of the input's side apart."""
WINDOWS_AT_A_TIME = 64
CENTRAL = 0.5
"""The points of training lie in the central half of an object's box, each way."""


@dataclass(frozen=True, kw_only=True)
class TextToMaskConfig:
    """How the text prompt is trained."""

    prompts_per_image: int = 3
    """Objects of an image used as prompts, drawn with replacement."""
    max_margin: float = 2.0
    """Maximum side of the square crops relative to the object's longer side; drawn between 1 and this."""
    hidden_share: float = 0.5
    """Share of the crops in which the background is blanked."""
    clicks: int = 0
    """Rounds after the name that add a corrective click to the last mask."""
    min_area: int = 0
    """Minimum area of a mask to learn from, in pixels of the model's input."""
    windows: tuple[float, ...] = ()
    """Sides of the square windows in which a name is looked for, relative to the input's side; none: no point."""


@dataclass(frozen=True, kw_only=True)
class TextToMaskModelConfig:
    """All that a text-to-mask model is built from."""

    sam: SamConfig = field(default_factory=SamConfig)
    tower: TowerConfig = field(default_factory=TowerConfig)
    """CLIP's image tower."""
    text: TextToMaskConfig = field(default_factory=TextToMaskConfig)


@dataclass(frozen=True)
class EncodedTextToMask(TensorRecord):
    """An encoded image, for any names."""

    sam: EncodedImage
    windows: Tensor
    """[N, D] centred unit rows of CLIP's embeddings of its windows."""
    centres: Tensor
    """[N, 2] xy of the windows' centres in pixels of the model's input."""


class TextToMask(nn.Module):
    """A SAM with CLIP embeddings as prompts; only the mask decoder and the projection of prompts are trained.

    Embeddings of images and of sentences lie apart in CLIP's space. Those of crops and windows are centred at the mean
    of the crops of training and those of names at the mean of names, so that names give prompts near those of training.
    """

    image_centre: Tensor
    text_centre: Tensor

    def __init__(self, config: TextToMaskModelConfig) -> None:
        super().__init__()
        self.config, self.settings = config, config.text
        clip = ClipPyramid(build_tower(config.tower, config.sam.image_size), config.tower)
        self.sam = SamModel(config.sam).requires_grad_(False)
        self.sam.sam.mask_decoder.requires_grad_(True)
        self.clip = clip
        self.token = nn.Linear(config.tower.embed_dim, config.sam.prompt_width)
        self.register_buffer("image_centre", torch.zeros(config.tower.embed_dim))
        self.register_buffer("text_centre", torch.zeros(config.tower.embed_dim))

    def set_text_centre(self, text_KD: Tensor) -> None:
        """Set the centre of names to the mean of these unit rows, at least two.

        Raises:
            InputError: there are fewer.
        """
        if len(text_KD) < 2:
            raise InputError(f"text centre: {len(text_KD)} names, expected at least 2")
        self.text_centre.copy_(text_KD.mean(0))

    def forward(self, batch: MaskBatch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Weighted losses `focal`, `dice` and `iou` of masks prompted by the CLIP embedding of their own crop."""
        side = self.sam.config.image_size
        fitted = [fit_on_device(image, side) for image in batch.images]
        with torch.no_grad():
            embedding_BChw = self.sam.sam.image_encoder(torch.stack([self.sam.sam.preprocess(f) for f in fitted]))
        objects = sample_objects(batch, side, self.settings.prompts_per_image, generator)
        if self.settings.min_area:
            large_P = objects.masks.flatten(1).sum(1) >= self.settings.min_area
            objects = objects.take(torch.nonzero(large_P).flatten())
        if not len(objects.labels):
            return dict.fromkeys(("focal", "dice", "iou"), zero_loss(self.parameters()))
        images = torch.stack([self.clip.normalise(image, side) for image in fitted])
        image_PD = self._embed_crops(images, objects, generator)
        if self.training:
            share = torch.where(self.image_centre.any(), 1 - CENTRE_MOMENTUM, 1.0)
            self.image_centre.lerp_(image_PD.mean(0), share)
        embedding_PChw, centred_PD = embedding_BChw[objects.images], image_PD - self.image_centre
        settings = SamTrainingConfig()
        points, labels, rounds = [], [], []
        if self.settings.windows:
            points.append(central_points(objects.boxes, generator))
            labels.append(torch.full_like(objects.labels, ON))
        last_PLL: Tensor | None = None
        for _ in range(1 + self.settings.clicks):
            if last_PLL is not None:
                enlarged_P1SS = F.interpolate(last_PLL[:, None], (side, side), mode="bilinear", align_corners=False)
                point_P2, label_P = corrective_clicks(enlarged_P1SS[:, 0] > 0, objects.masks, generator)
                points.append(point_P2)
                labels.append(label_P)
            clicks = Prompts(torch.stack(points, 1), torch.stack(labels, 1), masks=last_PLL) if points else None
            low_PKLL, ious_PK = self._decode(embedding_PChw, centred_PD, clicks)
            rounds.append(prompt_losses(low_PKLL, ious_PK, objects.masks, settings, ambiguous=False))
            last_PLL = low_PKLL.detach()[:, 0]
        return {name: torch.stack([entry[name] for entry in rounds]).mean() for name in rounds[0]}

    @torch.no_grad()
    def _embed_crops(self, images: Tensor, objects: SampledObjects, generator: torch.Generator | None) -> Tensor:
        """[P, D] unit rows of square crops around the objects, some with a blank background."""
        count = len(objects.labels)
        draws = torch.rand((2, count), generator=generator).to(images.device, non_blocking=True)
        shown = objects.masks | (draws[0] >= self.settings.hidden_share)[:, None, None]
        shown_P3SS = images[objects.images] * shown[:, None]
        margin_P = 1 + draws[1] * (self.settings.max_margin - 1)
        rows = torch.arange(count, device=images.device)
        crops = square_crops(shown_P3SS, rows, objects.boxes, margin_P, self.config.tower.image_size)
        return self.clip.embed(crops)

    def _decode(
        self, embedding_PChw: Tensor, centred_PD: Tensor, clicks: Prompts | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mask logits [P, K, L, L] and predicted IoUs [P, K] of centred CLIP embeddings.

        `clicks` are points in pixels of the input, with the last masks if there are some.
        """
        encoder = self.sam.sam.prompt_encoder
        sparse_PnC = self.token(F.normalize(centred_PD, dim=-1))[:, None]
        dense = encoder.no_mask_embed.weight[:, :, None, None]
        if clicks is not None:
            masks = None if clicks.masks is None else clicks.masks[:, None]
            clicked_PnC, dense = encoder((clicks.points, clicks.point_labels), None, masks)
            sparse_PnC = torch.cat([sparse_PnC, clicked_PnC], 1)
        return self.sam.decode(embedding_PChw, sparse_PnC, dense)

    @torch.no_grad()
    def encode(self, image_3HW: Tensor) -> EncodedTextToMask:
        """Encode an image [3, H, W] uint8 and the windows of it in which names are looked for."""
        side, encoded = self.sam.config.image_size, self.sam.encode(image_3HW)
        fitted = fit_on_device(image_3HW, side)
        height, width = fitted.shape[1:]
        centres_N2, boxes_N4 = place_windows(height, width, side, self.settings.windows)
        centres_N2, boxes_N4 = centres_N2.to(fitted.device), boxes_N4.to(fitted.device)
        if not len(boxes_N4):
            return EncodedTextToMask(encoded, self.image_centre.new_zeros(0, len(self.image_centre)), centres_N2)
        top_1CHW = self.clip(self.clip.normalise(fitted, side)[None])[-1]
        parts = torch.split(F.pad(boxes_N4, (1, 0)), WINDOWS_AT_A_TIME)  # a large head takes megabytes a window
        rows_ND = torch.cat([self.clip.region_embeddings(top_1CHW, part) for part in parts])
        return EncodedTextToMask(encoded, F.normalize(rows_ND - self.image_centre, dim=-1), centres_N2)

    @torch.no_grad()
    def segment_text(
        self, image: Tensor | EncodedTextToMask, text_PD: Tensor, clicks: Prompts | None = None
    ) -> Segments:
        """One mask of an image for each unit row of names, with its IoU.

        Args:
            image: [3, H, W] uint8, or encoded.
            text_PD: the names.
            clicks: points for each of the names, in pixels of the image, with the earlier masks
                (`Segments.low_res`) that they correct.

        Raises:
            InputError: the clicks do not fit the image, or are not as many as the names.
        """
        named = self.encode(image) if isinstance(image, Tensor) else image
        encoded = named.sam
        if clicks is not None:
            if clicks.points is None or len(clicks) != len(text_PD):
                raise InputError(f"clicks: {len(clicks)}, expected points for each of the {len(text_PD)} names")
            clicks = input_prompts(clicks, encoded)
        centred_PD = text_PD - self.text_centre
        clicks = add_name_points(named, centred_PD, clicks)
        height, width = encoded.size
        count, found = prompts_at_a_time(encoded.padded_size, self.sam.config.image_size), []
        every_P = torch.arange(len(text_PD), device=text_PD.device)
        unclicked = [(rows_P, None) for rows_P in torch.split(every_P, count)]
        for rows_P, part in unclicked if clicks is None else clicks.without_padding(count):
            embedding_PChw = encoded.embedding.expand(len(rows_P), -1, -1, -1)
            low_PKLL, ious_PK = self._decode(embedding_PChw, centred_PD[rows_P], part)
            masks = self.sam.sam.postprocess_masks(low_PKLL[:, :1], encoded.input_size, encoded.padded_size) > 0
            found.append((rows_P, masks[:, 0, :height, :width], ious_PK[:, 0], low_PKLL[:, 0]))
        return unnamed(*in_order(found))


def central_points(boxes_P4: Tensor, generator: torch.Generator | None) -> Tensor:
    """[P, 2] points drawn in the central part of boxes."""
    draws_P2 = torch.rand((len(boxes_P4), 2), generator=generator).to(boxes_P4.device, non_blocking=True)
    share_P2 = 0.5 + CENTRAL * (draws_P2 - 0.5)
    return boxes_P4[:, :2] + share_P2 * (boxes_P4[:, 2:] - boxes_P4[:, :2])


def place_windows(height: int, width: int, side: int, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Centres [N, 2] and boxes [N, 4] of square windows all over an image, cut off at its edges.

    Args:
        height: of the image in pixels of the model's input.
        width: the same.
        side: S.
        shares: sides of the windows relative to S.
    """
    step = side / WINDOW_STEPS
    ys, xs = (torch.arange(min(step, length) / 2, max(length, 1), step) for length in (height, width))
    centres_M2 = torch.cartesian_prod(ys, xs).flip(1)
    limits = torch.tensor([width, height, width, height])
    boxes = [torch.cat([centres_M2 - share * side / 2, centres_M2 + share * side / 2], 1) for share in shares]
    boxes_N4 = torch.cat([torch.zeros(0, 4), *boxes]).clamp(min=torch.zeros(4), max=limits.float())
    return centres_M2.repeat(len(shares), 1), boxes_N4


def add_name_points(image: EncodedTextToMask, centred_PD: Tensor, clicks: Prompts | None) -> Prompts | None:
    """Clicks in pixels of the model's input, after the point of each name; None if there is neither."""
    if not len(image.windows) or not len(centred_PD):
        return clicks
    points_P12 = image.centres[(centred_PD @ image.windows.T).argmax(1)][:, None]
    labels_P1 = torch.full(points_P12.shape[:2], ON, device=points_P12.device)
    if clicks is None or clicks.points is None or clicks.point_labels is None:
        return Prompts(points_P12, labels_P1)
    points, labels = torch.cat([points_P12, clicks.points], 1), torch.cat([labels_P1, clicks.point_labels], 1)
    return replace(clicks, points=points, point_labels=labels)

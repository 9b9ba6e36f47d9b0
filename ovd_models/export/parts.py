"""The parts of a checkpoint that are exported, with examples of several sizes and what they must equal."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.clip.model import Clip, ClipTextEncoder
from ovd_models.codet.model import CoDet
from ovd_models.detectors.centernet2 import CenterNet2
from ovd_models.detectors.encoded import EncodedRegions
from ovd_models.export.centernet2 import ExportedCenterNet2
from ovd_models.export.detector import ExportedDetector
from ovd_models.export.files import Part
from ovd_models.export.ovsam import ExportedNamer, ExportedOvSamEncoder
from ovd_models.export.towers import (
    CORNERS,
    ExportedImageTower,
    ExportedSamDecoder,
    ExportedSamEncoder,
    ExportedTextTower,
)
from ovd_models.ovsam.head import fuse_scores
from ovd_models.ovsam.model import EncodedOvSam, OvSam, enlarge
from ovd_models.sam.model import EncodedImage, SamModel
from ovd_models.segments import Prompts
from ovd_models.vild.model import ViLD
from ovd_models.vocabulary import Vocabulary

MOST_DETECTIONS = 100
"""Detections of an image, as the library's default."""
SIZES = ((128, 128), (97, 200), (222, 301))
"""Heights and widths of the images that are compared."""


PROMPTS = ("embedding", "points", "labels", "input_size", "size")
PROMPT_SIZES = {
    "points": {0: "prompts", 1: "points"},
    "labels": {0: "prompts", 1: "points"},
    "masks": {0: "prompts", 2: "height", 3: "width"},
    "ious": {0: "prompts"},
}


def example_images(sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Smooth random images [H, W, 3] uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = [torch.rand(1, 3, 6, 8, generator=generator) * 255 for _ in sizes]
    images = [F.interpolate(entry, size, mode="bicubic") for entry, size in zip(coarse, sizes, strict=True)]
    return [image[0].clamp(0, 255).permute(1, 2, 0).to(torch.uint8) for image in images]


def detector_part(model: CoDet | ViLD, images: Sequence[Tensor], text_KD: Tensor, threshold: float) -> Part:
    """A box detector.

    Args:
        model: of an architecture that is exported.
        images: examples [H, W, 3] uint8.
        text_KD: [K, D] unit rows; the examples use all of them and half of them.
        threshold: of the examples' scores.

    Raises:
        InputError: see `ExportedDetector`.
    """
    exported = export_detector(model)
    with_weights = isinstance(exported, ExportedDetector) and exported.has_image_head
    inputs = ["image", "text", "threshold"]
    examples: list[tuple[Tensor, ...]] = []
    for index, image in enumerate(images):
        rows = text_KD if index % 2 == 0 else text_KD[: max(1, len(text_KD) // 2)]
        example: tuple[Tensor, ...] = (image, rows, torch.tensor(threshold))
        if with_weights:
            assert isinstance(model, ViLD)
            weights = torch.tensor([model.config.scoring.novel_image, model.config.scoring.base_image])
            example += (weights[torch.arange(len(rows)) % 2],)
        examples.append(example)
    dynamic = {"image": {0: "height", 1: "width"}, "text": {0: "names"}}
    if with_weights:
        inputs.append("image_weight")
        dynamic["image_weight"] = {0: "names"}
    outputs = ("boxes", "scores", "labels", *(["masks"] if exported.has_masks else []))
    return Part(
        "detector",
        exported,
        tuple(inputs),
        outputs,
        dynamic | {name: {0: "detections"} for name in outputs},
        examples,
        partial(detect, model),
        program=False,
    )


def export_detector(model: CoDet | ViLD) -> ExportedDetector | ExportedCenterNet2:
    """The traceable form of a detector.

    Raises:
        InputError: it has none.
    """
    if isinstance(model.detector, CenterNet2):
        return ExportedCenterNet2(model.detector, MOST_DETECTIONS)
    return ExportedDetector(model, MOST_DETECTIONS)


@torch.no_grad()
def detect(
    model: CoDet | ViLD, image: Tensor, text: Tensor, threshold: Tensor, image_weight: Tensor | None = None
) -> tuple[Tensor, ...]:
    """What the exported detector computes, by the model's own inference."""
    base = None
    if image_weight is not None:
        assert isinstance(model, ViLD)
        base = torch.isclose(image_weight, torch.tensor(model.config.scoring.base_image))
    vocabulary = Vocabulary(tuple(map(str, range(len(text)))), text, base)
    (encoded,) = model.encode([image.permute(2, 0, 1)])
    detector = model.detector
    mask_logits: Callable[..., Tensor] | None
    if isinstance(detector, CenterNet2):
        assert isinstance(encoded, EncodedRegions)
        found, boxes = detector.find_boxes(encoded, vocabulary, float(threshold), MOST_DETECTIONS)
        mask_logits = detector.mask_logits if detector.config.mask_convs else None
    else:
        found = model.find(encoded, vocabulary, score_threshold=float(threshold), max_detections=MOST_DETECTIONS)  # type: ignore[arg-type]
        boxes = encoded.sizes.resized_boxes([found.boxes])[0]
        mask_logits = detector.mask_head if found.masks is not None else None
    if mask_logits is None:
        return found.boxes, found.scores, found.labels
    features = {str(index): level for index, level in enumerate(encoded.levels)}
    return found.boxes, found.scores, found.labels, mask_logits(features, [boxes]).sigmoid()


def image_tower_part(model: Clip) -> Part:
    """CLIP's image tower, for batches of any size."""
    side = model.config.image_size
    images = example_images([(side, side)] * 3)
    examples = [(torch.stack(images[:count]),) for count in (2, 1, 3)]
    return Part(
        "image_tower",
        ExportedImageTower(model),
        ("images",),
        ("embeddings",),
        {"images": {0: "batch"}, "embeddings": {0: "batch"}},
        examples,
        lambda images: (model.encode_images(images.permute(0, 3, 1, 2)),),
    )


def text_tower_part(encoder: ClipTextEncoder) -> Part:
    """CLIP's text tower, for batches of any size."""
    tokens = [encoder.tokenizer(["an anchor", "a photo of a red umbrella", "x"][:count]) for count in (2, 1, 3)]
    return Part(
        "text_tower",
        ExportedTextTower(encoder.tower),
        ("tokens",),
        ("embeddings",),
        {"tokens": {0: "batch"}, "embeddings": {0: "batch"}},
        [(entry,) for entry in tokens],
        lambda tokens: (encoder.embed_tokens(tokens),),
    )


def sam_parts(model: SamModel) -> list[Part]:
    """SAM's image encoder, and its prompt encoder and mask decoder."""
    side = model.config.image_size
    images = example_images([(side, side), (side, side * 5 // 8), (side * 2 // 3, side)])
    encoder = Part(
        "sam_encoder",
        ExportedSamEncoder(model),
        ("image",),
        ("embedding",),
        {"image": {0: "height", 1: "width"}},
        [(image,) for image in images],
        lambda image: (model.encode(image.permute(2, 0, 1)).embedding,),
    )
    examples = prompt_examples(images, [model.encode(image.permute(2, 0, 1)).embedding for image in images])
    decoder = Part(
        "sam_decoder",
        ExportedSamDecoder(model),
        PROMPTS,
        ("masks", "ious"),
        PROMPT_SIZES,
        examples,
        partial(decode, model),
    )
    return [encoder, decoder]


def decode(
    model: SamModel, embedding: Tensor, points: Tensor, labels: Tensor, input_size: Tensor, size: Tensor
) -> tuple[Tensor, Tensor]:
    """What the exported decoder computes, by the package's own predictor: logits of all masks, and their IoUs."""
    (height, width), (rows, columns) = input_size.tolist(), size.tolist()
    predictor = model.predictor(EncodedImage(embedding, (height, width), (rows, columns), (rows, columns)))
    boxed = bool((labels == CORNERS[0]).any())
    prompts = Prompts(boxes=points.flatten(1)) if boxed else Prompts(points=points[:, :1], point_labels=labels[:, :1])
    arguments = (prompts.points, prompts.point_labels, prompts.boxes, None)
    three = predictor.predict_torch(*arguments, multimask_output=True, return_logits=True)
    one = predictor.predict_torch(*arguments, multimask_output=False, return_logits=True)
    return torch.cat((one[0], three[0]), 1), torch.cat((one[1], three[1]), 1)


def prompt_examples(images: Sequence[Tensor], embeddings: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Two examples of a decoder for each encoded image, boxes and clicks; the original is half as large again."""
    examples: list[tuple[Tensor, ...]] = []
    for image, embedding, count in zip(images, embeddings, (2, 1, 3), strict=True):
        size = torch.tensor(image.shape[:2])
        points = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(count)) * size.flip(0)
        boxes = torch.cat((points.amin(1, keepdim=True), points.amax(1, keepdim=True) + 1), 1)
        clicks = torch.stack((points[:, 0], torch.zeros(count, 2)), 1)
        for place, labels in ((boxes, CORNERS), (clicks, (1, -1))):
            examples.append((embedding, place, torch.tensor([labels] * count), size, size * 3 // 2))
    return examples


# ------------------------------------------------------------------------------------------------------------ OV-SAM


@torch.no_grad()
def ovsam_parts(model: OvSam, text_KD: Tensor, is_base_K: Tensor) -> list[Part]:
    """OV-SAM's encoder, its prompt encoder and mask decoder, and its naming of masks.

    Args:
        model: of any CLIP.
        text_KD: [K, D] unit rows; the examples use all of them and half of them.
        is_base_K: [K] bool, the names with masks in training.
    """
    side, cuts_out = model.config.sam.image_size, model.config.clip_view == "cut_out"
    levels = tuple(f"level_{index}" for index in range(len(model.namer.strides)))
    images = example_images([(side, side), (side, side * 5 // 8), (side * 2 // 3, side)])
    encode = partial(encode_ovsam, model)
    encoder = Part(
        "ovsam_encoder",
        ExportedOvSamEncoder(model),
        ("image",),
        ("embedding", *levels, "top"),
        {"image": {0: "height", 1: "width"}},
        [(image,) for image in images],
        encode,
    )
    encoded = [encode(image) for image in images]
    prompts = prompt_examples(images, [each[0] for each in encoded])
    decoder = Part(
        "ovsam_decoder",
        ExportedSamDecoder(model),
        PROMPTS,
        ("masks", "boxes", *(["ious"] if model.config.iou_head else [])),
        PROMPT_SIZES | {"boxes": {0: "prompts"}},
        prompts,
        partial(decode_ovsam, model),
        program=model.config.iou_head,  # without one, the program keeps the traced number of prompts
    )
    originals = example_images([tuple(prompt[-1].tolist()) for prompt in prompts[::2]])
    examples: list[tuple[Tensor, ...]] = []
    for index, (_, *pyramid, top) in enumerate(encoded):
        masks, boxes = decode_ovsam(model, *prompts[2 * index])[:2]
        count = len(text_KD) if index % 2 == 0 else max(1, len(text_KD) // 2)
        weights = name_weights(model, is_base_K[:count])
        examples.append((*pyramid, originals[index] if cuts_out else top, masks, boxes, text_KD[:count], *weights))
    namer = Part(
        "ovsam_namer",
        ExportedNamer(model),
        (*levels, "image" if cuts_out else "top", "masks", "boxes", "text", "clip_weight", "bias"),
        ("scores",),
        {
            **({"image": {0: "height", 1: "width"}} if cuts_out else {}),
            "masks": {0: "prompts", 2: "height", 3: "width"},
            "boxes": {0: "prompts"},
            **{name: {0: "names"} for name in ("text", "clip_weight", "bias")},
            "scores": {0: "prompts", 1: "names"},
        },
        examples,
        partial(name_masks, model, is_base_K),
    )
    return [encoder, decoder, namer]


def name_weights(model: OvSam, is_base_K: Tensor) -> tuple[Tensor, Tensor]:
    """[K] CLIP's exponents and [K] additions to the log scores of names."""
    config = model.config
    return torch.where(is_base_K, config.alpha, config.beta), config.novel_bias * ~is_base_K


@torch.no_grad()
def encode_ovsam(model: OvSam, image: Tensor) -> tuple[Tensor, ...]:
    """What the exported encoder computes, by the model's own inference."""
    encoded = model.encode(image.permute(2, 0, 1))
    return encoded.sam.embedding, *encoded.pyramid, encoded.top


@torch.no_grad()
def decode_ovsam(
    model: OvSam, embedding: Tensor, points: Tensor, labels: Tensor, input_size: Tensor, size: Tensor
) -> tuple[Tensor, ...]:
    """What the exported decoder computes, by the model's own inference."""
    (height, width), (rows, columns) = input_size.tolist(), size.tolist()
    boxed = bool((labels == CORNERS[0]).any())
    clicks = None if boxed else (points[:, :1], labels[:, :1])
    sparse, dense = model.prompt_encoder(clicks, points.flatten(1) if boxed else None, None)
    low_PLL, iou_P = model.decode(embedding.expand(len(sparse), -1, -1, -1), sparse, dense)
    encoded = EncodedImage(embedding, (height, width), (rows, columns), (rows, columns))
    full_PHW = enlarge(low_PLL, encoded, model.config.sam.image_size)
    return full_PHW[:, None], model.rois_of(low_PLL, None), *([iou_P[:, None]] if model.config.iou_head else [])


@torch.no_grad()
def name_masks(model: OvSam, is_base_K: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What the exported naming computes, by the model's own inference."""
    *levels, seen, masks, boxes, text_KD, _, _ = inputs
    cuts_out = model.config.clip_view == "cut_out"
    image = seen.permute(2, 0, 1) if cuts_out else torch.empty(0)
    encoded = EncodedOvSam(EncodedImage(levels[0], (0, 0), (0, 0), (0, 0)), tuple(levels), seen, image)
    rois_P5, inside_PHW = F.pad(boxes, (1, 0)), masks[:, 0] > 0
    head_PK = model.head_logits(levels, rois_P5, text_KD[:, None])
    clip_PK = model.clip_logits(encoded, rois_P5, inside_PHW, text_KD[:, None])
    config, base_K = model.config, is_base_K[: len(text_KD)]
    fused_PK = fuse_scores(
        head_PK, clip_PK, base_K, inside_PHW.flatten(1).any(1),
        alpha=config.alpha, beta=config.beta, novel_bias=config.novel_bias,
    )  # fmt: skip
    return (fused_PK.softmax(-1)[:, : len(text_KD)],)

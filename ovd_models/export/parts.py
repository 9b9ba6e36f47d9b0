"""The parts of a checkpoint that are exported, with examples of several sizes and what they must equal."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.clip.model import Clip, ClipTextEncoder
from ovd_models.codet.model import CoDet
from ovd_models.export.detector import ExportedDetector
from ovd_models.export.files import Part
from ovd_models.export.towers import (
    CORNERS,
    ExportedImageTower,
    ExportedSamDecoder,
    ExportedSamEncoder,
    ExportedTextTower,
)
from ovd_models.sam.model import EncodedImage, SamModel
from ovd_models.segments import Prompts
from ovd_models.vild.model import ViLD
from ovd_models.vocabulary import Vocabulary

SIZES = ((128, 128), (97, 200), (222, 301))
"""Heights and widths of the images that are compared."""


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
    exported = ExportedDetector(model)
    inputs = ["image", "text", "threshold"]
    examples: list[tuple[Tensor, ...]] = []
    for index, image in enumerate(images):
        rows = text_KD if index % 2 == 0 else text_KD[: max(1, len(text_KD) // 2)]
        example: tuple[Tensor, ...] = (image, rows, torch.tensor(threshold))
        if exported.has_image_head:
            assert isinstance(model, ViLD)
            weights = torch.tensor([model.config.scoring.novel_image, model.config.scoring.base_image])
            example += (weights[torch.arange(len(rows)) % 2],)
        examples.append(example)
    dynamic = {"image": {0: "height", 1: "width"}, "text": {0: "names"}}
    if exported.has_image_head:
        inputs.append("image_weight")
        dynamic["image_weight"] = {0: "names"}
    outputs = ("boxes", "scores", "labels")
    return Part(
        "detector",
        exported,
        tuple(inputs),
        outputs,
        dynamic | {name: {0: "detections"} for name in outputs},
        examples,
        partial(detect, model),
    )


def detect(
    model: CoDet | ViLD, image: Tensor, text: Tensor, threshold: Tensor, image_weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the exported detector computes, by the model's own inference."""
    base = None
    if image_weight is not None:
        assert isinstance(model, ViLD)
        base = torch.isclose(image_weight, torch.tensor(model.config.scoring.base_image))
    vocabulary = Vocabulary(tuple(map(str, range(len(text)))), text, base)
    (found,) = model.detect([image.permute(2, 0, 1)], vocabulary, score_threshold=float(threshold))
    return found.boxes, found.scores, found.labels


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
    examples = []
    for image, count in zip(images, (2, 1, 3), strict=True):
        size = torch.tensor(image.shape[:2])
        points = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(count)) * size.flip(0)
        boxes = torch.cat((points.amin(1, keepdim=True), points.amax(1, keepdim=True) + 1), 1)
        clicks = torch.stack((points[:, 0], torch.zeros(count, 2)), 1)
        embedding = model.encode(image.permute(2, 0, 1)).embedding
        for place, labels in ((boxes, CORNERS), (clicks, (1, -1))):
            label = torch.tensor([labels] * count)
            examples.append((embedding, place, label, size, size * 3 // 2))
    decoder = Part(
        "sam_decoder",
        ExportedSamDecoder(model),
        ("embedding", "points", "labels", "input_size", "size"),
        ("masks", "ious"),
        {
            "points": {0: "prompts", 1: "points"},
            "labels": {0: "prompts", 1: "points"},
            "masks": {0: "prompts", 2: "height", 3: "width"},
            "ious": {0: "prompts"},
        },
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

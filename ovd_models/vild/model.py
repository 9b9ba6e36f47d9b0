"""ViLD: distil an image-text teacher into a two-stage detector (ICLR 2022, arXiv 2104.13921).

B images, R sampled regions, M stored regions of an image, N proposals of an image, K names, D embedding width,
F width of the box head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes

from ovd_models.batches import DetectionBatch, Detections
from ovd_models.detectors.heads import build_box_head, mask_loss
from ovd_models.detectors.masks import encode_masks
from ovd_models.detectors.questions import RegionQuery
from ovd_models.detectors.rcnn import RCNN, Proposals, RCNNConfig, RegionSample, restore_boxes, widen
from ovd_models.detectors.region_scores import RegionRecord, Scoring, find
from ovd_models.errors import InputError
from ovd_models.losses import cosine_logits, distillation_loss, softmax_loss
from ovd_models.vocabulary import Vocabulary

VARIANTS = ("supervised", "text", "image", "vild", "ensemble")
BACKGROUND_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class ViLDConfig:
    """The detector, and what its heads learn from."""

    detector: RCNNConfig = field(default_factory=RCNNConfig)
    variant: str = "ensemble"
    """`supervised` (a learned classifier of its own), `text` (names), `image` (stored embeddings), `vild` (both, one
    head) or `ensemble` (both, two heads)."""
    image_weight: float = 0.5
    """w: weight of the distillation loss."""
    supervised_names: tuple[str, ...] = ()
    """Names of the `supervised` classifier: those that carry boxes in training."""
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        """Check the variant."""
        if self.variant not in VARIANTS:
            raise InputError(f"variant: {self.variant!r}, expected one of {', '.join(VARIANTS)}")

    @property
    def names_classes(self) -> bool:
        """Whether a head learns from annotated boxes."""
        return self.variant != "image"

    @property
    def distils(self) -> bool:
        """Whether a head learns from stored embeddings."""
        return self.variant in ("image", "vild", "ensemble")


class ViLD(nn.Module):
    """A detector that learns names from boxes of base categories, and other things from a teacher's embeddings."""

    def __init__(self, config: ViLDConfig) -> None:
        super().__init__()
        self.config = config
        c = config.detector
        self.detector = RCNN(c)
        if config.names_classes:
            self.background = nn.Parameter(torch.randn(c.embed_dim) * BACKGROUND_STD)
        if config.variant == "supervised":
            if not config.supervised_names:
                raise InputError("supervised_names: empty, expected the names that carry boxes in training")
            self.classes = nn.Parameter(torch.randn(len(config.supervised_names), c.embed_dim) * BACKGROUND_STD)
        if config.variant == "ensemble":
            self.image_head = build_box_head(c.pyramid_channels, c.head_width, c.head_convs)
            self.image_projection = nn.Linear(c.head_width, c.embed_dim)

    def forward(self, batch: DetectionBatch, text_KD: Tensor, trained_K: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted losses of one step.

        Args:
            batch: images with boxes, and with stored regions where the variant distils.
            text_KD: [K, D] unit rows that `batch.labels` count; the `supervised` variant has its own.
            trained_K: [K] bool, the names that carry boxes; others carry no probability.
        """
        detector, config = self.detector, self.config
        images, targets = detector.resized(batch)
        features = detector.features(images)
        proposals = detector.propose(images, features)
        losses = detector.proposal_losses(proposals, targets)
        sample = detector.sample_regions(proposals.boxes, targets)
        stored = self._stored_boxes(batch, images)
        if config.variant == "ensemble" or not config.distils:
            region_RF = detector.region_features(features, sample.boxes, images)
        else:  # one head sees both kinds of region, and its batch norm too
            both = [torch.cat(pair) for pair in zip(sample.boxes, stored, strict=True)]
            counts = [len(entry) for pair in zip(sample.boxes, stored, strict=True) for entry in pair]
            split = torch.split(detector.region_features(features, both, images), counts)
            region_RF, student_MD = torch.cat(split[::2]), detector.projection(torch.cat(split[1::2]))
        losses["box"] = detector.box_loss(region_RF, sample)
        if config.names_classes:
            losses["classes"] = self._class_loss(region_RF, sample.labels, text_KD, trained_K)
        if config.variant == "ensemble":
            student_MD = self._image_embeddings(features, stored, images)
        if config.distils and batch.regions is not None:
            rows, valid = batch.regions.embeddings.flatten(0, 1), batch.regions.valid.flatten()
            losses["image"] = config.image_weight * distillation_loss(student_MD, rows, valid)
        if config.detector.masks:
            losses["mask"] = self._mask_loss(batch, images, features, sample)
        return losses

    def _stored_boxes(self, batch: DetectionBatch, images: ImageList) -> list[Tensor]:
        """The stored regions of each image in resized pixels; regions that are not valid are the whole image."""
        if not self.config.distils:
            return []
        if batch.regions is None:
            raise InputError(f"batch: no stored regions, expected some for the variant {self.config.variant!r}")
        found = []
        regions, size_of = batch.regions, images.image_sizes
        for image, box, valid, size in zip(batch.images, regions.boxes, regions.valid, size_of, strict=True):
            wide = widen(image, self.detector.config.max_size)
            whole = box.new_tensor([0, 0, size[1], size[0]])
            found.append(torch.where(valid[:, None], resize_boxes(box, list(wide.shape[-2:]), list(size)), whole))
        return found

    def _class_loss(self, region_RF: Tensor, labels_R: Tensor, text_KD: Tensor, trained_K: Tensor | None) -> Tensor:
        region_RD, temperature = self.detector.projection(region_RF), self.detector.config.temperature
        if self.config.variant == "supervised":
            text_KD, trained_K = F.normalize(self.classes, dim=1), None
        logits_RK = cosine_logits(region_RD, text_KD, temperature)
        return softmax_loss(logits_RK, self._background_logits(region_RD, temperature), labels_R, trained_K)

    def _background_logits(self, region_RD: Tensor, temperature: float) -> Tensor:
        return cosine_logits(region_RD, F.normalize(self.background, dim=0)[None], temperature)[:, 0]

    def _image_embeddings(self, features: dict[str, Tensor], boxes: list[Tensor], images: ImageList) -> Tensor:
        """[sum of N, D] of the ensemble's second head."""
        pooled = self.detector.roi.box_roi_pool(features, boxes, images.image_sizes)
        rows: Tensor = self.image_projection(self.image_head(pooled))
        return rows

    def _mask_loss(
        self, batch: DetectionBatch, images: ImageList, features: dict[str, Tensor], sample: RegionSample
    ) -> Tensor:
        if batch.masks is None:
            raise InputError("batch: no masks, expected some for a detector that predicts them")
        counts = [len(entry) for entry in sample.boxes]
        objects = [labels >= 0 for labels in torch.split(sample.labels, counts)]
        boxes = [box[keep] for box, keep in zip(sample.boxes, objects, strict=True)]
        matched = [rows[keep] for rows, keep in zip(sample.matched, objects, strict=True)]
        logits_RSS = self.detector.mask_head(features, boxes, images.image_sizes)
        # Annotated masks stay as they are: the regions are moved to their pixels instead.
        own = [
            resize_boxes(box, list(size), list(widen(image, self.detector.config.max_size).shape[-2:]))
            for box, size, image in zip(boxes, images.image_sizes, batch.images, strict=True)
        ]
        return mask_loss(logits_RSS, own, matched, batch.masks)

    # ------------------------------------------------------------------------------------------------ inference

    @torch.no_grad()
    def record(self, images: Sequence[Tensor]) -> list[RegionRecord]:
        """What the heads say about uint8 images [3, H, W], from which any question is answered without another pass."""
        return self._look(images)[0]

    def _look(self, images: Sequence[Tensor]) -> tuple[list[RegionRecord], ImageList, dict[str, Tensor]]:
        detector, config = self.detector, self.config
        padded = [widen(image, detector.config.max_size) for image in images]
        batch = detector.preprocess(padded)
        features = detector.features(batch)
        proposals: Proposals = detector.propose(batch, features)
        region_RF = detector.region_features(features, proposals.boxes, batch)
        first_RD = F.normalize(detector.projection(region_RF).float(), dim=1)
        text_RD = first_RD if config.names_classes else None
        image_RD = first_RD if config.variant == "image" else None
        if config.variant == "ensemble":
            image_RD = F.normalize(self._image_embeddings(features, proposals.boxes, batch).float(), dim=1)
        background_R = self._background_logits(first_RD, 1.0) if config.names_classes else None
        counts = [len(entry) for entry in proposals.boxes]

        def of_images(values: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * len(counts) if values is None else torch.split(values, counts)

        records = []
        for image, wide, size, box, objectness, text, background, own in zip(
            images,
            padded,
            batch.image_sizes,
            detector.refine(region_RF, proposals.boxes),
            proposals.scores,
            of_images(text_RD),
            of_images(background_R),
            of_images(image_RD),
            strict=True,
        ):
            height, width = (int(side) for side in image.shape[-2:])
            boxes = restore_boxes(box, image, wide, size)
            records.append(RegionRecord(boxes, objectness, text, background, own, width, height))
        return records, batch, features

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        vocabulary: Vocabulary | RegionQuery,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
        scoring: Scoring | None = None,
    ) -> list[Detections]:
        """Find the vocabulary's names, or answer a question, in uint8 images [3, H, W]; one `Detections` an image."""
        query = vocabulary if isinstance(vocabulary, RegionQuery) else RegionQuery(vocabulary)
        records, batch, features = self._look(images)
        found = self.find(
            records, query, score_threshold=score_threshold, max_detections=max_detections, scoring=scoring
        )
        if self.config.detector.masks:
            found = self._with_masks(images, found, batch, features)
        return found

    def find(
        self,
        records: Sequence[RegionRecord],
        query: RegionQuery,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
        scoring: Scoring | None = None,
    ) -> list[Detections]:
        """Answer a question about recorded images.

        Raises:
            InputError: a `supervised` model is asked for attributes or children.
        """
        closed, known = self._closed(query.names)
        if known is not None and (query.attributes is not None or query.children is not None):
            raise InputError("question: a supervised model knows its names alone, expected no attributes or children")
        found = []
        for record in records:
            entry = find(
                record,
                replace(query, names=closed),
                scoring or self.config.scoring,
                nms=self.config.detector.box_nms,
                score_threshold=score_threshold,
                max_detections=max_detections,
            )
            found.append(
                entry if known is None else replace(entry, labels=known[entry.labels], names=query.names.names)
            )
        return found

    def _closed(self, vocabulary: Vocabulary) -> tuple[Vocabulary, Tensor | None]:
        """The names that a `supervised` model has classes for, and their rows in the vocabulary."""
        if self.config.variant != "supervised":
            return vocabulary, None
        row_of = {name: row for row, name in enumerate(self.config.supervised_names)}
        known = [row for row, name in enumerate(vocabulary.names) if name in row_of]
        names = tuple(vocabulary.names[row] for row in known)
        rows = F.normalize(self.classes, dim=1)[[row_of[name] for name in names]]
        return Vocabulary(names, rows), torch.tensor(known, dtype=torch.int64, device=rows.device)

    def _with_masks(
        self, images: Sequence[Tensor], found: list[Detections], batch: ImageList, features: dict[str, Tensor]
    ) -> list[Detections]:
        """Masks pooled from the final boxes, as COCO RLE."""
        boxes = []
        for image, entry, size in zip(images, found, batch.image_sizes, strict=True):
            wide = widen(image, self.detector.config.max_size)
            boxes.append(resize_boxes(entry.boxes, list(wide.shape[-2:]), list(size)))
        logits = torch.split(
            self.detector.mask_head(features, boxes, batch.image_sizes), [len(entry) for entry in boxes]
        )
        return [
            replace(entry, masks=encode_masks(rows.sigmoid(), entry.boxes, entry.height, entry.width))
            for entry, rows in zip(found, logits, strict=True)
        ]

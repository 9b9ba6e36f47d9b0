"""ViLD: distil an image-text teacher into a two-stage detector (ICLR 2022, arXiv 2104.13921).

B images, R sampled regions, M stored regions of an image, N proposals of an image, K names, D embedding width,
F width of the box head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.batches import DetectionBatch, Detections, TensorRecord
from ovd_models.detectors.masks import mask_loss, with_masks
from ovd_models.detectors.rcnn import RCNN, RCNNConfig, RegionSample, build_box_head, sample_regions
from ovd_models.detectors.region_query import RegionQuery
from ovd_models.detectors.region_scores import RegionRecord, Scoring, detect_in_record
from ovd_models.detectors.resizing import ResizedImages, Selection, Size, annotated_targets
from ovd_models.errors import InputError
from ovd_models.losses import Distance, cosine_logits, distillation_loss, softmax_loss
from ovd_models.vocabulary import Vocabulary

Variant = Literal["supervised", "text", "image", "vild", "ensemble"]
BACKGROUND_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class ViLDConfig:
    """The detector and the supervision of its heads."""

    detector: RCNNConfig = field(default_factory=RCNNConfig)
    variant: Variant = "ensemble"
    """`supervised` (a learned classifier), `text` (names), `image` (stored embeddings), `vild` (both, one
    head) or `ensemble` (both, two heads)."""
    image_weight: float = 0.5
    """w: weight of the distillation loss."""
    distance: Distance = "l1"
    """Of the student's embeddings from the stored ones, see `distillation_loss`."""
    supervised_names: tuple[str, ...] = ()
    """Names of the `supervised` classifier: those with boxes in training."""
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        """Check the variant and the distance."""
        for name, value, known in (("variant", self.variant, Variant), ("distance", self.distance, Distance)):
            if value not in get_args(known):
                raise InputError(f"{name}: {value!r}, expected one of {', '.join(get_args(known))}")

    @property
    def names_classes(self) -> bool:
        """Whether a head learns from annotated boxes."""
        return self.variant != "image"

    @property
    def distils(self) -> bool:
        """Whether a head learns from stored embeddings."""
        return self.variant in ("image", "vild", "ensemble")


@dataclass(frozen=True)
class EncodedViLD(TensorRecord):
    """An encoded image, to be searched for any number of vocabularies."""

    record: RegionRecord
    levels: tuple[Tensor, ...]
    """Pyramid levels [1, F, H, W] from which masks are pooled; empty if the detector predicts none."""
    resized_size: Size
    wide_size: Size

    @property
    def sizes(self) -> ResizedImages:
        """The image's sizes, without its pixels."""
        no_pixels = self.record.boxes.new_zeros((1, 3, 0, 0))
        original = (self.record.height, self.record.width)
        return ResizedImages(no_pixels, [self.resized_size], [self.wide_size], [original])


class ViLD(nn.Module):
    """A detector trained with boxes of base categories and with a teacher's embeddings of other regions."""

    def __init__(self, config: ViLDConfig) -> None:
        super().__init__()
        self.config = config
        c = config.detector
        self.detector = RCNN(c)
        if config.names_classes:
            self.background = nn.Parameter(torch.randn(c.embed_dim) * BACKGROUND_STD)
        if config.variant == "supervised":
            if not config.supervised_names:
                raise InputError("supervised_names: empty, expected the names with boxes in training")
            self.classes = nn.Parameter(torch.randn(len(config.supervised_names), c.embed_dim) * BACKGROUND_STD)
        if config.variant == "ensemble":
            self.image_head = build_box_head(c.pyramid_channels, c.head_width, c.head_convs)
            self.image_projection = nn.Linear(c.head_width, c.embed_dim)

    def forward(self, batch: DetectionBatch, text_KD: Tensor, trained_K: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted losses of one step.

        Args:
            batch: images with boxes, and with stored regions if the variant distils.
            text_KD: [K, D] unit rows that `batch.labels` index; not used by the `supervised` variant.
            trained_K: [K] bool, the names with boxes; others get no probability.
        """
        detector, config = self.detector, self.config
        images = detector.preprocess(batch.images)
        targets = annotated_targets(batch, images)
        features = detector.features(images)
        proposals = detector.propose(images, features)
        losses = detector.proposal_losses(proposals, targets)
        sample = sample_regions(detector.roi, proposals.boxes, targets)
        stored = self._stored_boxes(batch, images)
        if config.variant == "ensemble" or not config.distils:
            region_RF = detector.region_features(features, sample.boxes)
        else:  # one head, and its batch norm, processes both kinds of region
            both = [torch.cat(pair) for pair in zip(sample.boxes, stored, strict=True)]
            counts = [len(entry) for pair in zip(sample.boxes, stored, strict=True) for entry in pair]
            split = torch.split(detector.region_features(features, both), counts)
            region_RF, student_MD = torch.cat(split[::2]), detector.projection(torch.cat(split[1::2]))
        losses["box"] = detector.box_loss(region_RF, sample)
        if config.names_classes:
            losses["classes"] = self._class_loss(region_RF, sample.labels, text_KD, trained_K)
        if config.variant == "ensemble":
            student_MD = self._image_embeddings(features, stored)
        if config.distils and batch.regions is not None:
            rows, valid = batch.regions.embeddings.flatten(0, 1), batch.regions.valid.flatten()
            losses["image"] = config.image_weight * distillation_loss(student_MD, rows, valid, config.distance)
        if config.detector.masks:
            losses["mask"] = self._mask_loss(batch, images, features, sample)
        return losses

    def _stored_boxes(self, batch: DetectionBatch, images: ResizedImages) -> list[Tensor]:
        """The stored regions of each image in resized pixels; regions that are not valid become the whole image."""
        if not self.config.distils:
            return []
        if batch.regions is None:
            raise InputError(f"batch: no stored regions, expected some for the variant {self.config.variant!r}")
        regions = batch.regions
        return [
            torch.where(valid[:, None], box, box.new_tensor([0, 0, width, height]))
            for box, valid, (height, width) in zip(
                images.resized_boxes(regions.boxes.unbind()), regions.valid, images.image_sizes, strict=True
            )
        ]

    def _class_loss(self, region_RF: Tensor, labels_R: Tensor, text_KD: Tensor, trained_K: Tensor | None) -> Tensor:
        region_RD, temperature = self.detector.projection(region_RF), self.detector.config.temperature
        if self.config.variant == "supervised":
            text_KD, trained_K = F.normalize(self.classes, dim=1), None
        logits_RK = cosine_logits(region_RD, text_KD, temperature)
        return softmax_loss(logits_RK, self._background_logits(region_RD, temperature), labels_R, trained_K)

    def _background_logits(self, region_RD: Tensor, temperature: float) -> Tensor:
        return cosine_logits(region_RD, F.normalize(self.background, dim=0)[None], temperature)[:, 0]

    def _image_embeddings(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """[sum of N, D] of the ensemble's second head."""
        rows: Tensor = self.image_projection(self.image_head(self.detector.roi.box_roi_pool(features, boxes)))
        return rows

    def _mask_loss(
        self, batch: DetectionBatch, images: ResizedImages, features: dict[str, Tensor], sample: RegionSample
    ) -> Tensor:
        if batch.masks is None:
            raise InputError("batch: no masks, expected some for a detector that predicts them")
        boxes = [box[:count] for box, count in zip(sample.boxes, sample.objects, strict=True)]
        matched = [rows[:count] for rows, count in zip(sample.matched, sample.objects, strict=True)]
        logits_RSS = self.detector.mask_head(features, boxes)
        # The regions are moved to the pixels of the annotated masks, which are not resized.
        return mask_loss(logits_RSS, images.wide_boxes(boxes), matched, batch.masks)

    # ------------------------------------------------------------------------------------------------ inference

    @torch.no_grad()
    def record_regions(self, images: Sequence[Tensor]) -> list[RegionRecord]:
        """Regions of uint8 images [3, H, W], embedded by all heads; `find_in_records` scores any names on them."""
        resized = self.detector.preprocess(images)
        return self._region_records(resized, self.detector.features(resized))

    def _region_records(self, images: ResizedImages, features: dict[str, Tensor]) -> list[RegionRecord]:
        detector, config = self.detector, self.config
        proposals = detector.propose(images, features)
        region_RF = detector.region_features(features, proposals.boxes)
        first_RD = F.normalize(detector.projection(region_RF).float(), dim=1)
        text_RD = first_RD if config.names_classes else None
        image_RD = first_RD if config.variant == "image" else None
        if config.variant == "ensemble":
            image_RD = F.normalize(self._image_embeddings(features, proposals.boxes).float(), dim=1)
        background_R = self._background_logits(first_RD, 1.0) if config.names_classes else None
        counts = [len(entry) for entry in proposals.boxes]

        def per_image(values: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * len(counts) if values is None else torch.split(values, counts)

        return [
            RegionRecord(box, objectness, text, background, image, width, height)
            for box, objectness, text, background, image, (height, width) in zip(
                images.original_boxes(detector.refine(region_RF, proposals.boxes)),
                proposals.scores,
                per_image(text_RD),
                per_image(background_R),
                per_image(image_RD),
                images.original_sizes,
                strict=True,
            )
        ]

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> list[EncodedViLD]:
        """Regions of uint8 images [3, H, W], with the features that masks are pooled from; `find` searches them."""
        resized = self.detector.preprocess(images)
        features = self.detector.features(resized)
        masks = self.config.detector.masks
        return [
            EncodedViLD(
                record,
                tuple(level[index : index + 1] for level in features.values()) if masks else (),
                resized.image_sizes[index],
                resized.wide_sizes[index],
            )
            for index, record in enumerate(self._region_records(resized, features))
        ]

    @torch.no_grad()
    def find(
        self,
        encoded: EncodedViLD,
        vocabulary: Vocabulary | RegionQuery,
        *,
        score_threshold: float,
        max_detections: int,
        distinct: bool = False,
        masks: bool = True,
        scoring: Scoring | None = None,
    ) -> Detections:
        """Find the labels of a vocabulary or query in an encoded image, with masks if learned and wanted."""
        query = vocabulary if isinstance(vocabulary, RegionQuery) else RegionQuery(vocabulary)
        found = self.find_in_records(
            [encoded.record],
            query,
            score_threshold=score_threshold,
            max_detections=max_detections,
            distinct=distinct,
            scoring=scoring,
        )
        if not (masks and self.config.detector.masks):
            return found[0]
        boxes = encoded.sizes.resized_boxes([found[0].boxes])  # masks are pooled from the final boxes
        features = {str(index): level for index, level in enumerate(encoded.levels)}
        return with_masks(found, self.detector.mask_head(features, boxes))[0]

    def detect(
        self,
        images: Sequence[Tensor],
        vocabulary: Vocabulary | RegionQuery,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
        scoring: Scoring | None = None,
    ) -> list[Detections]:
        """Find the labels of a vocabulary or query in uint8 images [3, H, W]; one `Detections` per image."""
        return [
            self.find(each, vocabulary, score_threshold=score_threshold, max_detections=max_detections, scoring=scoring)
            for each in self.encode(images)
        ]

    def find_in_records(
        self,
        records: Sequence[RegionRecord],
        query: RegionQuery,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
        distinct: bool = False,
        scoring: Scoring | None = None,
    ) -> list[Detections]:
        """Find a query's labels in recorded images, without a forward pass.

        Raises:
            InputError: a `supervised` model is given attributes or children.
        """
        all_names = query.names.names
        names, rows = self._closed_vocabulary(query.names)
        if rows is not None and (query.attributes is not None or query.children is not None):
            raise InputError("query: a supervised model knows its names alone, expected no attributes or children")
        query, scoring = replace(query, names=names), scoring or self.config.scoring
        selection = Selection(self.config.detector.box_nms, score_threshold, max_detections, distinct)
        detections = [detect_in_record(record, query, scoring, selection) for record in records]
        if rows is None:
            return detections
        return [replace(entry, labels=rows[entry.labels], names=all_names) for entry in detections]

    def _closed_vocabulary(self, vocabulary: Vocabulary) -> tuple[Vocabulary, Tensor | None]:
        """The names that a `supervised` model has classes for, and their rows in the vocabulary."""
        if self.config.variant != "supervised":
            return vocabulary, None
        class_of = {name: row for row, name in enumerate(self.config.supervised_names)}
        known = [row for row, name in enumerate(vocabulary.names) if name in class_of]
        names = tuple(vocabulary.names[row] for row in known)
        embeddings = F.normalize(self.classes, dim=1)[[class_of[name] for name in names]]
        return Vocabulary(names, embeddings), torch.tensor(known, dtype=torch.int64, device=embeddings.device)

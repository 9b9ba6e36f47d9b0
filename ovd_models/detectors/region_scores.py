"""Scores of any names for cached regions: fusion, objectness, attributes and hierarchies, without a forward pass.

N regions of one image, K names, A attributes, C children, L labels, D embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ovd_models.batches import Detections, TensorRecord
from ovd_models.detectors.region_query import RegionQuery
from ovd_models.detectors.resizing import Selection, select_detections
from ovd_models.losses import cosine_logits
from ovd_models.vocabulary import Vocabulary

RegionEncoder = Callable[[Tensor, Tensor], Tensor]
"""A uint8 image [3, H, W] and boxes [N, 4] in its pixels -> the teacher's unit embeddings [N, D] of the crops."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How cosines become scores; all of it can be changed after training."""

    temperature: float = 50.0
    """Multiplies cosines before a softmax."""
    image_temperature: float = 50.0
    """The same for the image head, or for the teacher on crops."""
    base_image: float = 1 / 3
    """Exponent of the image head's probability for base names (1 - lambda in ViLD); the text head has 1 minus it."""
    novel_image: float = 2 / 3
    """The same for novel names (lambda in ViLD)."""
    unknown_image: float = 0.4
    """The same if the split is unknown, as on another data set."""
    objectness: float = 0.0
    """Exponent of the proposal's objectness; the class probability has 1 minus it, so 0.5 is their geometric mean.
    ViLD itself does not use objectness."""


@dataclass(frozen=True)
class RegionRecord(TensorRecord):
    """Regions of one image as a detector embeds them, independent of any names."""

    boxes: Tensor
    """[N, 4] float32 xyxy, pixels of the original image, refined."""
    objectness: Tensor
    """[N] in [0, 1]."""
    text: Tensor | None
    """[N, D] unit rows of the head trained with names; None if the detector has none."""
    background: Tensor | None
    """[N] cosines of `text` and the learned background."""
    image: Tensor | None
    """[N, D] unit rows of the distilled head, or of the teacher on crops; None if there is neither."""
    width: int
    height: int

    def top(self, count: int) -> "RegionRecord":
        """The `count` regions of highest objectness."""
        rows = self.objectness.argsort(descending=True, stable=True)[:count]
        picked = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **picked)  # type: ignore[arg-type]


def class_probabilities(record: RegionRecord, vocabulary: Vocabulary, scoring: Scoring) -> Tensor:
    """[N, K] probabilities of the names, fused if there are two heads (ViLD, equations 2, 5 and 6).

    The text head's softmax is over the names and the background, the image head's over the names alone.
    """
    heads = []
    if record.text is not None:
        logits_NK = _logits(record.text, vocabulary, scoring.temperature)
        if record.background is not None:
            logits_NK = torch.cat([logits_NK, scoring.temperature * record.background[:, None]], dim=1)
        heads.append(logits_NK.softmax(1)[:, : len(vocabulary)])
    if record.image is not None:
        heads.append(_logits(record.image, vocabulary, scoring.image_temperature).softmax(1))
    if len(heads) == 1:
        return heads[0]
    return geometric_mean(heads[0], heads[1], image_exponents(vocabulary, scoring))


def image_exponents(vocabulary: Vocabulary, scoring: Scoring) -> Tensor:
    """[K] exponent of the image head for each name."""
    if vocabulary.is_base is None:
        return torch.full((len(vocabulary),), scoring.unknown_image, device=vocabulary.embeddings.device)
    return torch.where(vocabulary.is_base, scoring.base_image, scoring.novel_image)


def geometric_mean(text_NK: Tensor, image_NK: Tensor, image_exponent_K: Tensor) -> Tensor:
    """Weighted geometric mean of two probabilities, not renormalised (ViLD, equation 6)."""
    return text_NK ** (1 - image_exponent_K) * image_NK**image_exponent_K


def attribute_probabilities(name_NK: Tensor, attribute_NA: Tensor) -> Tensor:
    """[N, K] names, [N, A] attributes -> [N, A * K] p(name | region) p(attribute | region) (ViLD, section 4.5).

    All names with the first attribute, then with the second one.
    """
    return (attribute_NA[:, :, None] * name_NK[:, None, :]).flatten(1)


def child_probabilities(parent_NK: Tensor, logits_NC: Tensor, parent_C: Tensor) -> Tensor:
    """[N, C] p(parent | region) p(child | parent, region), the second factor a softmax among siblings.

    `parent_C` [C] int64 is the row in `parent_NK` of each child of `logits_NC`.
    """
    # Float64 holds exp(-200), the smallest weight that cosines times 100 can give.
    weight_NC = (logits_NC.double() - logits_NC.double().amax(1, keepdim=True)).exp()
    family_NK = weight_NC.new_zeros(parent_NK.shape).index_add(1, parent_C, weight_NC)
    return parent_NK[:, parent_C] * (weight_NC / family_NK[:, parent_C]).to(parent_NK.dtype)


def score_labels(record: RegionRecord, query: RegionQuery, scoring: Scoring) -> tuple[Tensor, tuple[str, ...]]:
    """Scores [N, L] in [0, 1] of a query's labels, and the L labels."""
    score_NL, labels = class_probabilities(record, query.names, scoring), query.names.names
    if query.children is not None and query.parents is not None:
        childless = torch.ones(len(labels), dtype=torch.bool, device=score_NL.device)
        childless[query.parents] = False
        logits_NC = _best_logits(record, query.children, scoring)
        child_NC = child_probabilities(score_NL, logits_NC, query.parents)
        kept = tuple(name for name, keep in zip(labels, childless.tolist(), strict=True) if keep)
        score_NL, labels = torch.cat([score_NL[:, childless], child_NC], 1), kept + query.children.names
    if query.attributes is not None:
        attribute_NA = _best_logits(record, query.attributes, scoring).softmax(1)
        score_NL = attribute_probabilities(score_NL, attribute_NA)
        labels = tuple(f"{word} {name}" for word in query.attributes.names for name in labels)
    if scoring.objectness:
        objectness_N1 = record.objectness[:, None]
        score_NL = score_NL ** (1 - scoring.objectness) * objectness_N1**scoring.objectness
    return score_NL, labels


def _best_logits(record: RegionRecord, words: Vocabulary, scoring: Scoring) -> Tensor:
    """[N, A] logits for a softmax over the words alone: of the distilled head if any, which knows more words."""
    if record.image is not None:
        return _logits(record.image, words, scoring.image_temperature)
    assert record.text is not None  # a record has at least one of the two
    return _logits(record.text, words, scoring.temperature)


def _logits(region_ND: Tensor, vocabulary: Vocabulary, temperature: float) -> Tensor:
    """[N, K] logits, for each name those of its best synonym."""
    return vocabulary.strongest(cosine_logits(region_ND, vocabulary.embeddings, temperature))


def detect_in_record(record: RegionRecord, query: RegionQuery, scoring: Scoring, selection: Selection) -> Detections:
    """The best (box, label) pairs of one image, after suppression within each label."""
    score_NL, labels = score_labels(record, query, scoring)
    return Detections(*select_detections(record.boxes, score_NL, selection), labels, record.width, record.height)


def use_teacher(
    records: Sequence[RegionRecord], images: Sequence[Tensor], encoder: RegionEncoder, *, keep_text: bool
) -> list[RegionRecord]:
    """Records with the teacher's embeddings of crops from uint8 images [3, H, W] as image embeddings.

    With `keep_text` they are fused with the detector's text head (ViLD-text + CLIP); otherwise the teacher alone
    classifies (CLIP on crops).
    """
    embedded = [
        replace(record, image=encoder(image, record.boxes)) for record, image in zip(records, images, strict=True)
    ]
    return embedded if keep_text else [replace(record, text=None, background=None) for record in embedded]

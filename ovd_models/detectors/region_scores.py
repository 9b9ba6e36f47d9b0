"""From cached regions to scores of any names: fusion, objectness, attributes and hierarchies, without a forward pass.

N regions of one image, K names, A attributes, C children, D embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ovd_models.batches import Detections
from ovd_models.detectors.questions import RegionQuery
from ovd_models.detectors.rcnn import select_detections
from ovd_models.losses import cosine_logits
from ovd_models.vocabulary import Vocabulary

RegionEncoder = Callable[[Tensor, Tensor], Tensor]
"""A uint8 image [3, H, W] and boxes [N, 4] in its pixels -> unit embeddings [N, D], as the teacher sees the crops."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How cosines become scores; anything here can be changed after training."""

    temperature: float = 50.0
    """Multiplies cosines before a softmax."""
    image_temperature: float = 50.0
    """The same for the image head, or for the teacher itself."""
    base_image: float = 1 / 3
    """Exponent of the image head's probability for names that had boxes (1 - lambda in ViLD); the text head's is the
    rest up to 1."""
    novel_image: float = 2 / 3
    """The same for names that had none (lambda in ViLD)."""
    unknown_image: float = 0.4
    """The same where nobody knows which names had boxes, as on another data set."""
    objectness: float = 0.0
    """Exponent of the proposal's objectness; the class probability's is the rest up to 1, so 0.5 is their geometric
    mean. ViLD itself does not use it."""


@dataclass(frozen=True)
class RegionRecord:
    """What a detector knows about the regions of one image, whatever names are asked for."""

    boxes: Tensor
    """[N, 4] float32 xyxy, pixels of the original image, refined."""
    objectness: Tensor
    """[N] in [0, 1]."""
    text: Tensor | None
    """[N, D] unit rows of the head trained with names; None where there is none."""
    background: Tensor | None
    """[N] cosines of `text` with the learned background."""
    image: Tensor | None
    """[N, D] unit rows of the distilled head, or of the teacher on crops; None where there is neither."""
    width: int
    height: int

    def top(self, count: int) -> "RegionRecord":
        """The `count` regions of highest objectness."""
        rows = self.objectness.argsort(descending=True, stable=True)[:count]

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return replace(
            self,
            boxes=self.boxes[rows],
            objectness=self.objectness[rows],
            text=pick(self.text),
            background=pick(self.background),
            image=pick(self.image),
        )


def class_probabilities(record: RegionRecord, vocabulary: Vocabulary, scoring: Scoring) -> Tensor:
    """[N, K] probabilities of the names, those of two heads fused (ViLD, equations 2, 5 and 6).

    The text head's softmax runs over the names and the background, the image head's over the names alone.
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
    """p(name | region) p(attribute | region) of every pair (ViLD, section 4.5).

    Args:
        name_NK: [N, K].
        attribute_NA: [N, A].

    Returns:
        [N, A * K], all names with the first attribute, then with the second one.
    """
    return (attribute_NA[:, :, None] * name_NK[:, None, :]).flatten(1)


def child_probabilities(parent_NK: Tensor, logits_NC: Tensor, parent_C: Tensor) -> Tensor:
    """p(parent | region) p(child | parent, region), the second factor a softmax among siblings.

    Args:
        parent_NK: [N, K] probabilities of the parents.
        logits_NC: [N, C] of the children.
        parent_C: [C] int64, the parent of each child.
    """
    # Float64 holds exp(-200), the smallest weight that cosines times 100 can give.
    weight_NC = (logits_NC.double() - logits_NC.double().amax(1, keepdim=True)).exp()
    family_NK = weight_NC.new_zeros(parent_NK.shape).index_add(1, parent_C, weight_NC)
    return parent_NK[:, parent_C] * (weight_NC / family_NK[:, parent_C]).to(parent_NK.dtype)


def answer(record: RegionRecord, query: RegionQuery, scoring: Scoring) -> tuple[Tensor, tuple[str, ...]]:
    """Scores [N, L] in [0, 1] of all labels, and the labels."""
    score_NL, labels = class_probabilities(record, query.names, scoring), query.names.names
    if query.children is not None and query.parents is not None:
        childless = torch.ones(len(labels), dtype=torch.bool, device=score_NL.device)
        childless[query.parents] = False
        logits_NC = _cosines(record, query.children, scoring)
        of_children = child_probabilities(score_NL, logits_NC, query.parents)
        kept = tuple(name for name, alone in zip(labels, childless.tolist(), strict=True) if alone)
        score_NL, labels = torch.cat([score_NL[:, childless], of_children], 1), kept + query.children.names
    if query.attributes is not None:
        attribute_NA = _cosines(record, query.attributes, scoring).softmax(1)
        score_NL = attribute_probabilities(score_NL, attribute_NA)
        labels = tuple(f"{word} {name}" for word in query.attributes.names for name in labels)
    if scoring.objectness:
        objectness_N1 = record.objectness[:, None]
        score_NL = score_NL ** (1 - scoring.objectness) * objectness_N1**scoring.objectness
    return score_NL, labels


def _cosines(record: RegionRecord, words: Vocabulary, scoring: Scoring) -> Tensor:
    """[N, A] logits of words that are told apart among themselves: by the distilled head, which knows more of them."""
    if record.image is not None:
        return _logits(record.image, words, scoring.image_temperature)
    assert record.text is not None  # a record has at least one of the two
    return _logits(record.text, words, scoring.temperature)


def _logits(region_ND: Tensor, vocabulary: Vocabulary, temperature: float) -> Tensor:
    """[N, K], of each name that of its best synonym."""
    return vocabulary.strongest(cosine_logits(region_ND, vocabulary.embeddings, temperature))


def find(
    record: RegionRecord,
    query: RegionQuery,
    scoring: Scoring,
    *,
    nms: float,
    score_threshold: float,
    max_detections: int,
) -> Detections:
    """The best (box, label) pairs of one image, after suppression within each label."""
    score_NL, labels = answer(record, query, scoring)
    boxes, scores, chosen = select_detections(record.boxes, score_NL, score_threshold, nms, max_detections)
    return Detections(boxes, scores, chosen, labels, record.width, record.height)


def with_teacher(
    records: Sequence[RegionRecord], images: Sequence[Tensor], encoder: RegionEncoder, *, keep_text: bool
) -> list[RegionRecord]:
    """Records whose image embeddings are the teacher's own, on crops.

    Args:
        records: one an image.
        images: uint8 [3, H, W].
        encoder: the teacher.
        keep_text: fuse with the detector's text head (ViLD-text + CLIP); else the teacher alone classifies
            (CLIP on crops).
    """
    seen = [encoder(image, record.boxes) for record, image in zip(records, images, strict=True)]
    if keep_text:
        return [replace(record, image=rows) for record, rows in zip(records, seen, strict=True)]
    return [replace(record, text=None, background=None, image=rows) for record, rows in zip(records, seen, strict=True)]

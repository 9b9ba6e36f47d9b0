"""Trained models ready for any image and any names: what `ovd_models.load` and its kin return."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar, overload

import torch
from PIL import Image
from torch import Tensor, nn

from ovd_models.batches import Detections
from ovd_models.checkpoints import CheckpointInfo, load_encoder, load_model, read_info
from ovd_models.clip.model import Clip, ClipTextEncoder, load_clip
from ovd_models.clip.zero_shot import TopNames
from ovd_models.codet.model import CoDet
from ovd_models.detectors.centernet2 import CenterNet2
from ovd_models.detectors.encoded import EncodedRegions
from ovd_models.detectors.rcnn import ProposalNetwork
from ovd_models.detectors.region_query import RegionQuery, build_query
from ovd_models.detectors.region_scores import Scoring
from ovd_models.errors import InputError
from ovd_models.ovsam.model import OvSam
from ovd_models.ovsam.text_to_mask import EncodedTextToMask, TextToMask
from ovd_models.preprocess import ImageLike, to_tensor
from ovd_models.sam.model import EverythingConfig
from ovd_models.segments import Prompts, Segments
from ovd_models.vild.model import EncodedViLD, ViLD
from ovd_models.vocabulary import Merge, Synonyms, TextEncoder, Vocabulary, build_vocabulary, clean_names

Names = Sequence[str] | Mapping[str, Sequence[str]]
"""Names, or names with the children of each: `{"bird": ["robin", "jay"], "anchor": []}`."""

BATCH = 8
"""Most images of a list that are encoded together: of equal size, since padding would change the boxes."""

M = TypeVar("M", bound=nn.Module)
ImageT = TypeVar("ImageT", bound=ImageLike)
Found = TypeVar("Found", Detections, Segments)


def choose_device(name: str) -> str:
    """The name of a device; `auto` is a GPU if this machine has one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def find_device(name: str) -> torch.device:
    """The device of a name such as `cpu`, `cuda` or `cuda:1`; `auto` is a GPU if there is one.

    Raises:
        InputError: there is no such device on this machine.
    """
    try:
        return torch.empty(0, device=choose_device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--device {name}: not on this machine ({reason}), expected auto, cpu, cuda or cuda:N"
        ) from error


class Predictor(Generic[M]):
    """A trained model with its text encoder and the contents of its checkpoint's `config.json`."""

    def __init__(self, model: M, encoder: TextEncoder, info: CheckpointInfo, device: str = "auto") -> None:
        self.device = find_device(device)
        self.model, self.encoder, self.info = model.to(self.device).eval(), encoder, info
        if isinstance(encoder, ClipTextEncoder):
            encoder.tower.to(self.device)

    @property
    def method(self) -> str:
        """The method that trained it."""
        return self.info.method

    @property
    def teacher(self) -> str:
        """The text encoder's model and weights."""
        return self.encoder.teacher

    @property
    def prompt_set(self) -> str:
        """The templates that names are put into."""
        return self.encoder.prompt_set

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Default names."""
        return self.info.vocabulary

    def read(self, image: ImageLike) -> Tensor:
        """[3, H, W] uint8 on the model's device.

        Raises:
            InputError: the image cannot be read.
        """
        return to_tensor(image).to(self.device)


class Detector(Predictor[CoDet | ViLD]):
    """A trained detector: names in, boxes out."""

    @overload
    def detect(
        self,
        image: ImageLike,
        names: Names | None = ...,
        *,
        attributes: Sequence[str] = ...,
        prompts: str = ...,
        attribute_prompts: str = ...,
        score_threshold: float | None = ...,
        max_detections: int = ...,
        distinct: bool = ...,
        scoring: Scoring | None = ...,
        synonyms: Synonyms | None = ...,
        merge: Merge = ...,
    ) -> Detections: ...
    @overload
    def detect(
        self,
        image: list[ImageT] | tuple[ImageT, ...],
        names: Names | None = ...,
        *,
        attributes: Sequence[str] = ...,
        prompts: str = ...,
        attribute_prompts: str = ...,
        score_threshold: float | None = ...,
        max_detections: int = ...,
        distinct: bool = ...,
        scoring: Scoring | None = ...,
        synonyms: Synonyms | None = ...,
        merge: Merge = ...,
    ) -> list[Detections]: ...
    def detect(
        self,
        image: ImageLike | list[ImageT] | tuple[ImageT, ...],
        names: Names | None = None,
        *,
        attributes: Sequence[str] = (),
        prompts: str = "",
        attribute_prompts: str = "photo",
        score_threshold: float | None = None,
        max_detections: int = 100,
        distinct: bool = False,
        scoring: Scoring | None = None,
        synonyms: Synonyms | None = None,
        merge: Merge = "mean",
    ) -> Detections | list[Detections]:
        """Find named things.

        Args:
            image: a path, a file's bytes, PIL image, array [H, W, 3] or tensor [3, H, W] (uint8 RGB), or a list of
                them, such as the frames of a video; neighbours of equal size are encoded together.
            names: any names; the default vocabulary if None. ViLD also takes names with the children of each.
            attributes: for ViLD, words that hold whatever the name is: `["red", "blue"]` gives "red anchor" ...
            prompts: a prompt set for this request, or templates such as `a drawing of {a}|{name}`; the checkpoint's
                prompt set if empty.
            attribute_prompts: the same for attributes, which stand before each name in turn.
            score_threshold: detections score above it; if None, above the checkpoint's own, `info.score_threshold`.
            max_detections: maximum number for each image.
            distinct: only the best name of each object, by suppression across names; else an object has a detection
                for every name above the threshold, and thousands of names may leave objects without any.
            scoring: for ViLD, how cosines become scores; the checkpoint's scoring if None.
            synonyms: other words by name, child or attribute.
            merge: whether a name's embedding is the mean of its synonyms', or its score the maximum of theirs.

        Returns:
            One `Detections` for one image, a list of them for a list.

        Raises:
            InputError: an image cannot be read, a name cannot be embedded, or the method cannot answer such a query.
        """
        query = build_query(
            self.encoder,
            names if names is not None else self.vocabulary,
            self.info.splits,
            attributes=attributes,
            prompts=prompts,
            attribute_prompts=attribute_prompts,
            synonyms=synonyms,
            merge=merge,
        ).to(self.device)
        threshold = self.info.score_threshold if score_threshold is None else score_threshold
        images: Sequence[ImageLike] = image if isinstance(image, list | tuple) else [image]
        found = []
        for batch in self._batches(images):
            for tensor, encoded in zip(batch, self.encode(batch), strict=True):
                result = self.find(
                    encoded,
                    query,
                    score_threshold=threshold,
                    max_detections=max_detections,
                    distinct=distinct,
                    scoring=scoring,
                )
                found.append(_with_image(result, tensor))
        return found if isinstance(image, list | tuple) else found[0]

    @property
    def predicts_masks(self) -> bool:
        """Whether detections have masks."""
        if isinstance(self.model, ViLD):
            return self.model.config.detector.masks
        return isinstance(self.model.detector, CenterNet2) and self.model.detector.config.mask_convs > 0

    def encode(self, images: Sequence[Tensor]) -> Sequence[EncodedRegions | EncodedViLD]:
        """Encode images [3, H, W] uint8 on the model's device as one batch; `find` searches them for any names.

        Raises:
            InputError: their sizes differ, so that padding would change the boxes.
        """
        sizes = sorted({f"{image.shape[-1]} x {image.shape[-2]}" for image in images})
        if len(sizes) > 1:
            raise InputError(f"images of {' and '.join(sizes[:2])} pixels in one batch, expected one size")
        return self.model.encode(images)

    def _batches(self, images: Iterable[ImageLike]) -> Iterator[list[Tensor]]:
        """Neighbours of equal size, at most `BATCH` at a time, [3, H, W] uint8."""
        for _, same_size in itertools.groupby(map(self.read, images), lambda tensor: tensor.shape):
            while batch := list(itertools.islice(same_size, BATCH)):
                yield batch

    def find(
        self,
        encoded: EncodedRegions | EncodedViLD,
        query: RegionQuery,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
        distinct: bool = False,
        masks: bool = True,
        scoring: Scoring | None = None,
    ) -> Detections:
        """Find a query's names in an encoded image. The result is on the model's device.

        Args:
            encoded: by `encode`.
            query: of `build_query`.
            score_threshold: and the others as for `detect`.
            max_detections: as for `detect`.
            distinct: as for `detect`.
            masks: whether to make masks too, if the detector predicts them: on a photograph they take seconds.
            scoring: as for `detect`.

        Raises:
            InputError: the method cannot answer such a query.
        """
        if isinstance(self.model, ViLD):
            assert isinstance(encoded, EncodedViLD)
            return self.model.find(
                encoded,
                query,
                score_threshold=score_threshold,
                max_detections=max_detections,
                distinct=distinct,
                masks=masks,
                scoring=scoring,
            )
        if query.attributes is not None or query.children is not None or scoring is not None:
            raise InputError(
                f"attributes, children, scoring: not of method {self.method!r}, expected a ViLD checkpoint"
            )
        assert isinstance(encoded, EncodedRegions)
        return self.model.find(
            encoded,
            query.names,
            score_threshold=score_threshold,
            max_detections=max_detections,
            distinct=distinct,
            masks=masks,
        )

    def propose(self, images: Sequence[ImageLike], limit: int) -> list[tuple[Tensor, Tensor]]:
        """Class-agnostic proposals: boxes [N, 4] (xyxy, pixels), best first, and their objectness [N], on the CPU.

        Args:
            images: as for a list in `detect`.
            limit: maximum number for each image; the detector's proposal network may keep fewer.

        Raises:
            InputError: an image cannot be read, or the detector is not an R-CNN.
        """
        detector = self.model.detector
        if not isinstance(detector, ProposalNetwork):
            raise InputError(f"{type(detector).__name__}: gives no proposals of its own, expected an R-CNN")
        found = (pair for batch in self._batches(images) for pair in detector.find_proposals(batch, limit))
        return [(boxes.cpu(), scores.cpu()) for boxes, scores in found]


class Segmenter(Predictor[OvSam]):
    """A trained OV-SAM: prompts and names in, named masks out."""

    def names(self, names: Sequence[str] | None = None) -> Vocabulary:
        """Embedded names, those with masks in training marked as base; the default vocabulary if None.

        If the checkpoint knows none of them, their split is unknown (`is_base` is None) and `novel_bias` is not added.
        """
        chosen = clean_names(names if names is not None else self.vocabulary)
        known = self.info.splits if any(name in self.info.splits for name in chosen) else None
        return build_vocabulary(self.encoder, chosen, known).to(self.device)

    def segment(self, image: ImageLike, prompts: Prompts, names: Sequence[str] | None = None) -> Segments:
        """One named mask for each prompt.

        Args:
            image: a path, a file's bytes, PIL image, array [H, W, 3] or tensor [3, H, W] (uint8 RGB).
            prompts: in pixels of the image.
            names: any names; the default vocabulary if None.

        Raises:
            InputError: the image cannot be read, the prompts do not fit it, or a name cannot be embedded.
        """
        tensor = self.read(image)
        return _with_image(self.model.segment(tensor, prompts, self.names(names)), tensor)

    def everything(
        self, image: ImageLike, names: Sequence[str] | None = None, settings: EverythingConfig | None = None
    ) -> Segments:
        """Named masks of the whole image, best first.

        Raises:
            InputError: the image cannot be read, or a name cannot be embedded.
        """
        tensor = self.read(image)
        return _with_image(self.model.everything(tensor, self.names(names), settings), tensor)


class TextSegmenter(Predictor[TextToMask]):
    """A trained text-to-mask model: names in, masks out."""

    def segment(self, image: ImageLike, names: Sequence[str] | None = None, clicks: Prompts | None = None) -> Segments:
        """One mask for each name; its score is the model's own estimate of the mask's quality.

        Training uses names of objects in the image only, so a name of something absent gets a mask too.

        Args:
            image: a path, a file's bytes, PIL image, array [H, W, 3] or tensor [3, H, W] (uint8 RGB).
            names: any names; the default vocabulary if None.
            clicks: points that correct each name's mask, with the earlier masks (`Segments.low_res`); for a model that
                was trained with clicks.

        Raises:
            InputError: the image cannot be read, a name cannot be embedded, or the clicks do not fit.
        """
        tensor = self.read(image)
        chosen = names if names is not None else self.vocabulary
        vocabulary = build_vocabulary(self.encoder, chosen, self.info.splits).to(self.device)
        return _with_image(self.find(tensor, vocabulary, clicks), tensor)

    def find(
        self, image: Tensor | EncodedTextToMask, vocabulary: Vocabulary, clicks: Prompts | None = None
    ) -> Segments:
        """One mask of an image ([3, H, W] uint8, or encoded by the model) for each name of a vocabulary."""
        segments = self.model.segment_text(image, vocabulary.embeddings, clicks)
        labels = torch.arange(len(vocabulary), device=self.device)
        return replace(segments, labels=labels, scores=segments.ious, names=vocabulary.names)


class Classifier(Predictor[Clip]):
    """A CLIP: names in, probabilities of a whole image out. It has no default names, since none were trained."""

    def __init__(self, model: Clip, teacher: str, device: str = "auto") -> None:
        encoder = ClipTextEncoder(model.config, model.model.text, teacher)
        super().__init__(model, encoder, CheckpointInfo("clip", {}, (), {}, {}), device)

    def read(self, image: ImageLike) -> Tensor:
        """[3, S, S] uint8 of the model's size, on its device.

        Raises:
            InputError: the image cannot be read.
        """
        picture = Image.fromarray(to_tensor(image).permute(1, 2, 0).cpu().numpy())
        return self.model.prepare([picture])[0].to(self.device)

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> Sequence[Tensor]:
        """Unit rows [D] of images that `read` returns, as one batch."""
        return list(self.model.encode_images(torch.stack(list(images))))

    @torch.no_grad()
    def find(self, encoded: Tensor, vocabulary: Vocabulary, top: int = 5) -> TopNames:
        """The most probable names of an encoded image [D]."""
        cosine_1S = encoded[None] @ vocabulary.embeddings.to(encoded).T
        logits_1K = vocabulary.strongest(self.model.model.logit_scale.exp() * cosine_1S)
        scores, rows = logits_1K.softmax(1)[0].topk(min(top, len(vocabulary)))
        return TopNames(tuple(vocabulary.names[row] for row in rows.tolist()), tuple(scores.tolist()))

    def classify(
        self,
        image: ImageLike,
        names: Sequence[str],
        *,
        prompts: str = "",
        synonyms: Synonyms | None = None,
        top: int = 5,
    ) -> TopNames:
        """The `top` most probable of any names, with probabilities among all of them; all if there are fewer.

        The other arguments are those of `Detector.detect`.

        Raises:
            InputError: the image cannot be read, a name is empty, or the prompts are unknown.
        """
        vocabulary = build_query(self.encoder, names, {}, prompts=prompts, synonyms=synonyms).names
        return self.find(self.encode([self.read(image)])[0], vocabulary, top)


def _with_image(found: Found, tensor: Tensor) -> Found:
    """Results on the CPU, with their image [3, H, W] uint8."""
    return replace(found.to(torch.device("cpu")), image=Image.fromarray(tensor.cpu().permute(1, 2, 0).numpy()))


def load(folder: str | Path, device: str = "auto") -> Detector:
    """The detector of a checkpoint folder, ready for any names.

    `workflows.common.models.load` takes a checkpoint of any method, and URIs.

    Args:
        folder: a checkpoint folder on this machine.
        device: such as `cpu` or `cuda:1`; `auto` is a GPU if there is one.

    Raises:
        InputError: the folder holds no detector checkpoint that this program reads, or there is no such device.
    """
    model = load_model(folder, CoDet, ViLD)
    assert isinstance(model, CoDet | ViLD)
    return Detector(model, load_encoder(Path(folder) / "text"), read_info(folder), device)


def load_segmenter(folder: str | Path, device: str = "auto") -> Segmenter:
    """The segmenter of an OV-SAM checkpoint folder, ready for any prompts and names; arguments as for `load`.

    Raises:
        InputError: the folder holds no OV-SAM checkpoint that this program reads, or there is no such device.
    """
    return Segmenter(load_model(folder, OvSam), load_encoder(Path(folder) / "text"), read_info(folder), device)


def load_text_segmenter(folder: str | Path, device: str = "auto") -> TextSegmenter:
    """The model of a text-to-mask checkpoint folder, ready for any names; arguments as for `load`.

    Raises:
        InputError: the folder holds no such checkpoint that this program reads, or there is no such device.
    """
    return TextSegmenter(load_model(folder, TextToMask), load_encoder(Path(folder) / "text"), read_info(folder), device)


def load_classifier(folder: str | Path, device: str = "auto") -> Classifier:
    """The CLIP of a checkpoint folder (`clip.json`), ready for any names; arguments as for `load`.

    Raises:
        InputError: the folder holds no whole CLIP that this program reads, or there is no such device.
    """
    return Classifier(*load_clip(folder), device)

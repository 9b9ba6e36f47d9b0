"""The checkpoint folder of a detector: complete, so that one folder serves new names anywhere.

model.safetensors     the detector's weights
config.json           method, model config, resolved run, default vocabulary; written last
text/                 the teacher's text tower, or a table of embedded names
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_type_hints

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ovd_models.batches import Detections
from ovd_models.clip.model import ClipTextEncoder, load_text_encoder, save_text_encoder
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.rcnn import ProposalNetwork
from ovd_models.detectors.region_query import build_query
from ovd_models.detectors.region_scores import Scoring
from ovd_models.errors import InputError
from ovd_models.images import open_image
from ovd_models.preprocess import ImageLike, to_tensor
from ovd_models.vild.model import ViLD, ViLDConfig
from ovd_models.vocabulary import EmbeddingTable, TextEncoder

FORMAT = 1
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself."""

    method: str
    model: dict[str, Any]
    """The model's config as JSON."""
    vocabulary: tuple[str, ...]
    """Default names."""
    splits: dict[str, str]
    """`base` or `novel` by name, as in training."""
    run: dict[str, Any]
    """The resolved run that made it."""


def save_detector(
    model: CoDet | ViLD,
    encoder: TextEncoder,
    folder: str | Path,
    *,
    splits: dict[str, str],
    run: dict[str, Any],
) -> None:
    """Write a complete checkpoint folder; `config.json` comes last, so a folder that has it is whole."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, target / "model.safetensors")
    save_encoder(encoder, target / "text")
    info = {
        "format": FORMAT,
        "method": "vild" if isinstance(model, ViLD) else "codet",
        "model": asdict(model.config),
        "vocabulary": list(splits),
        "splits": splits,
        "run": run,
    }
    (target / "config.json").write_text(json.dumps(info, indent=1, default=str))


def save_encoder(encoder: TextEncoder, folder: Path) -> None:
    """Write a text encoder to a folder that `load_encoder` reads."""
    if isinstance(encoder, ClipTextEncoder):
        save_text_encoder(encoder, folder)
        return
    if not isinstance(encoder, EmbeddingTable):
        raise TypeError(f"no format for {type(encoder).__name__}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": encoder.embeddings.contiguous()}, folder / "table.safetensors")
    table = {"names": encoder.names, "teacher": encoder.teacher, "prompt_set": encoder.prompt_set}
    (folder / "table.json").write_text(json.dumps(table, indent=1))


def load_encoder(folder: str | Path) -> TextEncoder:
    """The text encoder of a `text/` folder, or of a CLIP checkpoint.

    Raises:
        InputError: the folder holds neither, or is broken.
    """
    source = Path(folder)
    if not (source / "table.json").is_file():
        return load_text_encoder(source)
    try:
        table = json.loads((source / "table.json").read_text())
        rows = load_file(source / "table.safetensors")["embeddings"]
        names = tuple(table["names"])
        if rows.ndim != 2 or len(rows) != len(names):
            raise ValueError(f"{len(names)} names, embeddings {list(rows.shape)}")
        return EmbeddingTable(names, rows, table["teacher"], table["prompt_set"])
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise InputError(f"{source}: not a readable table of embedded names ({error})") from error


def read_info(folder: str | Path) -> CheckpointInfo:
    """What the checkpoint says about itself.

    Raises:
        InputError: the folder is no checkpoint, or one of another format.
    """
    source = Path(folder)
    path = source / "config.json"
    if not path.is_file():
        other = " (it holds a CLIP model, not a detector)" if (source / "clip.json").is_file() else ""
        raise InputError(f"{source}: no detector checkpoint, expected config.json and model.safetensors{other}")
    try:
        raw = json.loads(path.read_text())
        found = raw.get("format")
        if found != FORMAT:
            raise InputError(f"{path}: format {found!r}, this program reads format {FORMAT}")
        return CheckpointInfo(raw["method"], raw["model"], tuple(raw["vocabulary"]), raw["splits"], raw["run"])
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path}: not a checkpoint config ({type(error).__name__}: {error})") from error


def load_codet(folder: str | Path) -> CoDet:
    """The CoDet model of a checkpoint folder, in evaluation mode.

    Raises:
        InputError: it is a checkpoint of another method, or broken.
    """
    model = load_model(folder)
    if not isinstance(model, CoDet):
        raise InputError(f"{folder}: checkpoint of method {read_info(folder).method!r}, expected 'codet'")
    return model


def load_vild(folder: str | Path) -> ViLD:
    """The ViLD model of a checkpoint folder, in evaluation mode.

    Raises:
        InputError: it is a checkpoint of another method, or broken.
    """
    model = load_model(folder)
    if not isinstance(model, ViLD):
        raise InputError(f"{folder}: checkpoint of method {read_info(folder).method!r}, expected 'vild'")
    return model


def load_model(folder: str | Path) -> CoDet | ViLD:
    """The model of a checkpoint folder, in evaluation mode.

    Raises:
        InputError: it is a checkpoint of an unknown method, or broken.
    """
    info = read_info(folder)
    if info.method not in ("codet", "vild"):
        raise InputError(f"{folder}: checkpoint of method {info.method!r}, expected 'codet' or 'vild'")
    model: CoDet | ViLD
    try:
        if info.method == "vild":
            model = ViLD(from_json(ViLDConfig, info.model))
        else:
            model = CoDet(from_json(CoDetConfig, info.model))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    except (RuntimeError, TypeError, KeyError, ValueError, OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{folder}: not a readable {info.method} checkpoint ({reason})") from error
    return model.eval()


def from_json(kind: type[T], raw: dict[str, Any]) -> T:
    """A config dataclass from its JSON form: lists become tuples and objects nested configs where the type says so.

    Raises:
        TypeError: a field is unknown or missing.
    """
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for entry in fields(kind):
        if entry.name not in raw:
            continue
        value, hint = raw[entry.name], hints[entry.name]
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
            value = from_json(hint, value)
        elif isinstance(value, list) and getattr(hint, "__origin__", None) is tuple:
            value = tuple(value)
        values[entry.name] = value
    unknown = set(raw) - {entry.name for entry in fields(kind)}
    if unknown:
        raise TypeError(f"unknown field {sorted(unknown)[0]!r} of {kind.__name__}")
    return kind(**values)


class LoadedModel(Generic[M]):
    """A trained model with its text encoder and what its checkpoint folder tells."""

    def __init__(self, model: M, encoder: TextEncoder, info: CheckpointInfo, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.model, self.encoder, self.info = model.to(self.device).eval(), encoder, info

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
        return to_tensor(open_image(image) if isinstance(image, str | Path) else image).to(self.device)


class Detector(LoadedModel[CoDet | ViLD]):
    """A trained detector: names in, boxes out."""

    def detect(
        self,
        image: ImageLike | Sequence[ImageLike],
        names: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        *,
        attributes: Sequence[str] = (),
        prompts: str = "",
        attribute_prompts: str = "photo",
        score_threshold: float = 0.05,
        max_detections: int = 100,
        scoring: Scoring | None = None,
    ) -> Any:
        """Find named things.

        Args:
            image: a path, PIL image, array [H, W, 3] or tensor [3, H, W] (uint8 RGB), or a list of them.
            names: any names; the default vocabulary if None. ViLD also takes names with the children of each,
                `{"bird": ["robin", "jay"], "anchor": []}`.
            attributes: for ViLD, words that hold whatever the name is: `["red", "blue"]` gives "red anchor" ...
            prompts: a prompt set for this request, or templates such as `a drawing of {a}|{name}`, instead of the
                checkpoint's.
            attribute_prompts: the same for attributes, which stand before each name in turn.
            score_threshold: only detections above it.
            max_detections: at most so many an image.
            scoring: for ViLD, how cosines become scores, instead of the checkpoint's way.

        Returns:
            One `Detections` for one image, a list of them for a list.

        Raises:
            InputError: an image cannot be read, a name not be embedded, or the method cannot answer such a question.
        """
        query = build_query(
            self.encoder,
            names if names is not None else self.vocabulary,
            self.info.splits,
            attributes=attributes,
            prompts=prompts,
            attribute_prompts=attribute_prompts,
        ).to(self.device)
        several = isinstance(image, list | tuple)
        images: list[ImageLike] = list(image) if isinstance(image, list | tuple) else [cast(ImageLike, image)]
        tensors = [self.read(entry) for entry in images]
        if not tensors:
            return []
        if isinstance(self.model, ViLD):
            results = self.model.detect(
                tensors, query, score_threshold=score_threshold, max_detections=max_detections, scoring=scoring
            )
        elif attributes or query.children is not None or scoring is not None:
            raise InputError(
                f"attributes, children, scoring: not of method {self.method!r}, expected a ViLD checkpoint"
            )
        else:
            results = self.model.detect(
                tensors, query.names, score_threshold=score_threshold, max_detections=max_detections
            )
        found: list[Detections] = []
        for tensor, result in zip(tensors, results, strict=True):
            on_cpu = replace(result, boxes=result.boxes.cpu(), scores=result.scores.cpu(), labels=result.labels.cpu())
            found.append(replace(on_cpu, image=as_picture(tensor)))
        return found if several else found[0]

    def propose(self, images: Sequence[ImageLike], limit: int) -> list[tuple[Tensor, Tensor]]:
        """Boxes [N, 4] (xyxy, pixels) of whatever may be a thing, best first, and their objectness [N], on the CPU.

        Args:
            images: as for `detect`.
            limit: at most so many an image, and no more than the detector's proposal network keeps.

        Raises:
            InputError: an image cannot be read.
        """
        tensors = [self.read(image) for image in images]
        detector = self.model.detector
        if not isinstance(detector, ProposalNetwork):
            raise InputError(f"{type(detector).__name__}: gives no proposals of its own, expected an R-CNN")
        return [(boxes.cpu(), scores.cpu()) for boxes, scores in detector.find_proposals(tensors, limit)]


def as_picture(tensor: Tensor) -> Image.Image:
    """The picture as it was looked at: upright."""
    return Image.fromarray(tensor.cpu().permute(1, 2, 0).numpy())


def load_detector(folder: str | Path, device: str = "cpu") -> Detector:
    """The detector of a checkpoint folder.

    Raises:
        InputError: there is no such checkpoint, or it is broken.
    """
    return Detector(load_model(folder), load_encoder(Path(folder) / "text"), read_info(folder), device)

"""What OV-SAM trains on and starts from: names, masks, and the two models that it learns from."""

import dataclasses
from dataclasses import dataclass

from data_prep import storage
from data_prep.embeddings.texts import StoredEncoder, TextStore
from data_prep.streams.mask_loader import MaskLoader, mask_loader
from ovd_models.checkpoints import load_model, read_info, sam_id
from ovd_models.clip.model import Clip, ClipTextEncoder, load_clip
from ovd_models.errors import InputError
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import OvSamConfig
from ovd_models.sam.model import SamConfig, SamModel, load_sam
from ovd_models.vocabulary import Vocabulary, build_vocabulary
from workflows.common import cli, starting_weights
from workflows.common.teacher import read_categories
from workflows.configs.ovsam import Run


@dataclass(frozen=True)
class OvSamNames:
    """The names of a box set, embedded."""

    ids: dict[str, int]
    """Category id by name, for categories with a split."""
    splits: dict[str, str]
    """`base` or `novel` by name."""
    vocabulary: Vocabulary
    """All names, base ones marked."""
    base: Vocabulary
    """The base names, which training masks have."""


def read_names(run: Run, encoder: ClipTextEncoder) -> OvSamNames:
    """Embed the names of `categories/<boxes>`, or read them from the teacher's `texts`.

    Raises:
        InputError: see `read_categories`.
    """
    categories, splits = read_categories(run.storage, run.boxes)
    base = [name for name, split in splits.items() if split == "base"]
    stored = StoredEncoder(encoder, TextStore(run.storage, encoder.teacher))
    return OvSamNames(
        {name: category_id for category_id, name in categories.items()},
        splits,
        build_vocabulary(stored, list(splits), splits),
        build_vocabulary(stored, base, splits),
    )


def open_clip_teacher(run: Run) -> tuple[Clip, ClipTextEncoder]:
    """The CLIP whose image tower becomes OV-SAM's.

    Raises:
        InputError: none is given, or it is broken.
    """
    if not run.teacher:
        raise InputError("--teacher: missing, expected a CLIP checkpoint (`python workflows/clip.py`)")
    clip, teacher = load_clip(storage.local_folder(run.teacher))
    print(f"teacher: {teacher} ({run.teacher})", flush=True)
    return clip, ClipTextEncoder(clip.config, clip.model.text, teacher).with_prompts(run.prompt_set)


def choose_sam(run: Run) -> Run:
    """The run with the SAM that it learns from, which a printed line names; without one it trains its own first.

    Raises:
        InputError: the config trains none, and none is given or in torch hub's cache; or what is given is none.
    """
    published = run.published_sam
    sam = run.sam or (starting_weights.find_published(published) if run.needs_sam else "")
    file = f"{published.file} from {published.url}"
    if run.needs_sam and not sam:
        raise InputError(f"--sam: missing, expected a SAM, since this config trains none; it is made for {file}")
    if storage.base_name(run.sam).endswith(".pth"):
        starting_weights.check_file("--sam", run.sam)
    elif run.sam:
        cli.check_checkpoint("--sam", run.sam)
        if "://" not in run.sam and (method := read_info(run.sam).method) != "sam":
            raise InputError(f"--sam {run.sam}: a checkpoint of method {method!r}, expected 'sam'")
    hint = f"; {file} is trained on {published.trained_on}" if published.url and not sam else ""
    print(f"sam: {sam or 'random weights'}{hint}", flush=True)
    return dataclasses.replace(run, sam=sam)


def open_sam(run: Run) -> tuple[SamModel, str]:
    """The SAM that `--sam` names, and its id.

    Raises:
        InputError: there is none, or the file is not a SAM of `sam_model`.
    """
    if storage.base_name(run.sam).endswith(".pth"):
        sam = load_sam(storage.local_file(run.sam), run.sam_model)
    else:
        sam = load_model(storage.local_folder(run.sam), SamModel)
    return sam, sam_id(sam)


def model_config(run: Run, sam: SamConfig, clip: Clip) -> OvSamConfig:
    """The OV-SAM of a SAM and a CLIP, with CLIP's learned logit scale."""
    log_scale = float(clip.model.logit_scale.detach())
    return OvSamConfig(
        sam=sam,
        tower=TowerConfig.of(clip.config),
        adapter_depth=run.adapter_depth,
        pyramid_width=run.pyramid_width,
        label_levels=run.label_levels,
        label_hidden=run.label_hidden,
        alpha=run.alpha,
        beta=run.beta,
        novel_bias=run.novel_bias,
        log_scale=log_scale,
        clip_view=run.clip_view,
    )


def distillation_table(run: Run) -> str:
    """Name of the `boxes` table with the images that the adapter learns from."""
    return f"{run.boxes}-distill" if run.distill_images else f"{run.boxes}-train"


def base_masks(run: Run, names: OvSamNames, side: int) -> MaskLoader:
    """The masks that the head learns from, in images of a longer side of `side` pixels."""
    return mask_loader(
        run.storage,
        f"{run.boxes}-train",
        [names.ids[name] for name in names.base.names],
        seed=run.clip2sam_stage.seed,
        augmentation=run.augmentation,
        side=side,
    )

"""Named box sets of `workflows/prepare_boxes.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from ovd_models.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Run:
    """One box set: `<name>-train` with base boxes only, `<name>-eval` with all."""

    storage: str = "store"
    """Folder or URI of all tables."""
    name: str
    """Name of the tables, before `-train` and `-eval`."""
    data: str = ""
    """A file in COCO's or LVIS's format with `images`, or a folder with `instances.json` and `images/`; Objects365's
    file; Open Images' `*-annotations-bbox.csv`; a YAML of YOLO, or its folder; a folder of Pascal VOC (`Annotations/`);
    Roboflow's exports; the pictogram world if empty. `docs/evaluation.md` describes each.

    COCO's names are split into 48 base and 17 novel ones (the other 15 are not used), LVIS's by `frequency` (`r` is
    novel); names of other data are base.
    """
    split: Literal["published", "frequency", "none"] = "published"
    """For `data`: `frequency` makes the names in at most 10 training images novel, as LVIS counts; `none` keeps all
    names base, for a detector that is to learn all that is labelled."""
    novel: str = ""
    """For `data`: a file with the names of the novel categories, one a line; the others are base."""
    eval_data: str = ""
    """Another such file or folder, with the same names or some of them, for evaluation; if empty, that part of `data`
    (`val`, `valid/`); if it has none, some of `data` are held out."""
    images: str = ""
    """Folder or URI of all pictures, such as COCO's with `train2017/` and `val2017/`; of a set with parts, it has a
    folder for each."""
    captions: str = ""
    """COCO's captions of the training images (`captions_train2017.json`), or a .tsv file with the columns `file_name`
    and `caption`: published as `pairs`, `concepts` and `groups` of the same name."""
    min_images: int = 20
    """Concepts of `captions` with fewer images are left out; 20 in CoDet, which found 634 in COCO."""
    wordnet: str = ""
    """Folder of WordNet 3.0: concepts of `captions` are nouns by CoDet's rule, not by word lists."""
    train_images: int = 2400
    """Drawn scenes for training; 0 if a folder is read."""
    eval_images: int = 300
    """Drawn scenes for evaluation, or images held out for it of `data` without such a part; 0 for a fifth of them, at
    most 20."""
    style: Literal["first", "second", "stripes", "outlines"] = "first"
    """Of drawn scenes; the second, outlined on stripes, is for the transfer of detectors trained on the first. The
    others are the first with one of these changes."""
    strict: bool = False
    """Refuse an annotation file in which anything was mended or left out."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the seed, which numpy takes from 0 on."""
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: expected 0 or more")


def smoke() -> Run:
    """A handful of scenes."""
    return Run(name="smoke", train_images=48, eval_images=16)


def pictograms() -> Run:
    """2,400 scenes with base boxes along a long tail, 300 with all categories for evaluation."""
    return Run(name="pictograms")


def coco() -> Run:
    """Annotated images, in COCO's format or another that `--data` takes; needs `--data`."""
    return Run(name="photos", train_images=0, eval_images=0)


def second_style() -> Run:
    """The pictogram world in another style: a test set for detectors that were trained on the first."""
    return Run(name="pictograms2", style="second", train_images=48)


def stripes() -> Run:
    """The pictogram world on the second style's background."""
    return replace(second_style(), name="pictograms-stripes", style="stripes")


def outlines() -> Run:
    """The pictogram world with the second style's outlines."""
    return replace(second_style(), name="pictograms-outlines", style="outlines")


CONFIGS: dict[str, Callable[[], Run]] = {
    "smoke": smoke,
    "pictograms": pictograms,
    "second_style": second_style,
    "stripes": stripes,
    "outlines": outlines,
    "coco": coco,
}

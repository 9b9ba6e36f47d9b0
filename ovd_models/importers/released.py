"""Released files of weights: where each comes from, what it needs beside it, and its published results.

The results are the authors' and were not measured here: neither the files nor the data sets are at hand.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from ovd_models.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReleasedFile:
    """One file."""

    file: str
    """Its name."""
    url: str
    kind: str
    """What `import_weights.py` recognises it as."""
    needs: str = ""
    """What its conversion needs beside it."""
    sha256: str = ""
    """Digest, or its start, as published in the file's name or URL; empty if none is."""
    md5: str = ""
    """The same for SAM's files, whose names end with the start of their MD5."""
    results: str = ""
    """As published."""


DETIC = "https://dl.fbaipublicfiles.com/detic/"
DRIVE = "https://drive.google.com/file/d/"
OVSAM = "https://huggingface.co/HarborYuan/ovsam_models"
LVIS_NAMES, COCO_NAMES = "--names lvis_v1_val.json", "--names instances_val2017.json"
OWN_TEXTS = "--table lvis_v1_clip_a+cname.npy, or nothing if the file holds its text encoder"
OPENAI = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")


def _codet(name: str, key: str, results: str, names: str = LVIS_NAMES) -> ReleasedFile:
    return ReleasedFile(file=f"{name}.pth", url=DRIVE + key, kind="detector", needs=names, results=results)


def _detic(name: str, results: str, names: str = LVIS_NAMES) -> ReleasedFile:
    needs = f"{names}; {OWN_TEXTS}" if names == LVIS_NAMES else f"{names}; --table coco_clip_a+cname.npy"
    return ReleasedFile(file=f"{name}.pth", url=f"{DETIC}{name}.pth", kind="detector", needs=needs, results=results)


def _lvis(everything: float, novel: float) -> str:
    return f"LVIS mask AP {everything}, novel {novel}"


def _coco(everything: float, novel: float) -> str:
    return f"COCO box AP50 {everything}, novel {novel}"


def _openai(name: str) -> ReleasedFile:
    url = str(get_pretrained_cfg(name, "openai")["url"])
    digest, file = url.split("/")[-2:]
    return ReleasedFile(file=file, url=url, kind="clip", sha256=digest)


def _backbone(url: str, sha256: str = "") -> ReleasedFile:
    return ReleasedFile(file=url.rpartition("/")[2], url=url, kind="backbone", sha256=sha256)


def _sam(file: str) -> ReleasedFile:
    url = f"https://dl.fbaipublicfiles.com/segment_anything/{file}"
    return ReleasedFile(file=file, url=url, kind="sam", md5=Path(file).stem.rpartition("_")[2])


def _ovsam(file: str, needs: str) -> ReleasedFile:
    return ReleasedFile(file=file, url=OVSAM, kind="ovsam", needs=needs)


def released_files() -> tuple[ReleasedFile, ...]:
    """All files, CoDet's first."""
    miil = "https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ImageNet_21K_P/models/"
    clips = [name for name in OPENAI if "openai" in list_pretrained_tags_by_model(name)]
    ovsam_needs = "SAM's and CLIP's files: --weights ADAPTER HEAD sam_vit_h_4b8939.pth RN50x16.pt"
    return (
        _codet("CoDet_OVCOCO_R50_1x", "1uYX7Jm61TghEtop94fMymBS6AUR66T8k", _coco(46.8, 30.6), COCO_NAMES),
        _codet("CoDet_OVLVIS_R5021k_4x_ft4x", "1-chsmrh5fahOOSa4G2o5Mi6W2mGuMtG-", _lvis(31.3, 23.7)),
        _codet("CoDet_OVLVIS_SwinB_4x_ft4x", "1ut1K8IsdD2A4uK0xVtPRDg1r4FubH8Pq", _lvis(39.2, 29.4)),
        _codet("CoDet_OVLVIS_EVA_4x", "1oILkFkIlbEgCCLqCLyJJ5ZDHG1bd0aWN", _lvis(44.7, 37.0)),
        _detic("BoxSup_OVCOCO_CLIP_R50_1x", _coco(39.3, 1.3), COCO_NAMES),
        _detic("Detic_OVCOCO_CLIP_R50_1x_max-size", _coco(44.7, 24.1), COCO_NAMES),
        _detic("Detic_OVCOCO_CLIP_R50_1x_caption", _coco(43.8, 21.0), COCO_NAMES),
        _detic("Detic_OVCOCO_CLIP_R50_1x_max-size_caption", _coco(45.0, 27.8), COCO_NAMES),
        _detic("BoxSup-C2_Lbase_CLIP_R5021k_640b64_4x", _lvis(30.2, 16.4)),
        _detic("Detic_LbaseI_CLIP_R5021k_640b64_4x_ft4x_max-size", _lvis(32.4, 24.9)),
        _detic("Detic_LbaseCCimg_CLIP_R5021k_640b64_4x_ft4x_max-size", _lvis(31.0, 19.8)),
        _detic("Detic_LbaseCCcapimg_CLIP_R5021k_640b64_4x_ft4x_max-size", _lvis(31.0, 21.3)),
        _detic("BoxSup-C2_Lbase_CLIP_SwinB_896b32_4x", _lvis(38.4, 21.9)),
        _detic("Detic_LbaseI_CLIP_SwinB_896b32_4x_ft4x_max-size", _lvis(40.7, 33.8)),
        _ovsam("sam2clip_vith_rn50x16.pth", ovsam_needs),
        _ovsam("clip2sam_coco_rn50x16.pth", f"{ovsam_needs}; {COCO_NAMES}"),
        _ovsam("clip2sam_lvis_rn50x16.pth", f"{ovsam_needs}; {LVIS_NAMES}"),
        _sam("sam_vit_b_01ec64.pth"),
        _sam("sam_vit_l_0b3195.pth"),
        _sam("sam_vit_h_4b8939.pth"),
        *map(_openai, clips),
        _backbone("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61"),
        _backbone("https://download.pytorch.org/models/resnet152-394f9c45.pth", "394f9c45"),
        _backbone("https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl"),
        _backbone(f"{miil}resnet50_miil_21k.pth"),
        _backbone(
            "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth"
        ),
        _backbone("https://huggingface.co/Yuxin-CV/EVA-02/resolve/main/eva02/pt/eva02_L_pt_m38m_p14to16.pt"),
        ReleasedFile(
            file="clip_synonym_prompt.npy",
            url="gs://cloud-tpu-checkpoints/detection/projects/vild/weights/clip_synonym_prompt.npy",
            kind="texts",
            needs="LVIS's names in category-id order",
        ),
    )


def find_released(file: str) -> ReleasedFile | None:
    """The released file of this name; None if there is none."""
    return next((entry for entry in released_files() if entry.file == file), None)


def check_released(path: str | Path, sha256: str = "") -> None:
    """Raise InputError if a file with a released name is not the published one, as after an interrupted download.

    The file is not read for its SHA-256 if that is given.
    """
    entry = find_released(Path(path).name)
    if entry is None or not (entry.sha256 or entry.md5):
        return
    kind, published = ("sha256", entry.sha256) if entry.sha256 else ("md5", entry.md5)
    digest = sha256 if kind == "sha256" else ""
    if not digest:
        with Path(path).open("rb") as stream:
            digest = hashlib.file_digest(stream, kind).hexdigest()
    if not digest.startswith(published):
        published += "..." if len(published) < len(digest) else ""
        raise InputError(f"{path}: {kind} {digest}, published {published}; expected the whole file from {entry.url}")

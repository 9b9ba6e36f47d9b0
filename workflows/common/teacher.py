"""A detector's teacher: its text encoder, and the names it embeds."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep import storage, tables
from data_prep.embeddings.teachers import EmbedConfig, Teacher, store_checkpoint, store_released
from data_prep.embeddings.texts import StoredEncoder, TextStore, read_matrix
from ovd_models.checkpoints import load_encoder
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder
from ovd_models.errors import InputError
from ovd_models.importers.released import find_released
from ovd_models.predictors import choose_device, find_device
from ovd_models.vocabulary import SynonymMean, TextEncoder, Vocabulary, build_vocabulary

CLIP_FILE = "ViT-B-32.pt"
"""The released CLIP that an error suggests."""


@dataclass(frozen=True)
class CodetNames:
    """The names of a box set and of a concept table, embedded."""

    categories: dict[int, str]
    """Category id -> name, for categories with a split."""
    splits: dict[str, str]
    """`base` or `novel` by name."""
    vocabulary: Vocabulary
    """All names, in the order of `categories`."""
    concept_embeddings: Tensor
    """[C, D] embeddings of the concepts."""
    concepts: tuple[str, ...]
    """Names of the C concepts."""
    base_image_counts: tuple[int, ...]
    """For each of the K names the number of images with its boxes, for the federated loss."""

    @property
    def base_ids(self) -> list[int]:
        """Category ids of the K names of training boxes."""
        return [key for key, name in self.categories.items() if self.splits[name] == "base"]

    @property
    def base_embeddings(self) -> Tensor:
        """[K, D] embeddings of the names of training boxes."""
        return self.vocabulary.embeddings[self.vocabulary.is_base]


def read_categories(storage_uri: str, boxes: str) -> tuple[dict[int, str], dict[str, str]]:
    """Category id -> name, and name -> `base` or `novel`, for categories with a split.

    Raises:
        InputError: the table is missing, none has a split, or two categories have the same name.
    """
    rows = tables.read_table(storage_uri, "categories", boxes, ["category_id", "name", "split"]).to_pylist()
    with_split = [row for row in rows if row["split"]]
    if not with_split:
        raise InputError(f"categories/{boxes}: no base or novel name, expected at least one")
    repeated = [name for name, count in Counter(row["name"] for row in with_split).items() if count > 1]
    if repeated:
        raise InputError(
            f"categories/{boxes}: {repeated[0]!r} is the name of several categories, expected unique names"
        )
    return {row["category_id"]: row["name"] for row in with_split}, {row["name"]: row["split"] for row in with_split}


def read_synonyms(storage_uri: str, boxes: str) -> dict[str, list[str]]:
    """Other words by name, of the categories of a box set."""
    rows = tables.read_table(storage_uri, "categories", boxes, ["name", "synonyms"]).to_pylist()
    return {row["name"]: row["synonyms"] for row in rows if row["synonyms"]}


def read_codet_names(
    storage_uri: str, boxes: str, pairs: str, encoder: TextEncoder, synonyms: SynonymMean = "none"
) -> CodetNames:
    """Embed the names of `categories/<boxes>` and of `concepts/<pairs>`, or read them from the teacher's `texts`.

    Concepts have no synonyms; there are none if `pairs` is empty.

    Raises:
        InputError: a table is missing, or a name cannot be embedded.
    """
    if isinstance(encoder, ClipTextEncoder):
        encoder = StoredEncoder(encoder, TextStore(storage_uri, encoder.teacher))
    categories, splits = read_categories(storage_uri, boxes)
    base = [name for name in categories.values() if splits[name] == "base"]
    words = read_synonyms(storage_uri, boxes) if synonyms == "mean" else None
    counts = tables.read_table(storage_uri, "categories", boxes, ["name", "image_count"]).to_pylist()
    images = {row["name"]: row["image_count"] for row in counts}
    concepts = tables.read_table(storage_uri, "concepts", pairs, ["name"])["name"].to_pylist() if pairs else []
    vocabulary = build_vocabulary(encoder, list(categories.values()), splits, words)
    return CodetNames(
        categories,
        splits,
        vocabulary,
        build_vocabulary(encoder, concepts).embeddings if concepts else vocabulary.embeddings[:0],
        tuple(concepts),
        tuple(images[name] for name in base),
    )


def expected_teacher() -> str:
    """What `--teacher` may be, for errors."""
    released = find_released(CLIP_FILE)
    assert released is not None
    return (
        f"a checkpoint of `python workflows/clip.py` or, from a released file such as {CLIP_FILE} ({released.url}), of "
        "`python workflows/import_weights.py`, an architecture of open_clip with --pretrained TAG|FILE, or --texts"
    )


def open_teacher(teacher: str, expected: str, device: str = "cpu") -> Teacher:
    """The teacher that a detector was trained with, to embed crops.

    Args:
        teacher: folder or URI of a CLIP checkpoint.
        expected: the id of the detector's teacher.
        device: where it computes, in bfloat16 except on the CPU.

    Raises:
        InputError: there is no such checkpoint or device, or its id is not the expected one.
    """
    device = choose_device(device)
    find_device(device)
    model = Teacher(teacher, EmbedConfig(batch_size=128, gpus=0 if device == "cpu" else 1), device)
    if model.id != expected:
        raise InputError(f"--teacher {teacher}: is {model.id}, expected the detector's teacher, {expected}")
    return model


def untrained_teacher(storage_uri: str) -> str:
    """The checkpoint of an untrained CLIP, always the same, for smoke runs; made if it is missing."""
    folder = storage.join(storage_uri, "runs", "clip", "untrained")
    if not storage.exists(storage.join(folder, "clip.json")):
        torch.manual_seed(0)
        store_checkpoint(Clip(ClipConfig()), folder)
    return folder


def find_teacher(
    storage_uri: str, config: str, *, data: str, teacher: str, pretrained: str = "", texts: str = ""
) -> str:
    """The checkpoint of a training's teacher, before any other work; empty if `texts` replaces it.

    Args:
        storage_uri: where released weights and the untrained teacher are kept.
        config: `smoke` on its own tables has an untrained teacher.
        data: the folder that the tables are made of, if any.
        teacher: folder or URI of a CLIP checkpoint, or an architecture of open_clip.
        pretrained: the architecture's weights: a tag, or the path or URI of a file.
        texts: a table of embedded names.

    Raises:
        InputError: there is no such checkpoint, or there are no such weights.
    """
    if pretrained:
        if not teacher:
            raise InputError(f"--pretrained {pretrained}: expected --teacher with an architecture, such as ViT-B-32")
        return store_released(storage_uri, teacher, pretrained)
    if not teacher and config == "smoke" and not data:
        return untrained_teacher(storage_uri)
    if not teacher and not texts:
        raise InputError(f"--teacher: missing, expected {expected_teacher()}")
    if teacher and not storage.exists(storage.join(teacher, "clip.json")):
        raise InputError(f"--teacher {teacher}: no CLIP checkpoint (clip.json), expected {expected_teacher()}")
    return teacher


def open_encoder(storage_uri: str, boxes: str, *, teacher: str, texts: str, prompt_set: str = "") -> TextEncoder:
    """The teacher's text encoder.

    Args:
        storage_uri: of the box set.
        boxes: name of the box set.
        teacher: folder or URI of a CLIP checkpoint.
        texts: replaces the teacher: a table of the box set's names.
        prompt_set: replaces the teacher's own.

    Raises:
        InputError: neither `teacher` nor `texts` is given, or what is given does not fit.
    """
    if texts:
        if prompt_set:
            raise InputError(f"--prompt-set {prompt_set}: the names of --texts are embedded already, expected none")
        rows = tables.read_table(storage_uri, "categories", boxes, ["name"])["name"].to_pylist()
        return read_matrix(texts, rows)
    if not teacher:
        raise InputError(f"--teacher: missing, expected {expected_teacher()}")
    encoder = load_encoder(storage.local_folder(teacher))
    print(f"teacher: {encoder.teacher} ({teacher})", flush=True)
    return encoder.with_prompts(prompt_set) if isinstance(encoder, ClipTextEncoder) else encoder

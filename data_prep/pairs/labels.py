"""Image-level labels: an image's class is its only concept, as in the ImageNet images of Detic.

class_rows("imagenet/train")                                             # imagenet/train/n01440764/x.JPEG
name_classes(["n01440764"], "LOC_synset_mapping.txt", "list.csv")        # ["tench"]
"""

import functools
import json
import re
from collections.abc import Sequence

import pyarrow as pa

from data_prep import storage
from data_prep.boxes.folders import list_images
from ovd_models.errors import InputError
from ovd_models.prompts import clean_name, with_article

ID = re.compile(r"n?\d+")
"""Ids of classes: WordNet's, or numbers."""
LINE = re.compile(r"([^\t]+)\t(.+)|(n\d+)\s+(.+)")
EXPECTED = "lines of an id, a tab and a name, or a JSON object of names by id"


def class_rows(folder: str, names: str = "") -> pa.Table:
    """Rows `url` and `label` of the images in a folder of class folders; `names` as in `name_classes`.

    Raises:
        InputError: there are no images, one is not in a class folder, or a class has no name.
    """
    paths = list_images(folder)
    for path in paths:
        if path.count("/") != 1:
            raise InputError(f"{storage.join(folder, path)}: not in a class folder, expected {folder}/CLASS/IMAGE")
    labels = [path.partition("/")[0] for path in paths]
    name_classes(labels, names, folder)
    root = storage.absolute(folder)
    return pa.table({"url": [storage.join(root, path) for path in paths], "label": labels})


def name_classes(
    classes: Sequence[str | None], names: str, origin: str, first: int = 0, *, optional: bool = False
) -> list[str | None]:
    """The name of each row's class in lower case, without its synonyms after commas.

    Args:
        classes: ids of the file of names, or else names.
        names: path or URI of that file, see `read_class_names`; empty if there is none.
        origin: of the rows, for messages.
        first: number of the first row, for messages.
        optional: whether None stands for a row without a class.

    Raises:
        InputError: a row has no class, or its class has no name.
    """
    name_of = read_class_names(names) if names else {}
    found: dict[str | None, str | None] = {None: None} if optional else {}
    for row, entry in enumerate(classes, first):
        if entry in found:
            continue
        key = (entry or "").strip()
        if not key:
            raise InputError(f"{origin}: row {row}: no class, expected one for each image")
        if names and key not in name_of:
            raise InputError(f"{origin}: class {key!r} is not in {names}, expected ids such as {next(iter(name_of))!r}")
        if not names and ID.fullmatch(key):
            raise InputError(f"{origin}: class {key!r} is an id, expected --columns.class-names with {EXPECTED}")
        found[entry] = clean_name(name_of.get(key, key).split(",")[0])
    return [found[entry] for entry in classes]


@functools.lru_cache(maxsize=4)
def read_class_names(uri: str) -> dict[str, str]:
    """Names by id: from lines (`n01440764<tab>tench, Tinca tinca`) or from a JSON object.

    A name in JSON may be a list of synonyms, or of a WordNet id and a name, as in `imagenet_class_index.json`.

    Raises:
        InputError: the file is unreadable or has no names.
    """
    try:
        text = storage.read_text(uri)
        pairs = _json_names(text) if storage.base_name(uri).endswith(".json") else _line_names(text)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{uri}: {' '.join(str(error).split())}, expected {EXPECTED}") from error
    if not pairs:
        raise InputError(f"{uri}: holds no names, expected {EXPECTED}")
    return pairs


def _line_names(text: str) -> dict[str, str]:
    names = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            found = LINE.fullmatch(line.strip())
            if found is None:
                raise ValueError(f"line {number} is {line[:60]!r}")
            names[(found[1] or found[3]).strip()] = (found[2] or found[4]).strip()
    return names


def _json_names(text: str) -> dict[str, str]:
    names = {}
    for key, value in json.loads(text).items():
        words = value if isinstance(value, list) else [value]
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"the name of {key!r} is {value!r}")
        is_index = len(words) == 2 and re.fullmatch(r"n\d{8}", words[0])
        names[key] = words[-1] if is_index else words[0]
        if is_index:
            names[words[0]] = words[1]
    return names


def label_caption(name: str) -> str:
    """The caption of an image that has only a label."""
    return f"a photo of {with_article(name)}"

"""Search: the regions or pairs that a teacher finds most like a text, as a table and a sheet of pictures.

text -> prompt -> embedding --nearest rows of a store--> pictures with scores

python workflows/search.py --config smoke
python workflows/search.py --config pictograms --text "red umbrella"
python workflows/search.py --config pictograms --text "an anchor and a cat" --over captions --prompt-set ""
"""

import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from data_prep import storage, tables
from data_prep.embeddings.nearest import nearest
from data_prep.embeddings.stores import FlatRows, open_rows
from data_prep.streams.images import read_image
from ovd_models.clip.model import load_text_encoder
from ovd_models.drawing import draw_boxes
from ovd_models.errors import InputError
from ovd_models.prompts import prompts_of
from workflows import embed
from workflows.common import cli

STORES = {"regions": ("regions", "file"), "images": ("embeddings", "file"), "captions": ("embeddings", "text_file")}
TILE = 224
"""Side of a picture on the sheet, in pixels."""
COLUMNS = 5
LINE = 16


@dataclass(frozen=True, kw_only=True)
class Run:
    """One search."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    name: str
    """Name of the `regions` or `embeddings` table."""
    text: str = "red umbrella"
    """What is looked for."""
    over: Literal["regions", "images", "captions"] = "regions"
    prompt_set: str = "photo"
    """Templates that the text is put into; the text alone if empty."""
    teacher: str = ""
    """Folder or URI of the CLIP checkpoint; the one that made the table if empty."""
    top: int = 20
    """How many are shown."""
    output: str = ""
    """Where the sheet goes, a .jpg; `<storage>/reports/search-<name>.jpg` if empty."""

    def __post_init__(self) -> None:
        """Check that there is something to look for."""
        if not self.text.strip():
            raise InputError("--text: empty, expected words")
        if self.top < 1:
            raise InputError(f"--top {self.top}: expected 1 or more")


def smoke() -> Run:
    """Over what `embed.py --config smoke` makes, which is made first where it is missing."""
    return Run(name="smoke")


def pictograms() -> Run:
    """Over the pictogram world."""
    return Run(name="pictograms")


def photos() -> Run:
    """Over photographs."""
    return Run(name="photos")


def lvis() -> Run:
    """Over the proposals of LVIS."""
    return Run(name="lvis")


CONFIGS: dict[str, Callable[[], Run]] = {"smoke": smoke, "pictograms": pictograms, "photos": photos, "lvis": lvis}


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A row of the store that was found."""

    score: float
    """Cosine between the row and the text."""
    image_id: str
    picture: Image.Image
    box: tuple[float, ...] = ()
    """xyxy in pixels, of a region."""
    caption: str = ""
    """Of a pair."""


def search(run: Run) -> list[Hit]:
    """The best rows for a text, best first.

    Raises:
        InputError: the table or the checkpoint is missing, or the table was made with another teacher.
    """
    table, column = STORES[run.over]
    manifest = tables.read_manifest(run.storage, table, run.name)
    checkpoint = run.teacher or str(manifest.details["checkpoint"])
    teacher, query_D = embed_query(checkpoint, run.text, run.prompt_set)
    rows = open_rows(run.storage, table, run.name, {"teacher": teacher}, column)
    local = "store" if "://" in run.storage else run.storage
    index = storage.join(storage.absolute(local), "indexes", f"{table}-{run.name}-{column}-{manifest.digest}.faiss")
    started = time.perf_counter()
    found, scores = nearest(rows, query_D, run.top, index)
    print(f"{run.over}: {rows.offsets[-1]:,} rows searched in {time.perf_counter() - started:.2f} s")
    if run.over == "regions":
        return region_hits(run, str(manifest.details["source"]), rows, found, scores)
    return pair_hits(run, str(manifest.details["source"]), rows, found, scores)


def embed_query(checkpoint: str, text: str, prompt_set: str) -> tuple[str, npt.NDArray[np.float32]]:
    """The teacher's id and its [D] unit embedding of a text."""
    encoder = load_text_encoder(storage.local_folder(checkpoint))
    sentences = prompts_of(text, prompt_set) if prompt_set else [text]
    rows = encoder.embed_captions(sentences)
    if rows is None:
        raise InputError(f"{checkpoint}: has no text tower, expected a CLIP checkpoint")
    query_D: npt.NDArray[np.float32] = F.normalize(rows.mean(0), dim=0).numpy()
    return encoder.teacher, query_D


def region_hits(
    run: Run, source: str, rows: FlatRows, found: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]
) -> list[Hit]:
    """Regions with the image that they lie in."""
    positions = rows.image_of(found)
    ids = [rows.ids[position].decode() for position in positions.tolist()]
    boxes = lookup(run.storage, f"regions/{run.name}", ids, ["boxes"])["boxes"]
    uris = lookup(run.storage, source, ids, ["uri"])["uri"]
    hits = []
    for row, position, image_id, score in zip(found.tolist(), positions.tolist(), ids, scores.tolist(), strict=True):
        uri = storage.absolute(storage.join(run.storage, uris[image_id]))
        box = tuple(boxes[image_id][row - int(rows.offsets[position])])
        hits.append(Hit(score=score, image_id=image_id, picture=read_image(uri), box=box))
    return hits


def pair_hits(
    run: Run, source: str, rows: FlatRows, found: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]
) -> list[Hit]:
    """Pairs with their image and caption."""
    ids = [rows.ids[position].decode() for position in rows.image_of(found).tolist()]
    columns = lookup(run.storage, source, ids, ["caption", "shard", "offset", "size"])
    root = storage.absolute(tables.table_uri(run.storage, *source.split("/", 1)))
    hits = []
    for score, image_id in zip(scores.tolist(), ids, strict=True):
        caption, shard, offset, size = (column[image_id] for column in columns.values())
        picture = read_image(storage.join(root, shard), offset=offset, size=size)
        hits.append(Hit(score=score, image_id=image_id, picture=picture, caption=caption))
    return hits


def lookup(storage_uri: str, source: str, ids: Sequence[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Columns of the rows of some images of a table, by column and image id.

    Args:
        storage_uri: the storage.
        source: `<table>/<name>`.
        ids: of the images.
        columns: which.
    """
    table, name = source.split("/", 1)
    root = tables.table_uri(storage_uri, table, name)
    files = [storage.join(root, path) for path in tables.parquet_files(tables.read_manifest(storage_uri, table, name))]
    schema = pa.schema([tables.SCHEMAS[table].field(column) for column in ("image_id", *columns)])
    rows = tables.open_parquet(files, schema).to_table(filter=ds.field("image_id").isin(list(ids)))
    keys = rows["image_id"].to_pylist()
    return {column: dict(zip(keys, rows[column].to_pylist(), strict=True)) for column in columns}


def result_sheet(text: str, hits: Sequence[Hit]) -> Image.Image:
    """The pictures in rows, best first, each over its score; a region is framed."""
    height = TILE + 2 * LINE
    lines = -(-len(hits) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE, 2 * LINE + max(1, lines) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((4, 8), text, fill="black", font=ImageFont.load_default(14))
    for number, hit in enumerate(hits):
        left, top = number % COLUMNS * TILE, 2 * LINE + number // COLUMNS * height
        picture = hit.picture
        if hit.box:
            picture = draw_boxes(picture, torch.tensor([hit.box]), [f"{hit.score:.3f}"], [0])
        picture = picture.copy()
        picture.thumbnail((TILE - 8, TILE - 8))
        sheet.paste(picture, (left + (TILE - picture.width) // 2, top + (TILE - picture.height) // 2))
        pen.text((left + 4, top + TILE), f"{number + 1}. {hit.score:.3f}", fill="black", font=font)
        pen.text((left + 4, top + TILE + LINE - 2), describe(hit)[:36], fill="dimgray", font=font)
    return sheet


def describe(hit: Hit) -> str:
    """Where a region lies, or what a pair says."""
    return hit.caption or ", ".join(f"{edge:.0f}" for edge in hit.box)


def main() -> None:
    """The script."""
    run = cli.parse(CONFIGS, __doc__)
    if run.name == "smoke" and tables.find_manifest(run.storage, "regions", "smoke") is None:
        embed.embed(embed.make_smoke_tables(dataclasses.replace(embed.smoke(), storage=run.storage)))
    hits = search(run)
    for number, hit in enumerate(hits):
        print(f"{number + 1:4} {hit.score:7.3f}  {hit.image_id[:16]}  {describe(hit)}")
    output = run.output or storage.join(run.storage, "reports", f"search-{run.name}.jpg")
    buffer = io.BytesIO()
    result_sheet(f"{run.text} ({run.over} of {run.name})", hits).save(buffer, "JPEG", quality=90)
    storage.write_bytes(output, buffer.getvalue())
    print(f"sheet: {output}")


if __name__ == "__main__":
    cli.execute(main)

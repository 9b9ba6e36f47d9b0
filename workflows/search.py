"""Search: the regions or pairs most similar to a text by a teacher, as a table and a sheet of pictures.

text -> prompt -> embedding --nearest rows of a store--> pictures with scores

python workflows/search.py --config smoke
python workflows/search.py --config pictograms --text "red umbrella"
python workflows/search.py --config pictograms --text "an anchor and a cat" --over captions --prompt-set ""
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "text storage name teacher top output")

import dataclasses
import io
import time
from collections import defaultdict
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
from data_prep.embeddings.nearest import find_nearest
from data_prep.embeddings.stores import ArrayTable, open_rows
from data_prep.streams.images import read_image
from data_prep.tables import TableName
from ovd_models.clip.model import load_text_encoder
from ovd_models.drawing import draw_boxes
from ovd_models.errors import InputError
from ovd_models.prompts import prompts_of
from workflows import embed
from workflows.common import cli

Kind = Literal["regions", "images", "captions"]
ARRAYS: dict[Kind, tuple[ArrayTable, str]] = {
    "regions": ("regions", "file"),
    "images": ("embeddings", "file"),
    "captions": ("embeddings", "text_file"),
}
"""The table and the column of each kind of row."""
Place = tuple[str, int]
"""An image, and how many rows of the same image come before its row: copies of a picture have one id."""
TILE = 224
"""Side of a picture on the sheet, in pixels."""
COLUMNS = 5
LINE = 16
"""Height of a line of text on the sheet, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One search."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    name: str
    """Name of the `regions` or `embeddings` table."""
    text: str = "red umbrella"
    """The query."""
    over: Kind = "regions"
    prompt_set: str = "photo"
    """Prompt templates around the text; if empty, the text alone."""
    teacher: str = ""
    """Folder or URI of the CLIP checkpoint; if empty, the one that made the table."""
    top: int = 20
    """Number of results."""
    output: str = ""
    """Path of the sheet, a .jpg; if empty, `<storage>/reports/search-<name>.jpg`."""

    def __post_init__(self) -> None:
        """Check the query."""
        if not self.text.strip():
            raise InputError("--text: empty, expected words")
        if self.top < 1:
            raise InputError(f"--top {self.top}: expected 1 or more")


def smoke() -> Run:
    """The handful of pictures of `embed.py --config smoke`."""
    return Run(name="smoke")


def pictograms() -> Run:
    """The pictogram world."""
    return Run(name="pictograms")


def photos() -> Run:
    """The photographs of `prepare_boxes.py --config coco`."""
    return Run(name="photos")


def lvis() -> Run:
    """Proposals in LVIS's pictures."""
    return Run(name="lvis")


CONFIGS: dict[str, Callable[[], Run]] = {"smoke": smoke, "pictograms": pictograms, "photos": photos, "lvis": lvis}
"""Over the tables of `embed.py` with the same config; those of `smoke` are made first if they are missing."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A region or pair near the query."""

    score: float
    """Cosine with the text."""
    image_id: str
    picture: Image.Image
    box: tuple[float, ...] = ()
    """xyxy in pixels, if it is a region."""
    caption: str = ""
    """If it is a pair."""


def search(run: Run) -> list[Hit]:
    """The rows most similar to a text, best first.

    Raises:
        InputError: the table or the checkpoint is missing, or the table was made with another teacher.
    """
    table, column = ARRAYS[run.over]
    manifest = tables.read_manifest(run.storage, table, run.name)
    checkpoint = run.teacher or storage.join(run.storage, str(manifest.details["checkpoint"]))
    teacher, query_D = embed_query(checkpoint, run.text, run.prompt_set)
    rows = open_rows(run.storage, table, run.name, {"teacher": teacher}, column)
    local = "store" if "://" in run.storage else run.storage
    index = storage.join(storage.absolute(local), "indexes", f"{table}-{run.name}-{column}-{manifest.digest}.faiss")
    started = time.perf_counter()
    nearest, scores = find_nearest(rows, query_D, run.top, index)
    print(f"{run.over}: {rows.offsets[-1]:,} rows searched in {time.perf_counter() - started:.2f} s")
    positions = rows.image_of(nearest)
    places = [
        (rows.ids[position].decode(), int((rows.ids[:position] == rows.ids[position]).sum()))
        for position in positions.tolist()
    ]
    source_name = str(manifest.details["source"]).split("/", 1)[1]
    if run.over == "regions":
        return region_hits(run, source_name, places, (nearest - rows.offsets[positions]).tolist(), scores.tolist())
    return pair_hits(run, source_name, places, scores.tolist())


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
    run: Run, boxes_name: str, places: Sequence[Place], numbers: Sequence[int], scores: Sequence[float]
) -> list[Hit]:
    """Regions, given by the places of their images and their numbers in them, with their pictures."""
    regions = lookup(run.storage, "regions", run.name, places, ["boxes"])
    images = lookup(run.storage, "boxes", boxes_name, [(image_id, 0) for image_id, _ in places], ["uri"])
    hits = []
    for region, image, number, score in zip(regions, images, numbers, scores, strict=True):
        uri = storage.absolute(storage.join(run.storage, image["uri"]))
        box = tuple(region["boxes"][number])
        hits.append(Hit(score=score, image_id=region["image_id"], picture=read_image(uri), box=box))
    return hits


def pair_hits(run: Run, pairs_name: str, places: Sequence[Place], scores: Sequence[float]) -> list[Hit]:
    """Pairs with their images and captions."""
    pairs = lookup(run.storage, "pairs", pairs_name, places, ["caption", "shard", "offset", "size"])
    root = storage.absolute(tables.table_uri(run.storage, "pairs", pairs_name))
    hits = []
    for pair, score in zip(pairs, scores, strict=True):
        picture = read_image(storage.join(root, pair["shard"]), offset=pair["offset"], size=pair["size"])
        hits.append(Hit(score=score, image_id=pair["image_id"], picture=picture, caption=pair["caption"]))
    return hits


def lookup(
    storage_uri: str, table: TableName, name: str, places: Sequence[Place], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """Some columns of the rows at some places, in their order."""
    root = tables.table_uri(storage_uri, table, name)
    files = [storage.join(root, path) for path in tables.parquet_files(tables.read_manifest(storage_uri, table, name))]
    schema = pa.schema([tables.SCHEMAS[table].field(column) for column in ("image_id", *columns)])
    ids = [image_id for image_id, _ in places]
    rows = tables.open_parquet(files, schema).to_table(filter=ds.field("image_id").isin(ids))
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows.to_pylist():
        found[row["image_id"]].append(row)
    return [found[image_id][number] for image_id, number in places]


def result_sheet(text: str, hits: Sequence[Hit]) -> Image.Image:
    """A sheet of the pictures, best first, each above its score; regions are framed."""
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
    """The box of a region, or the caption of a pair."""
    return hit.caption or ", ".join(f"{edge:.0f}" for edge in hit.box)


def main() -> None:
    """Run the script."""
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

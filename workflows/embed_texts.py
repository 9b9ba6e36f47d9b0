"""Embed names into the store of text embeddings, once for every workflow.

names (a file with one a line, or a box set's) --teacher, prompt set--> texts/<teacher>
.npy matrix + categories (JSON)               --count, width, order--> texts/<teacher>

python workflows/embed_texts.py --model store/runs/clip/NAME/model --names names.txt --prompt-set vild
python workflows/embed_texts.py --model ViT-B-32 --pretrained openai --boxes pictograms
python workflows/embed_texts.py --matrix lvis_clip.npy --categories lvis_v1_categories.json --teacher ViT-B-32:openai
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage model pretrained prompt_set names boxes teacher device workers")

import time
from dataclasses import dataclass, replace
from functools import partial

from data_prep import storage, tables
from data_prep.embeddings.texts import TextStore, check_order, read_category_names, read_matrix
from data_prep.parts import Pool
from ovd_models.clip.model import ClipTextEncoder, load_text_encoder
from ovd_models.errors import InputError
from ovd_models.predictors import find_device
from ovd_models.prompts import clean_name
from ovd_models.vocabulary import clean_names
from workflows.common import cli, cluster


@dataclass(frozen=True, kw_only=True)
class Run:
    """The names or the matrix to store, and the model."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    model: str = ""
    """A CLIP checkpoint of ours, or an open_clip architecture."""
    pretrained: str = ""
    """Weights of that architecture: a tag or a file."""
    prompt_set: str = ""
    """A prompt set of `ovd_models/prompts.py`; if empty, the model's own."""
    names: str = ""
    """A file with a name on every line."""
    boxes: str = ""
    """Instead: the categories of this box set."""
    clean: bool = False
    """Clean names as ViLD does: remove underscores, slashes, upper case and final dots."""
    matrix: str = ""
    """A .npy file with embeddings of `categories`, in order of category ids."""
    categories: str = ""
    """JSON with `id` and `name` of every row of `matrix`."""
    teacher: str = ""
    """Id of the model that embedded `matrix`; if empty, derived from the file's name and content."""
    device: str = "auto"
    """Device of the model, such as `cuda:1`; `auto` is a GPU if there is one, or if `gpus` gives the process one."""
    workers: int = 0
    """Processes of a cluster that embed names; 0 embeds inside the driver."""
    gpus: float = 0
    """GPUs of a process."""


CONFIGS = {"default": Run}


def names_to_embed(run: Run) -> tuple[str, ...]:
    """The names of the box set or of the file.

    Raises:
        InputError: the file or table is missing or empty.
    """
    if run.boxes:
        names = tables.read_table(run.storage, "categories", run.boxes, ["name"])["name"].to_pylist()
    elif run.names:
        try:
            names = [line for line in storage.read_text(run.names).splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--names {run.names}: {error}, expected a text file with a name on every line") from error
    else:
        raise InputError("--names: missing, expected a file with a name on every line, or --boxes")
    return clean_names([clean_name(name) for name in names] if run.clean else names)


def open_text_encoder(run: Run) -> ClipTextEncoder:
    """The model's text encoder, with the run's prompt set.

    Raises:
        InputError: the model or the prompt set is missing or unknown.
    """
    if not run.model:
        raise InputError("--model: missing, expected a CLIP checkpoint, or an architecture with --pretrained")
    encoder = load_text_encoder(run.model if run.pretrained else storage.local_folder(run.model), run.pretrained)
    encoder.tower.to(find_device(run.device))
    return encoder.with_prompts(run.prompt_set)


def embed(run: Run) -> tuple[TextStore, int]:
    """Fill the store; returns it and the number of new names."""
    if not run.matrix:
        encoder = open_text_encoder(run)
        store = TextStore(run.storage, encoder.teacher)
        if run.workers:
            cluster.start_ray()
        pool = Pool(workers=run.workers, cpus=1, gpus=run.gpus)
        return store, store.fill(encoder, names_to_embed(run), pool, partial(open_text_encoder, run))
    if not run.categories:
        raise InputError("--categories: missing, expected the JSON whose ids give the order of --matrix")
    table = read_matrix(run.matrix, read_category_names(run.categories))
    table = replace(table, teacher=run.teacher or table.teacher, prompt_set=run.prompt_set or "given")
    if run.model:
        encoder = open_text_encoder(run)
        print(f"{check_order(table, encoder, run.matrix):.0%} of the sampled names are nearest to their own row")
        table = replace(table, teacher=encoder.teacher)
    store = TextStore(run.storage, table.teacher)
    return store, store.import_table(table)


def main() -> None:
    """Run the script."""
    run = cli.parse(CONFIGS, __doc__)
    started = time.perf_counter()
    store, count = embed(run)
    manifest = store.manifest()
    total = manifest.rows if manifest else 0
    uri, seconds = tables.table_uri(run.storage, "texts", store.name), time.perf_counter() - started
    print(f"{count} names embedded, {total} in {uri} ({seconds:.0f} s)")


if __name__ == "__main__":
    cli.execute(main)

"""Named crawls of `workflows/prepare_pairs.py`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from data_prep.pairs.decode import DecodeConfig
from data_prep.pairs.dedup import CorpusConfig
from data_prep.pairs.fetch import FetchConfig
from data_prep.pairs.filters import FilterConfig
from data_prep.pairs.inputs import Columns
from data_prep.pairs.scores import ScoreConfig
from data_prep.pictograms.world import GLYPHS


@dataclass(frozen=True, kw_only=True)
class Run:
    """One crawl."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    name: str
    """Name of the tables."""
    urls: str = ""
    """The URL lists: a .tsv, .csv, .txt, .jsonl, .json or .parquet file, a folder of them, or a pattern; by path or
    URI."""
    shards: str = ""
    """Instead of `urls`: WebDataset shards, whose images are not fetched; a .tar file, a folder of them, or a pattern
    such as `s3://bucket/{00000..01242}.tar`."""
    images: str = ""
    """Instead of `urls`: a folder or URI with a folder of images for each class, such as ImageNet's."""
    columns: Columns = field(default_factory=Columns)
    add: bool = False
    """Add the rows of new lists to published tables."""
    retry: tuple[str, ...] = ()
    """Retry the rows rejected for these reasons, such as `timeout connect http_status`."""
    vocabulary: str = ""
    """Text file of concepts: one name per line, synonyms after commas. Without it, concepts are nouns."""
    names: tuple[str, ...] = ()
    """The concepts, if there is no file."""
    wordnet: str = ""
    """Folder of WordNet 3.0 (`index.noun`, `data.noun`, ...): concepts are nouns by CoDet's rule, not by word lists."""
    site_pictures: int = 0
    """Instead of `urls`, crawl a locally served pictogram web site with this many pictures."""
    site_scenes: int = 0
    fetch: FetchConfig = field(default_factory=FetchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    rows_per_shard: int = 1000
    """Input rows per shard."""
    max_shard_bytes: int = 1 << 30
    """Maximum bytes of a shard; a larger one is continued in another file."""
    rows_per_part: int = 100
    """Most input rows saved at a time; fewer of a short list, since a killed run fetches the parts in work again."""
    min_images: int = 2
    """Concepts with fewer images are left out."""
    crawlers: int | None = None
    """Crawler processes, each of which keeps two cores busy; 0 crawls in the driver. None: one per two cores of the
    cluster, or 0 on a machine of two cores outside a cluster."""
    parts_per_crawler: int = 8
    """Parts that a crawler works on side by side; those that only wait for slow hosts do not count."""
    waiting_bytes: int = 16 << 20
    """Maximum bytes of fetched images waiting to be decoded in a crawler; at the limit, it makes no requests."""


def web() -> Run:
    """A crawl of the public internet; set `--name` and `--urls`."""
    return Run(name="web", decode=DecodeConfig(max_side=512), corpus=CorpusConfig(max_caption_uses=50))


def cc3m() -> Run:
    """Conceptual Captions as published: captions and URLs in a .tsv file without a header; or shards of them."""
    return dataclasses.replace(web(), name="cc3m", columns=Columns(header=("caption", "url")), min_images=20)


def classes() -> Run:
    """Images with a class each: a folder of class folders (`--images`), or lists or shards with classes."""
    return Run(name="classes", columns=Columns(label="label"), decode=DecodeConfig(max_side=512))


def coyo() -> Run:
    """COYO-700M as published: Parquet files with `url` and `text`."""
    return dataclasses.replace(web(), name="coyo", columns=Columns(caption="text"))


def laion() -> Run:
    """LAION-400M and LAION-2B as published: Parquet files with `URL` and `TEXT`."""
    return dataclasses.replace(web(), name="laion", columns=Columns(url="URL", caption="TEXT"))


def pictograms() -> Run:
    """The pictogram web site: 12,000 small pictures and 4,000 scenes, plus about 10 % faulty rows."""
    local = FetchConfig(deadline_seconds=3.0, backoff_seconds=0.1, max_bytes=1 << 20, concurrency=64, per_host=128)
    return Run(
        name="pictograms",
        names=tuple(GLYPHS),
        site_pictures=12_000,
        site_scenes=4_000,
        fetch=dataclasses.replace(local, allow_networks=("127.0.0.1/32",)),
        corpus=CorpusConfig(near_bits=2),  # small drawings differ in little
        rows_per_shard=500,
    )


def smoke() -> Run:
    """A tiny pictogram web site."""
    run = pictograms()
    return dataclasses.replace(
        run,
        name="smoke",
        site_pictures=120,
        site_scenes=60,
        rows_per_shard=64,
        rows_per_part=32,
    )


CONFIGS: dict[str, Callable[[], Run]] = {
    "smoke": smoke, "pictograms": pictograms, "web": web, "cc3m": cc3m, "coyo": coyo, "laion": laion,
    "classes": classes,
}  # fmt: skip

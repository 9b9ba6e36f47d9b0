"""The crawl compared with img2dataset: CPU time, wall time and memory on one local web site, and image similarity.

make bench-pairs
python benchmarks/pairs.py --only http https --urls 1000 --pairs 1

CPU time is that of all processes a tool starts, including Ray's; the web server's process is not counted. Figures are
medians over all runs of a list on a commit, including those of earlier calls, so on a busy machine the pairs can be run
one at a time (`--pairs 1`, repeated).
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pyarrow.parquet as pq
from measure import BENCH, REPOSITORY, Cost, measure, provenance, update_figures
from pairs_servers import HOSTILE, Addresses, make_certificates, make_pictures, serve_site

WORK = BENCH / "pairs"
COSTS = WORK / "costs.jsonl"
PEER = BENCH / "venvs" / "img2dataset"
PACKAGES = ("img2dataset==1.47.0", "setuptools<81", "scikit-image==0.26.0")
SIDE = 256
QUALITY = 95
HOSTS = 400
HANGING = HOSTS // 20
COMPARED = 500
CAP_GB = 8.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    only: list[str]
    urls: int
    pairs: int
    rows_per_shard: int
    timeout: int
    tree: Path


@dataclass(frozen=True, kw_only=True)
class Job:
    """A URL list to crawl."""

    name: str
    urls: list[str]
    kept: int
    """Rows that both tools must keep."""
    per_host: int
    secure: bool = False
    retries: int = 0
    """Retries of img2dataset; ours retries temporary errors by itself, within one deadline."""


def ours(job: Job, options: Options, crawlers: int = 0) -> Cost:
    """Crawl with this project, inside the driver or with crawlers on Ray Data."""
    storage = fresh(WORK / "ours")
    flags = {
        "config": "web",
        "name": "bench",
        "urls": write_list(job),
        "vocabulary": write_vocabulary(),
        "storage": storage,
        "fetch.allow-networks": "127.0.0.0/8",
        "fetch.per-host": job.per_host,
        "fetch.deadline-seconds": options.timeout,
        "decode.max-side": SIDE,
        "decode.jpeg-quality": QUALITY,
        "rows-per-shard": options.rows_per_shard,
        "crawlers": crawlers,
        "corpus.near-bits": None,  # these images have similar shapes
    }
    command = [sys.executable, "workflows/prepare_pairs.py", *as_flags(flags)]
    env = {**environment(job), "PYTHONPATH": str(options.tree)}
    return measure(command, log=WORK / "ours.log", cwd=options.tree, env=env)


def theirs(job: Job, options: Options) -> Cost:
    """Crawl with img2dataset: its defaults, except one process a core and our shard size."""
    flags = {
        "url_list": write_list(job),
        "input_format": "tsv",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": fresh(WORK / "theirs"),
        "output_format": "webdataset",
        "resize_mode": "keep_ratio_largest",
        "image_size": SIDE,
        "encode_quality": QUALITY,
        "timeout": options.timeout,
        "retries": job.retries,
        "processes_count": os.cpu_count(),
        "number_sample_per_shard": options.rows_per_shard,
    }
    command = [str(PEER / "bin" / "img2dataset"), *as_flags(flags)]
    env = {**environment(job), "NO_ALBUMENTATIONS_UPDATE": "1"}  # otherwise each start checks PyPI for a newer version
    return measure(command, log=WORK / "theirs.log", env=env, cap_gb=CAP_GB)


def kept_by_ours() -> int:
    """Number of rows in the index."""
    folder = WORK / "ours" / "pairs" / "bench" / "index"
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))


def kept_by_theirs() -> int:
    """Number of successes in all shards."""
    reports = (WORK / "theirs").glob("*_stats.json")
    return sum(json.loads(path.read_text())["successes"] for path in reports)


Tool: TypeAlias = tuple[Callable[[Job, Options], Cost], Callable[[], int]]
THEIRS: dict[str, Tool] = {"theirs": (theirs, kept_by_theirs)}
TOOLS: dict[str, Tool] = {"ours": (ours, kept_by_ours), **THEIRS}
CRAWLERS = (1, 2)
FEW = 32
"""URLs of the list that measures start-up."""
ON_RAY: dict[str, Tool] = {f"ray{count}": (partial(ours, crawlers=count), kept_by_ours) for count in CRAWLERS}


def alternate(job: Job, options: Options, tools: Mapping[str, Tool] = TOOLS) -> dict[str, list[Cost]]:
    """Run the tools alternately.

    Raises:
        SystemExit: a tool failed, or kept another number of rows than it should.
    """
    costs = {tool: earlier_costs(job, options, tool) for tool in tools}
    for number in range(options.pairs):
        for tool, (crawl, count) in tools.items():
            cost = crawl(job, options)
            kept = count()
            label = f"{job.name} {number + 1}/{options.pairs} {tool:6}"
            print(
                f"{label} kept {kept:,}, CPU {cost.cpu_seconds:.1f} s = {1e3 * cost.cpu_seconds / max(kept, 1):.2f} ms "
                f"each, wall {cost.wall_seconds:.1f} s, peak {cost.peak_gb:.2f} GB",
                flush=True,
            )
            if cost.exit_code or kept != job.kept:
                raise SystemExit(f"error: {label}: exit code {cost.exit_code}, kept {kept}, expected {job.kept}")
            costs[tool].append(cost)
            with COSTS.open("a") as log:
                log.write(json.dumps({**run_of(job, options), "tool": tool, "cost": asdict(cost)}) + "\n")
    return costs


def run_of(job: Job, options: Options) -> dict[str, object]:
    """The settings that must be equal in runs that are compared."""
    return {
        "list": job.name,
        "urls": len(job.urls),
        "timeout": options.timeout,
        "commit": provenance(options.tree)["commit"],
    }


def earlier_costs(job: Job, options: Options, tool: str) -> list[Cost]:
    """Costs of a tool in earlier calls."""
    runs = [json.loads(line) for line in COSTS.read_text().splitlines()] if COSTS.exists() else []
    wanted = {**run_of(job, options), "tool": tool}
    return [Cost(**run["cost"]) for run in runs if wanted.items() <= run.items()]


def median_of(costs: dict[str, list[Cost]], measured: str) -> dict[str, float]:
    """A tool's median of a field of `Cost`."""
    return {tool: statistics.median(getattr(cost, measured) for cost in runs) for tool, runs in costs.items()}


def ratio(costs: dict[str, list[Cost]], over: str, under: str, measured: str) -> float:
    """Ratio of the medians."""
    medians_of = median_of(costs, measured)
    return medians_of[over] / medians_of[under]


def http(site: Addresses, options: Options) -> dict[str, float]:
    """Valid images over persistent connections; also memory and image similarity."""
    costs = alternate(good_job("http", site.http, options), options)
    return {
        "http_ratio": ratio(costs, "theirs", "ours", "cpu_seconds"),
        "http_wall_ratio": ratio(costs, "theirs", "ours", "wall_seconds"),
        "peak_memory_ratio": ratio(costs, "ours", "theirs", "peak_gb"),
        **medians("http", costs, options.urls),
        **similarity(),
    }


def https(site: Addresses, options: Options) -> dict[str, float]:
    """Valid images over HTTPS, a new connection for each."""
    costs = alternate(good_job("https", site.https, options), options)
    return {
        "https_ratio": ratio(costs, "theirs", "ours", "cpu_seconds"),
        **medians("https", costs, options.urls),
    }


def on_ray(site: Addresses, options: Options, scheme: str) -> dict[str, float]:
    """CPU time with one and with two crawlers on Ray Data, whose processes count.

    What Ray and its workers cost on a list of a few URLs, beyond a crawl of it inside the driver, is their start-up,
    and is subtracted. The list has parts and shards enough for all of them.
    """
    address = site.https if scheme == "https" else site.http
    job = good_job(scheme, address, options)
    costs = alternate(job, options, {**ON_RAY, **THEIRS})
    few = dataclasses.replace(job, name=f"few_{scheme}", urls=job.urls[:FEW], kept=FEW)
    small = dataclasses.replace(options, rows_per_shard=FEW // max(CRAWLERS))
    starts = alternate(few, small, {"ours": TOOLS["ours"], **ON_RAY})
    cpu_of, start_of = median_of(costs, "cpu_seconds"), median_of(starts, "cpu_seconds")
    figures: dict[str, float] = medians(f"ray_{scheme}", costs, options.urls)
    ratios = []
    for tool in ON_RAY:
        figures[f"{tool}_{scheme}_start_cpu_s"] = start_of[tool] - start_of["ours"]
        ratios.append(cpu_of["theirs"] / (cpu_of[tool] - figures[f"{tool}_{scheme}_start_cpu_s"]))
        figures[f"{tool}_{scheme}_ratio"] = ratios[-1]
    return {**figures, f"ray_{scheme}_ratio": min(ratios)}


def hanging(site: Addresses, options: Options, name: str = "hanging", retries: int = 2) -> dict[str, float]:
    """5 % of the hosts never answer; both tools may try a URL three times."""
    hosts = spread([*site.many, *site.hanging])
    silent = set(site.hanging)
    chosen = [hosts[index % len(hosts)] for index in range(options.urls)]
    urls = [picture_url("http", address, index) for index, address in enumerate(chosen)]
    good = sum(address not in silent for address in chosen)
    costs = alternate(Job(name=name, urls=urls, kept=good, per_host=16, retries=retries), options)
    return {f"{name}_hosts_ratio": ratio(costs, "theirs", "ours", "wall_seconds"), **medians(name, costs, good)}


def hanging_once(site: Addresses, options: Options) -> dict[str, float]:
    """The same with img2dataset's default, which tries each URL once."""
    return hanging(site, options, "hanging_once", retries=0)


def hostile(site: Addresses, options: Options) -> dict[str, float]:
    """Peak memory when most bodies are hostile; img2dataset has no limits, so it is stopped at a cap."""
    kinds = [kind for kind in HOSTILE for _ in range(8)]
    urls = [f"http://{site.http[0]}:{site.http[1]}/{kind}/{index}.jpg" for index, kind in enumerate(kinds)]
    urls += [picture_url("http", site.http, index) for index in range(len(urls), 100)]
    job = Job(name="hostile", urls=urls, kept=100 - len(kinds), per_host=100)
    figures = {}
    for tool, (crawl, count) in TOOLS.items():
        cost, kept = crawl(job, options), count()
        print(
            f"hostile {tool:6} kept {kept} of {job.kept} valid rows, wall {cost.wall_seconds:.1f} s, "
            f"peak {cost.peak_gb:.2f} GB, exit code {cost.exit_code}",
            flush=True,
        )
        if tool == "ours" and (cost.exit_code or kept != job.kept):
            raise SystemExit(f"error: hostile ours: exit code {cost.exit_code}, kept {kept}, expected {job.kept}")
        if tool == "ours":
            check_reasons()
        figures["hostile_peak_gb" if tool == "ours" else "hostile_peak_gb_theirs"] = cost.peak_gb
    return figures


def check_reasons() -> None:
    """Check that every hostile body is rejected, each kind for its own reason.

    Raises:
        SystemExit: one is not.
    """
    found: dict[str, set[str]] = {}
    for path in (WORK / "ours" / "rejects" / "bench").glob("*.parquet"):
        for row in pq.read_table(path, columns=["url", "reason"]).to_pylist():
            found.setdefault(row["url"].split("/")[3], set()).add(row["reason"])
    expected = {kind: {reason} for kind, reason in HOSTILE.items()}
    if found != expected:
        raise SystemExit(f"error: hostile ours: rejected for {found}, expected {expected}")


def index_rows(site: Addresses, options: Options) -> dict[str, float]:
    """Filters and exact and perceptual dedup over 10^5 and 10^6 rows: rows/s, and peak memory of each size."""
    figures: dict[str, float] = {}
    for count in (100_000, 1_000_000):
        runs = []
        for _ in range(options.pairs):
            command = [sys.executable, "benchmarks/pairs_index.py", str(count)]
            env = {**os.environ, "PYTHONPATH": str(options.tree)}
            ran = subprocess.run(command, cwd=options.tree, check=True, capture_output=True, env=env)
            runs.append(json.loads(ran.stdout))
        figures["index_rows_per_second"] = statistics.median(run["rows_per_second"] for run in runs)
        figures[f"index_peak_gb_{count:.0e}".replace("e+0", "e")] = statistics.median(run["peak_gb"] for run in runs)
    return figures


PARTS: dict[str, Callable[[Addresses, Options], dict[str, float]]] = {
    "http": http,
    "https": https,
    "ray_http": partial(on_ray, scheme="http"),
    "ray_https": partial(on_ray, scheme="https"),
    "hanging": hanging,
    "hanging_once": hanging_once,
    "hostile": hostile,
    "index": index_rows,
}


def good_job(scheme: str, address: tuple[str, int], options: Options) -> Job:
    urls = [picture_url(scheme, address, index) for index in range(options.urls)]
    return Job(name=scheme, urls=urls, kept=options.urls, per_host=128, secure=scheme == "https")


def picture_url(scheme: str, address: tuple[str, int], index: int) -> str:
    return f"{scheme}://{address[0]}:{address[1]}/images/{index}.jpg"


def spread(addresses: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The addresses in an order that separates neighbours."""
    return [addresses[index * 149 % len(addresses)] for index in range(len(addresses))]


def medians(name: str, costs: dict[str, list[Cost]], images: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    figures[f"{name}_pairs"] = min(map(len, costs.values()))
    for tool, runs in costs.items():
        figures[f"{name}_{tool}_cpu_ms"] = 1e3 * statistics.median(cost.cpu_seconds for cost in runs) / images
        figures[f"{name}_{tool}_wall_s"] = statistics.median(cost.wall_seconds for cost in runs)
        figures[f"{name}_{tool}_peak_gb"] = statistics.median(cost.peak_gb for cost in runs)
    return figures


def similarity() -> dict[str, float]:
    """SSIM between the last two outputs, and between ours and a full decode."""
    command = [str(PEER / "bin" / "python"), "-c", "import pairs_similarity; pairs_similarity.main()"]
    folders = [WORK / "ours", WORK / "theirs", WORK / "site" / "pictures"]
    command += [*map(str, folders), str(COMPARED)]
    ran = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True)
    figures: dict[str, float] = json.loads(ran.stdout)
    return figures


def write_list(job: Job) -> Path:
    path = WORK / f"{job.name}.tsv"
    lines = (f"{url}\ta photo of scene {index}\n" for index, url in enumerate(job.urls))
    path.write_text("url\tcaption\n" + "".join(lines))
    return path


def write_vocabulary() -> Path:
    path = WORK / "vocabulary.txt"
    path.write_text("scene\n")
    return path


def environment(job: Job) -> dict[str, str]:
    trusted = {"SSL_CERT_FILE": str(WORK / "site" / "bundle.pem")} if job.secure else {}
    # With Ray's default niceness of 15 its processes would wait for other programs, and img2dataset's would not.
    return {**os.environ, **trusted, "RAY_worker_niceness": "0"}


def as_flags(flags: dict[str, object]) -> list[str]:
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def install_peer() -> None:
    """Create the virtual environment of img2dataset, once."""
    if not (PEER / ".installed").exists():
        print(f"installing {', '.join(PACKAGES)} into {PEER}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", PEER], check=True)
        subprocess.run([PEER / "bin" / "pip", "install", "--quiet", *PACKAGES], check=True)
        (PEER / ".installed").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare prepare_pairs with img2dataset.")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="parts to run")
    parser.add_argument("--urls", type=int, default=10_000, help="URLs of each list")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each tool")
    parser.add_argument("--rows-per-shard", type=int, default=1000, help="for both")
    parser.add_argument("--timeout", type=int, default=10, help="seconds, for both; use more on a busy machine")
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="checkout whose workflow is timed")
    options = Options(**vars(parser.parse_args()))
    install_peer()
    make_pictures(WORK / "site" / "pictures", max(options.urls, 100))
    make_certificates(WORK / "site")
    figures: dict[str, float] = {}
    with serve_site(WORK / "site", HOSTS - HANGING, HANGING) as site:
        for part in options.only:
            part_figures = PARTS[part](site, options)
            update_figures("pairs", part_figures, options.tree)
            figures.update(part_figures)
    for name, value in figures.items():
        print(f"{name:28} {value:10.3f}")


if __name__ == "__main__":
    main()

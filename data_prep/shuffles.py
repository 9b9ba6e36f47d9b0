"""Ray Data's hash shuffle: the rows of many files, brought together by a partition number.

rows = map_files({"new": files}, read)           # read(name, some of the files) yields rows with `partition`
for found in shuffle(rows, answer, partitions):  # answer(all rows of a partition) returns a table
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TypeAlias

import pyarrow as pa
import pyarrow.dataset as ds
import ray.data
from pyarrow import fs
from ray.data.context import ShuffleStrategy

PARTITION = "partition"
"""Column of int64 with the number of a row's partition."""
Reader: TypeAlias = Callable[[str, ds.Dataset], Iterable[pa.Table]]


def map_files(inputs: Mapping[str, ds.FileSystemDataset], read: Reader, *, tasks: int) -> ray.data.Dataset:
    """What `read` yields, at least one table, for a name and some of the input's files in each of at least `tasks`."""
    opening = {name: (dataset.schema, dataset.filesystem) for name, dataset in inputs.items()}
    items = []
    for name, dataset in inputs.items():
        size = max(1, -(-len(dataset.files) // tasks))
        items += [
            {"name": name, "files": dataset.files[start : start + size]} for start in range(0, len(dataset.files), size)
        ]
    files = ray.data.from_items(items, override_num_blocks=max(1, len(items)))
    return files.map_batches(partial(_read_files, opening, read), batch_size=1, batch_format="pyarrow")


def _read_files(
    opening: Mapping[str, tuple[pa.Schema, fs.FileSystem]], read: Reader, items: pa.Table
) -> Iterator[pa.Table]:
    for item in items.to_pylist():
        schema, filesystem = opening[item["name"]]
        dataset = ds.dataset(item["files"], schema=schema, format="parquet", filesystem=filesystem)
        yield from read(item["name"], dataset)


def shuffle(rows: ray.data.Dataset, answer: Callable[[pa.Table], pa.Table], partitions: int) -> Iterator[pa.Table]:
    """The answers for all rows of each partition, in any order."""
    rows.context.shuffle_strategy = ShuffleStrategy.HASH_SHUFFLE
    answers = rows.groupby(PARTITION, num_partitions=partitions).map_groups(answer, batch_format="pyarrow")
    found: pa.Table
    for found in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
        if found.num_rows:
            yield found

"""The input rows of a crawl as a source of Ray Data: every part is a block."""

from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from data_prep import inputs
from data_prep.dedup import Order, is_among


class Parts(Datasource):
    """Rows of the staged lists with the name of their `part`, without those whose URL came before."""

    def __init__(self, staging: str, parts: pa.Table, order: Order, repeated: npt.NDArray[np.int64]) -> None:
        """Take which parts are to be read.

        Args:
            staging: folder of the work.
            parts: `part`, `partition` and `number` of each.
            order: of the rows.
            repeated: ids of rows that are left out, ascending.
        """
        self.count = parts.num_rows
        # By reference, since every task would carry them.
        self.read = partial(read_part, ray.put(parts), ray.put(repeated), staging, order)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """A task a part, however many are asked for."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(partial(self.read, number), unknown) for number in range(self.count)]


def read_part(
    parts: ray.ObjectRef[pa.Table],
    repeated: ray.ObjectRef[npt.NDArray[np.int64]],
    staging: str,
    order: Order,
    number: int,
) -> list[pa.Table]:
    """The rows of one part."""
    part = ray.get(parts).slice(number, 1).to_pylist()[0]
    rows = inputs.read_part(staging, part["partition"], part["number"])
    ids = order.ids(rows["source"][0].as_py(), rows["row"].to_numpy())
    rows = rows.filter(pa.array(~is_among(ids, ray.get(repeated))))
    return [rows.append_column("part", pa.array([part["part"]] * rows.num_rows, pa.string()))]

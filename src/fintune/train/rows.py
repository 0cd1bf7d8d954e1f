"""Prepared rows as a torch data set, read straight from the columns of a parquet file."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fintune.errors import DataError

Row = dict[str, NDArray[np.int32]]


class Rows(Dataset[Row]):
    """Token ids and labels of a split; the arrays stay in arrow's buffers, nothing is copied.

    Attributes:
        ids: example ids, in file order.
        lengths: tokens of every example, int64, shape (examples,).
    """

    def __init__(self, table: pa.Table) -> None:
        self.ids: list[str] = table["example_id"].to_pylist()
        self.lengths: NDArray[np.int64] = table["length"].to_numpy().astype(np.int64)
        self._columns = {
            name: table[name].combine_chunks() if table.num_rows else None
            for name in ("input_ids", "labels")
        }

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Row:
        return {name: _values(column, index) for name, column in self._columns.items()}


def read_train(data_dir: Path) -> Rows:
    """The training rows."""
    return Rows(_read(data_dir / "train.parquet"))


def read_validation(data_dir: Path, most: int) -> Rows:
    """The validation rows, which choose the checkpoint: at most `most`, the first by example id.

    Example ids are hashes, so the first ones are a random sample, and the same one each time.
    """
    table = _read(data_dir / "validation.parquet").sort_by("example_id")
    if table.num_rows == 0:
        raise DataError(
            f"{data_dir / 'validation.parquet'} has no row",
            why="without one, no evaluation can choose the best adapter",
            fix="raise data.validation_share or give more rows, and run: fintune prepare --fresh",
        )
    return Rows(table.slice(0, most))


def _read(path: Path) -> pa.Table:
    return pq.read_table(path, columns=["example_id", "input_ids", "labels", "length"])


def _values(column: Any, index: int) -> NDArray[np.int32]:
    offsets = column.offsets
    start, end = offsets[index].as_py(), offsets[index + 1].as_py()
    own = column.values.slice(start, end - start)
    values: NDArray[np.int32] = own.to_numpy(zero_copy_only=True)
    return values

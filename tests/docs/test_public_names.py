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


def test_what_is_imported_from_a_package_on_demand_is_listed_for_type_checkers() -> None:
    for package in PACKAGES[:3]:
        module = import_module(package)
        assert set(module._MODULES) == set(module.__all__) - TEXT_ONLY

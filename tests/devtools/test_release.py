"""What is released: one version, its changes written down, and packages that hold what they should."""

import tarfile
import zipfile
from pathlib import Path

import pytest

import gradcam_worker
from devtools import release

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> release.Built:
    """The wheel and the sdist of this tree."""
    return release.build(ROOT, tmp_path_factory.mktemp("dist"))


def test_the_version_stands_in_one_place_and_its_changes_are_written_down() -> None:
    version = gradcam_worker.__version__
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert f'"{version}"' not in project
    assert release.changes(version).startswith(f"## {version}")


def test_a_version_without_changes_or_a_date_is_not_released() -> None:
    with pytest.raises(release.NotReady, match="nothing about 99"):
        release.changes("99.0.0")
    with pytest.raises(release.NotReady, match="should end in a date"):
        release.require_date("## 1.0.0, unreleased\n* All is new.")
    release.require_date("## 1.0.0, 2031-05-06\n* All is new.")


def test_wheel_and_sdist_hold_what_they_should_and_nothing_else(built: release.Built) -> None:
    release.inspect_archives(built)
    with zipfile.ZipFile(built.wheel) as wheel:
        names = wheel.namelist()
    assert {
        "gradcam_worker/py.typed",
        "gradcam_worker/gradcam/data/efficientnet_lite0.weights.h5",
    } <= set(names)
    assert not [one for one in names if "test" in Path(one).name and one != "gradcam_worker/testing.py"]


def test_a_wheel_that_lacks_a_file_or_holds_another_is_found_out(
    built: release.Built, tmp_path: Path
) -> None:
    broken = tmp_path / built.wheel.name
    with zipfile.ZipFile(built.wheel) as whole, zipfile.ZipFile(broken, "w") as copy:
        for name in whole.namelist():
            if name not in {"gradcam_worker/gradcam/data/NOTICE", "gradcam_worker/py.typed"}:
                copy.writestr(name, whole.read(name))
        copy.writestr("tests/conftest.py", "")
    assert release.wheel_findings(broken) == [
        "the wheel lacks gradcam_worker/gradcam/data/NOTICE",
        "the wheel lacks gradcam_worker/py.typed",
        "the wheel should not hold tests/conftest.py",
    ]


def test_the_same_wheel_comes_out_of_the_sdist(built: release.Built) -> None:
    release.require_reproducible(built)
    with tarfile.open(built.sdist) as archive:
        assert f"gradcam_worker-{gradcam_worker.__version__}/scripts/release" in archive.getnames()

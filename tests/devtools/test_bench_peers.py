import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devtools import ROOT, SCRIPTS
from devtools.bench import peers
from devtools.bench.peer_libraries import OURS, Floats, Ids, in_pairs, spread
from devtools.bench.peers import PEERS, PINS, Failed, blocks, compare, install, pinned, requirements
from devtools.bench.report import NothingToMeasure

LIBRARIES = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import numpy as np
from devtools.bench.peer_libraries import serve

def explain(images, class_ids):
    maps = images.mean(axis=3)[:, np.newaxis] * (1 + class_ids[..., np.newaxis, np.newaxis])
    return maps - maps.min(axis=(2, 3), keepdims=True)

def same_size(maps):
    return maps

def ours(network, folder):
    np.save(folder / "images.npy", np.arange(8 * 12, dtype=np.float32).reshape(8, 2, 2, 3))
    np.save(folder / "class_ids.npy", np.tile(np.arange(8), (8, 1)))
    return explain, same_size

def twin(network, folder):
    def larger(images, class_ids):
        time.sleep(0.02)
        print("what a library prints is no answer")
        return np.kron(3 * explain(images, class_ids) + 1, np.ones((2, 2)))

    return larger, lambda maps: np.kron(maps, np.ones((2, 2)))

def stranger(network, folder):
    return lambda images, class_ids: -explain(images, class_ids), same_size

def broken(network, folder):
    raise ImportError("no such layer")

def faint(network, folder):
    def fails(images, class_ids):
        if len(images) > 1:
            raise MemoryError("too many")
        return explain(images, class_ids)

    return fails, same_size

def dead(network, folder):
    def ends(images, class_ids):
        sys.stderr.write("fell over\\n")
        sys.stderr.flush()
        os._exit(7)

    return ends, same_size

serve({{library.__name__: library for library in (ours, twin, stranger, broken, faint, dead)}})
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Libraries that are ours in all but name, or not."""
    program = tmp_path_factory.mktemp("libraries") / "libraries.py"
    program.write_text(LIBRARIES.format(scripts=str(SCRIPTS)))
    names = (OURS, "twin", "stranger", "broken", "faint", "dead")
    return {name: [sys.executable, str(program), name] for name in names}


@pytest.fixture(scope="module")
def figures(commands: dict[str, list[str]]) -> dict[str, Any]:
    return compare("vgg16", commands, (1, 8), 2)


def test_a_library_whose_maps_are_ours_is_compared_however_large_and_scaled_they_are(
    figures: dict[str, Any],
) -> None:
    assert figures["agreement"]["twin"] == {"difference": pytest.approx(0, abs=1e-6), "lit": 8}
    assert set(figures["times_peer"]["8"]) == {"twin"}
    assert figures["times_peer"]["8"]["twin"]["wall"] > 1
    assert all(set(by) >= {OURS, "twin"} for by in figures["images_per_s"].values())


def test_a_library_whose_maps_are_not_ours_is_not_comparable(figures: dict[str, Any]) -> None:
    assert figures["agreement"]["stranger"]["difference"] == pytest.approx(1)
    assert figures["not_comparable"] == ["stranger"]


def test_a_library_that_fails_is_named_with_its_reason_and_the_others_go_on(figures: dict[str, Any]) -> None:
    assert figures["failed"] == {
        "broken": "ImportError: no such layer",
        "faint": "MemoryError: too many",
        "dead": "ended with 7: fell over",
    }
    of_a_network = {name: {"vgg16": value} for name, value in figures.items()}
    text = "\n".join(blocks(of_a_network))
    assert "broken does not run here, with vgg16: ImportError: no such layer." in text
    assert "stranger gives other maps than ours, with vgg16: not compared." in text


def test_without_ours_there_is_nothing_to_compare(commands: dict[str, list[str]]) -> None:
    with pytest.raises(Failed, match="no such layer"):
        compare("vgg16", {OURS: commands["broken"], "twin": commands["twin"]}, (1,), 1)


@pytest.mark.parametrize(
    ("ratios", "met"),
    [({"twin": 1.2, "other": 9.0}, True), ({"twin": 0.9, "other": 9.0}, False), ({}, False)],
    ids=["ahead", "behind once", "nothing was compared"],
)
def test_who_is_behind_once_is_behind(ratios: dict[str, float], *, met: bool) -> None:
    both = {name: {"wall": 9.0, "cpu": ratio} for name, ratio in ratios.items()}
    (required,) = requirements({"times_peer": {"vgg16": {"8": both}}})
    assert required.met == met


def test_pairs_come_back_where_they_belong() -> None:
    images = np.arange(3 * 12, dtype=np.float32).reshape(3, 2, 2, 3)
    class_ids = np.array([[1, 5, 2], [7, 0, 3], [4, 4, 6]])
    seen: list[int] = []

    def explain(some: Floats, ids: Ids) -> Any:
        seen.append(len(some))
        return some[..., 0] * 100 + ids[:, np.newaxis, np.newaxis]

    maps = in_pairs(explain)(images, class_ids)
    assert seen == [8, 1]
    assert np.array_equal(maps, images[:, np.newaxis, ..., 0] * 100 + class_ids[..., np.newaxis, np.newaxis])


def test_a_map_without_differences_is_spread_to_zeros() -> None:
    maps = np.array([[[3, 3], [3, 3]], [[1, 2], [3, 5]]], np.float32)
    assert spread(maps).tolist() == [[[0, 0], [0, 0]], [[0, 0.25], [0.5, 1]]]


def test_every_library_is_pinned_and_stands_on_what_ours_stands_on() -> None:
    pins = pinned()
    assert set(PEERS) <= set(pins)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("keras", "tensorflow", "numpy"):
        assert f"{name}=={pins[name]} " in constraints, f"{name} is another in {PINS.name}"


def wheel(folder: Path, name: str, version: str) -> None:
    """A package that pip can install, with nothing in it."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


def test_libraries_that_cannot_be_installed_are_not_measured_and_pip_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, pins = tmp_path / "shelf", tmp_path / "peers.txt"
    cache.mkdir()
    wheel(cache, "torch", "2.13.0")
    pins.write_text("# what is measured\ntorchcam==0.5.0\n\ntorch==2.13.0\n")
    monkeypatch.setattr(peers, "PINS", pins)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(NothingToMeasure, match=r"torchcam==0\.5\.0"):
        install(tmp_path / "venv")
    wheel(cache, "torchcam", "0.5.0")
    assert install(tmp_path / "venv").is_file()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # and is not asked again
    assert install(tmp_path / "venv").is_file()

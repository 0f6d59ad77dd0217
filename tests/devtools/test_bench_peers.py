import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devtools.bench import peer_environment, peers
from devtools.bench.peer_environment import PINS, Environment
from devtools.bench.peer_process import Failed
from devtools.bench.peer_serve import Floats, Ids, in_pairs, spread
from devtools.bench.peers import OURS, Result, document, measure, table, verdict
from devtools.bench.timing import Cost

SCRIPTS = Path(peers.__file__).parents[2]
LIBRARIES = """
import sys, time
sys.path.insert(0, {programs!r})
import numpy as np
from devtools.bench.peer_serve import serve

class Ours:
    def __init__(self, work):
        if not (work.folder / "images.npy").exists():
            np.save(work.folder / "images.npy", np.arange(8 * 12, dtype=np.float32).reshape(8, 2, 2, 3))
            np.save(work.folder / "class_ids.npy", np.tile(np.arange(8), (8, 1)))

    def explain(self, images, class_ids):
        maps = images.mean(axis=3)[:, np.newaxis] * (1 + class_ids[..., np.newaxis, np.newaxis])
        return maps - maps.min(axis=(2, 3), keepdims=True)

    def enlarged(self, maps):
        return maps

class Twin(Ours):
    def explain(self, images, class_ids):
        time.sleep(0.02)
        print("what a library prints is no answer")
        return np.kron(3 * super().explain(images, class_ids) + 1, np.ones((2, 2)))

    def enlarged(self, maps):
        return np.kron(maps, np.ones((2, 2)))

class Stranger(Ours):
    def explain(self, images, class_ids):
        return -super().explain(images, class_ids)

class Broken(Ours):
    def __init__(self, work):
        raise ImportError("no such layer")

class Faint(Ours):
    def explain(self, images, class_ids):
        if len(images) > 1:
            raise MemoryError("too many")
        return super().explain(images, class_ids)

class Dead(Ours):
    def explain(self, images, class_ids):
        sys.stderr.write("fell over\\n")
        sys.stderr.flush()
        import os
        os._exit(7)

serve({{one.__name__.lower(): one for one in (Ours, Twin, Stranger, Broken, Faint, Dead)}})
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Libraries that are ours in all but name, or not."""
    program = tmp_path_factory.mktemp("libraries") / "libraries.py"
    program.write_text(LIBRARIES.format(programs=str(SCRIPTS)))
    names = (OURS, "twin", "stranger", "broken", "faint", "dead")
    return {name: [sys.executable, str(program), name] for name in names}


@pytest.fixture(scope="module")
def result(commands: dict[str, list[str]]) -> Result:
    return measure("vgg16", commands, (1, 8), 2)


def test_a_library_whose_maps_are_ours_is_compared_however_large_and_scaled_they_are(result: Result) -> None:
    assert result.agreement["twin"] == {"difference": pytest.approx(0, abs=1e-6), "compared": 64, "lit": 64}
    assert result.comparable == ["twin"]
    assert result.ahead("twin", 8)["wall"] > 1
    assert set(result.costs) >= {(name, batch) for name in (OURS, "twin") for batch in (1, 8)}


def test_a_library_whose_maps_are_not_ours_is_not_comparable(result: Result) -> None:
    assert result.agreement["stranger"]["difference"] == pytest.approx(1)
    found = document([result], {})
    assert found["not_comparable"] == {"vgg16": ["stranger"]}
    assert set(found["times_peer"]["vgg16"]["8"]) == {"twin"}


def test_a_library_that_fails_is_named_with_its_reason_and_the_others_go_on(result: Result) -> None:
    assert result.failed == {
        "broken": "ImportError: no such layer",
        "faint": "MemoryError: too many",
        "dead": "ended with 7: fell over",
    }
    lines = "\n".join(verdict([result], {"captum": "No matching distribution found"}))
    for said in ("broken", "no such layer", "DOES NOT RUN HERE", "captum", "DOES NOT INSTALL HERE"):
        assert said in lines
    assert "NOT COMPARABLE" in next(line for line in lines.splitlines() if "stranger" in line)
    assert "twin" in "\n".join(table(result))


def test_without_ours_there_is_nothing_to_compare(commands: dict[str, list[str]]) -> None:
    with pytest.raises(Failed, match="no such layer"):
        measure("vgg16", {OURS: commands["broken"], "twin": commands["twin"]}, (1,), 1)


def test_who_is_behind_once_is_behind() -> None:
    result = Result("vgg16")
    for name, batch, seconds in ((OURS, 1, 1.0), ("twin", 1, 2.0), (OURS, 8, 8.0), ("twin", 8, 7.0)):
        result.costs[name, batch] = Cost(name, batch, 1, seconds, seconds)
    result.agreement["twin"] = {"difference": 1e-6, "compared": 8, "lit": 8}
    assert not result.passed()
    assert any("MISSED" in line for line in verdict([result], {}))
    result.costs["twin", 8] = Cost("twin", 8, 1, 9.0, 9.0)
    assert result.passed()
    assert not Result("vgg16").passed()  # nothing was compared


def test_pairs_come_back_where_they_belong() -> None:
    images = np.arange(3 * 12, dtype=np.float32).reshape(3, 2, 2, 3)
    class_ids = np.array([[1, 5, 2], [7, 0, 3], [4, 4, 6]])
    seen: list[int] = []

    def explain(some: Floats, ids: Ids) -> Any:
        seen.append(len(some))
        return some[..., 0] * 100 + ids[:, np.newaxis, np.newaxis]

    maps = in_pairs(explain, images, class_ids)
    assert seen == [8, 1]
    assert np.array_equal(maps, images[:, np.newaxis, ..., 0] * 100 + class_ids[..., np.newaxis, np.newaxis])


def test_a_map_without_differences_is_spread_to_zeros() -> None:
    maps = np.array([[[3, 3], [3, 3]], [[1, 2], [3, 5]]], np.float32)
    assert spread(maps).tolist() == [[[0, 0], [0, 0]], [[0, 0.25], [0.5, 1]]]


def test_every_library_is_pinned_and_stands_on_what_ours_stands_on() -> None:
    pins = Environment(Path("nowhere"), tuple(peers.PEERS)).pins
    assert set(peers.PEERS) <= set(pins)
    assert all(pin.startswith(f"{name}==") for name, pin in pins.items())
    constraints = (SCRIPTS.parent / "constraints.txt").read_text(encoding="utf-8")
    for name in ("keras", "tensorflow", "numpy"):
        assert f"{pins[name]} " in constraints, f"{name} is another in {PINS.name}"


def test_the_environment_lies_where_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BENCH_PEERS", raising=False)
    assert Environment.of_user(()).folder == tmp_path / "gradcam-worker" / "peers"
    monkeypatch.setenv("BENCH_PEERS", str(tmp_path / "mine"))
    assert Environment.of_user(()).folder == tmp_path / "mine"


def wheel(folder: Path, name: str, version: str) -> None:
    """A package that pip can install, with nothing in it."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


def test_a_library_that_cannot_be_installed_is_named_with_pips_reason_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, pins = tmp_path / "shelf", tmp_path / "peers.txt"
    cache.mkdir()
    wheel(cache, "torch", "2.13.0")
    wheel(cache, "captum", "0.9.0")
    pins.write_text("# what is measured\ncaptum==0.9.0\ntorchcam==0.5.0\n\ntorch==2.13.0\n")
    monkeypatch.setattr(peer_environment, "PINS", pins)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    environment = Environment(tmp_path / "venv", ("captum", "torchcam"))
    found = environment.make()
    assert list(found) == ["torchcam"]
    assert "torchcam==0.5.0" in found["torchcam"]
    wheel(cache, "torchcam", "0.5.0")
    assert environment.make() == {}
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # and is not asked again
    assert environment.make() == {}

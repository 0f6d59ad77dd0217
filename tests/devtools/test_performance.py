import copy
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from devtools.docs import performance
from devtools.docs.performance_figures import Hole, plain, table

DOCS = Path(__file__).parents[2] / "docs" / "explanation"
RAN: dict[str, Any] = {
    "machine": {"cpu_count": 2, "cpu_model": "a processor", "device": "cpu", "load_before": 0.1},
    "versions": {"python": "3.11.7", "keras": "3.15.1"},
    "took_s": 60.0,
}


def each(names: Iterable[str], found: Any) -> dict[str, Any]:
    return {name: copy.deepcopy(found) for name in names}


def shares(by_batch: dict[str, tuple[float, float, float]]) -> dict[str, dict[str, float]]:
    return {batch: dict(zip(("1", "8", "50"), found, strict=True)) for batch, found in by_batch.items()}


def engine() -> dict[str, Any]:
    ours = shares({"1": (0.98, 0.96, 0.94), "8": (0.99, 0.97, 0.95), "32": (1.0, 0.99, 0.97)})
    back = shares({"1": (0.9, 0.7, 0.3), "8": (0.95, 0.8, 0.5)})
    tail = shares({"1": (0.8, 0.6, 0.2), "8": (0.85, 0.7, 0.3)})
    took = {"wall": 0.2, "cpu": 0.3, "repeats": 5}
    both = ("vgg16", "xception")
    return {
        "share_of_forward": each(both, ours),
        "share_of_forward_exact_backward": each(both, back),
        "share_of_forward_repeated_tail": each(both, tail),
        "share_of_forward_by_method": each(both, {"gradcam": 0.97, "eigencam": 0.5}),
        "times_notebook": {"vgg16": 31.0, "xception": 44.0},
        "times_notebook_cpu": {"vgg16": 30.0, "xception": 40.0},
        "precision": {"vgg16": {"bfloat16": {"speed": 0.3, "speed_cpu": 0.31, "difference": 0.02}}},
        "seconds": each(both, {"forward": {"1": took}, "ours, top 8": {"1": took}}),
        "required": {
            "vgg16": {"times notebook": 28.0, "share of forward, batch 8, top 8": 0.98},
            "xception": {},
        },
        **RAN,
    }


def peers() -> dict[str, Any]:
    ahead = {"torchcam": {"wall": 1.3, "cpu": 1.2}, "captum": {"wall": 11.0, "cpu": 12.0}}
    speeds = {"ours": 10.0, "torchcam": 7.0, "captum": 0.9}
    same = {"difference": 2e-6, "compared": 8, "lit": 8}
    return {
        "times_peer": {"vgg16": {"1": ahead, "8": ahead}},
        "images_per_s": {"vgg16": {"1": speeds, "8": speeds}},
        "agreement": {"vgg16": {"torchcam": same, "captum": same}},
        "not_comparable": {"vgg16": []},
        "failed": {"vgg16": {"grad-cam": "it fell"}},
        "not_installed": {"xplique": "No matching distribution found"},
        **RAN,
    }


def host() -> dict[str, Any]:
    took = {"floor": {"cpu": 0.002, "wall": 0.002}, "ours": {"cpu": 0.003, "wall": 0.003}}
    sizes = ("500x375", "4000x3000")
    return {
        "times_floor": each(sizes, {"1": 1.5, "3": 1.6}),
        "seconds": each(sizes, {"1": took, "3": took}),
        "stages": each(sizes, {"decode": 0.001}),
        "encoders": each(sizes, {"jpeg": {"cpu": 0.0004, "kilobytes": 52.0}}),
        "default_top": 3,
        "required_times_floor": 2.0,
        **RAN,
    }


def service() -> dict[str, Any]:
    networks = ("no_time", "gpu_time", "efficientnet_lite0", "xception", "vgg16")
    stages = {"fetch_s": 0.01, "decode_s": 0.02, "load_s": 0.0, "batch_wait_s": 0.02, "explain_s": 0.1}
    stages |= {"render_s": 0.01, "upload_s": 0.02, "queue_s": 1.0, "batch_size": 6.0}
    return {
        "share_of_engine": each(networks, 0.85),
        "ceiling_jobs_per_s": 120.0,
        "jobs_per_s": each(networks, 20.0),
        "engine_images_per_s": each(networks, 23.0),
        "device_idle": each(networks, 0.07),
        "stage_seconds": each(networks, stages),
        "passes": each(networks, {"4": 1, "8": 3}),
        "cpu_ms_per_job": each(networks, {"worker": 60.0, "s3": 3.0}),
        "bottleneck": each(networks, "the device"),
        "required_share": {"xception": 0.8, "vgg16": 0.9},
        "required_idle": 0.1,
        **RAN,
    }


def latency() -> dict[str, Any]:
    both = ("alone", "busy")
    percents = {"50": 0.02, "99": 0.05}
    return {
        "network": "efficientnet_lite0",
        "overhead_s": each(both, percents),
        "explain_s": each(both, percents),
        "parts_s": each(both, {"submit": percents, "batch_wait": percents}),
        "batch_wait_s": 0.0002,
        "bulk_jobs_per_s": 30.0,
        "required_overhead_s": 0.06,
        "required_batch_wait_s": 0.001,
        **RAN,
    }


def memory() -> dict[str, Any]:
    return {
        "growth": 0.012,
        "device_growth": None,
        "jobs": {"default": 9000, "large": 100},
        "jobs_per_s": 50.0,
        "resident_mb": [{"second": 0.0, "mb": 900.0}, {"second": 120.0, "mb": 950.0}],
        "resident_peak_mb": 990.0,
        "required_growth": 0.05,
        **RAN,
    }


def threads() -> dict[str, Any]:
    row = {"network": "xception", "batch": 8, "jobs": 4, "opencv": 1, "inter_op": 1, "images_per_s": 15.0}
    return {
        "rows": [{**row, "intra_op": 1}, {**row, "intra_op": 2}],
        "best": {"jobs": 4, "intra_op": 2, "inter_op": 1},
        **RAN,
    }


def backfill() -> dict[str, Any]:
    ran = {"rows": 10, "seconds": 1.0, "submitter_mb": 90.0, "redis_mb": 1.5, "rows_per_s": 9000.0}
    return {
        "network": "xception",
        "batch": 8,
        "share_of_engine": 0.95,
        "share_of_engine_cpu": 0.96,
        **{f"{name}_images_per_s": 15.0 for name in ("engine", "shard", "job")},
        "linear": 0.97,
        "tracking": {"10000": ran, "1000000": ran},
        "rows_lost": 0,
        "rows_doubled": 0,
        "kills": {"rows": 20_000, "kills": 10},
        **{f"interactive_p{percent}_ms": {"idle": 60.0, "loaded": 300.0} for percent in (50, 95)},
        "required_share": 0.9,
        "required_linear": 0.8,
        **RAN,
    }


def gpu() -> dict[str, Any]:
    return {"device": "an accelerator", "backend": "keras 3", "engine": engine(), "service": service()}


MADE: dict[str, Callable[[], dict[str, Any]]] = {
    one.__name__: one for one in (engine, peers, host, service, latency, memory, threads, backfill, gpu)
}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder as docs/ is, with the documents of every bench."""
    (tmp_path / "performance").mkdir()
    for name, made in MADE.items():
        (tmp_path / "performance" / f"{name}.json").write_text(json.dumps(made()))
    return tmp_path


def test_the_committed_page_is_what_the_committed_documents_say(tmp_path: Path) -> None:
    folder = tmp_path / "performance"
    folder.mkdir()
    for path in (DOCS / "performance").glob("*.*"):
        if path.suffix in {".json", ".md"}:
            (folder / path.name).write_bytes(path.read_bytes())
    performance.write(tmp_path)
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    assert page == (tmp_path / "performance.md").read_text(encoding="utf-8"), "run scripts/performance"
    for plot in re.findall(r"\]\((performance/[^)]+)\)", page):
        assert (DOCS / plot).is_file()


def test_every_bench_has_its_figures_and_its_plots_on_the_page(docs: Path) -> None:
    performance.write(docs)
    page = (docs / "performance.md").read_text(encoding="utf-8")
    assert "has not been run" not in page
    plots = re.findall(r"\]\((performance/[^)]+)\)", page)
    assert len(plots) == 4
    assert all((docs / plot).read_text(encoding="utf-8").startswith("<?xml") for plot in plots)
    for said in (
        "| vgg16 | ours | 8 | 0.99 | 0.97 | 0.95 |",
        "xplique cannot be installed here",
        "9,100 jobs",
    ):
        assert said in page


def test_what_is_missed_is_called_missed(docs: Path) -> None:
    performance.write(docs)
    lines = (docs / "performance.md").read_text(encoding="utf-8").splitlines()
    missed = [line for line in lines if line.endswith("| **missed** |")]
    assert len(missed) == 2
    assert "vgg16: share of forward, batch 8, top 8 | at least 0.98 | 0.97" in missed[0]
    assert "vgg16: jobs/s, as a share of the engine alone | at least 0.90 | 0.85" in missed[1]
    assert any("captum" not in line and "closest: torchcam" in line and "| met |" in line for line in lines)


def test_the_same_documents_give_the_same_bytes(docs: Path) -> None:
    written = []
    for _ in range(2):
        performance.write(docs)
        written.append({path.name: path.read_bytes() for path in docs.rglob("*") if path.is_file()})
    assert written[0] == written[1]


def test_remarks_stand_below_the_figures_that_they_are_about(docs: Path) -> None:
    (docs / "performance" / "host.md").write_text("Most of it is the checksum.\n")
    performance.write(docs)
    page = (docs / "performance.md").read_text(encoding="utf-8")
    assert page.index("## Host") < page.index("Most of it is the checksum.") < page.index("## Service")


def test_a_bench_without_a_document_is_said_not_to_have_been_run(docs: Path) -> None:
    for name in MADE:
        (docs / "performance" / f"{name}.json").unlink()
    performance.write(docs)
    page = (docs / "performance.md").read_text(encoding="utf-8")
    assert page.count("has not been run") == len(MADE)
    assert "needs a machine with an accelerator" in page


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("engine", ("share_of_forward", "vgg16", "8", "8")),
        ("peers", ("times_peer",)),
        ("host", ("required_times_floor",)),
        ("service", ("device_idle", "gpu_time")),
        ("latency", ("parts_s", "busy", "submit", "99")),
        ("memory", ("resident_mb", 1, "mb")),
        ("threads", ("best",)),
        ("backfill", ("tracking", "1000000", "redis_mb")),
        ("gpu", ("service", "jobs_per_s")),
    ],
)
def test_a_hole_in_a_document_is_named_with_its_file_and_leaves_the_page_alone(
    docs: Path, name: str, keys: tuple[str | int, ...]
) -> None:
    path = docs / "performance" / f"{name}.json"
    document = json.loads(path.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    path.write_text(json.dumps(document))
    with pytest.raises(Hole, match=rf"{re.escape(str(path))} has no .*{keys[-1]}"):
        performance.write(docs)
    assert not (docs / "performance.md").exists()


@pytest.mark.parametrize("text", ["", "[1]", '{"growth": 1'])
def test_what_is_no_document_is_refused_by_name(docs: Path, text: str) -> None:
    (docs / "performance" / "memory.json").write_text(text)
    with pytest.raises(Hole, match=r"memory\.json"):
        performance.write(docs)


def test_a_word_where_a_number_belongs_is_refused_by_name(docs: Path) -> None:
    (docs / "performance" / "memory.json").write_text(json.dumps({**memory(), "growth": "some"}))
    with pytest.raises(Hole, match=r"memory\.json has 'some' at growth"):
        performance.write(docs)


def test_measuring_keeps_the_document_even_where_something_is_missed(
    docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bench.py"
    program.write_text("import json, sys\nprint(json.dumps({'asked': sys.argv[1:]}))\nsys.exit(1)\n")
    monkeypatch.setattr(performance, "BENCH", [sys.executable, str(program)])
    performance.measure("memory", docs / "performance")
    kept = json.loads((docs / "performance" / "memory.json").read_text())
    assert kept == {"asked": ["memory", "--json"]}


def test_a_bench_that_has_nothing_to_measure_on_leaves_no_document(
    docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bench.py"
    program.write_text("""print('{"device": null, "why": "There is no accelerator."}')\n""")
    monkeypatch.setattr(performance, "BENCH", [sys.executable, str(program)])
    (docs / "performance" / "gpu.json").unlink()
    performance.measure("gpu", docs / "performance")
    assert not (docs / "performance" / "gpu.json").exists()
    assert "There is no accelerator." in capsys.readouterr().out


def test_a_bench_that_breaks_off_keeps_what_was_measured_before(
    docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bench.py"
    program.write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(performance, "BENCH", [sys.executable, str(program)])
    with pytest.raises(SystemExit, match="memory ended with 3"):
        performance.measure("memory", docs / "performance")
    assert json.loads((docs / "performance" / "memory.json").read_text()) == memory()


def test_a_figure_has_as_many_digits_as_it_deserves() -> None:
    assert [plain(value) for value in (0.966, 9.5, 12.34, 281.2)] == ["0.97", "9.50", "12.3", "281"]


def test_a_bench_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["performance", "--measure", "nothing"])
    with pytest.raises(SystemExit):
        performance.main()


def test_figures_stand_right_and_words_stand_left() -> None:
    rows = [("vgg16", "0.97", "1e-06", "70%", "the device"), ("xception", "", "2e-06", "8%", "0.4")]
    assert list(table(("a", "b", "c", "d", "e"), rows))[1] == "|---|---:|---:|---:|---|"

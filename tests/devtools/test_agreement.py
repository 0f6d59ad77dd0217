import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from devtools import command, import_path


def run(program: str, *arguments: str) -> Any:
    return subprocess.run(
        command(f"agreement.{program}", *arguments),
        env={**os.environ, **import_path()},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.tensorflow
class TestAgreement:
    def test_a_section_prints_its_figures_and_they_are_small(self) -> None:
        done = run("report", "batch", "tape", "--json")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert {"keras", "tensorflow", "numpy"} <= set(document["versions"])
        sections = document["sections"]
        assert list(sections) == ["batch", "tape"]
        within = [row[-1] for row in sections["batch"]["rows"]]
        assert len(within) == 3
        assert max(within) <= 1e-5
        against_a_tape = dict(sections["tape"]["rows"])
        assert len(against_a_tape) >= 7
        assert max(against_a_tape.values()) <= 1e-4

    def test_a_section_that_there_is_not_is_refused_with_those_there_are(self) -> None:
        done = run("report", "tapes")
        assert done.returncode == 2
        assert "'tapes' is not one of 'notebook', 'tape', 'batch'" in done.stderr

    def test_figures_are_written_into_their_section_of_the_page(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from devtools.agreement import report

        page = tmp_path / "agreement.md"
        committed = report.PAGE.read_text(encoding="utf-8")
        page.write_text(committed.replace("2.5e-07", "0.5"))
        monkeypatch.setattr(report, "PAGE", page)
        report.main(["batch", "--write"], standalone_mode=False)
        written = page.read_text()
        assert "0.5" not in written.partition("## Within ourselves")[2].partition("\n## ")[0]
        assert re.findall("^#.*", written, re.MULTILINE) == re.findall("^#.*", committed, re.MULTILINE)


@pytest.mark.tensorflow
class TestNetworks:
    def test_a_network_that_is_named_is_built_and_explained(self) -> None:
        done = run("networks", "efficientnet_lite0", "--json")
        assert done.returncode == 0, done.stderr
        (seen,) = json.loads(done.stdout)
        assert (seen["network"], seen["target_layer"], seen["map_size"]) == (
            "efficientnet_lite0",
            "top_act",
            [7, 7],
        )
        assert seen["finite"]
        assert seen["nonzero"]

    def test_a_network_unlike_its_row_or_dark_is_told(self) -> None:
        from devtools.agreement.networks import Seen
        from gradcam_worker.gradcam.catalog import CATALOG

        row = CATALOG["vgg16"]
        assert row.target_layer
        assert row.map_size
        assert row.parameters
        right = Seen(
            "vgg16", row.input_size, "caffe", row.target_layer, row.map_size, row.parameters, True, True
        )
        assert right.fits_its_row
        for wrong in (
            {"target_layer": "block5_pool"},
            {"map_size": (7, 7)},
            {"parameters": 1},
            {"preprocessing": "tf"},
            {"finite": False},
            {"nonzero": False},
        ):
            assert not replace(right, **wrong).fits_its_row

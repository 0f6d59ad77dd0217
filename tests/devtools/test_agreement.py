import json
import os
import subprocess
from dataclasses import replace
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
        assert "there is no section tapes; there are notebook, tape, batch" in done.stderr

    def test_the_document_has_every_section(self) -> None:
        from devtools.agreement.report import DOCUMENT, SECTIONS

        titles = [
            line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("## ")
        ]
        assert len(titles) == len(SECTIONS)


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

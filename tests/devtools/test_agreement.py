import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner


@pytest.mark.tensorflow
class TestAgreement:
    @pytest.mark.usefixtures("eagerly")
    def test_sections_print_their_figures_which_are_small_and_are_written_into_the_page(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from devtools.agreement import report
        from devtools.agreement.photos import photographs
        from gradcam_worker.gradcam.models.loading import load_network

        page = tmp_path / "agreement.md"
        committed = report.PAGE.read_text(encoding="utf-8")
        page.write_text(committed.replace("2.5e-07", "0.5"))
        monkeypatch.setattr(report, "PAGE", page)
        # One network for both sections, two photos and two classes of each.
        load = cache(lambda name: load_network(name, forward="tensorflow"))
        monkeypatch.setattr(report, "load_network", load)
        monkeypatch.setattr(report, "photographs", lambda size: photographs(size)[:2])
        monkeypatch.setattr(report, "TOP", report.TOP[:2])
        report.main(["batch", "tape", "--json", "--write"], standalone_mode=False)
        document = json.loads(capsys.readouterr().out)
        assert {"keras", "tensorflow", "numpy"} <= set(document["versions"])
        sections = document["sections"]
        assert list(sections) == ["batch", "tape"]
        within = [row[-1] for row in sections["batch"]["rows"]]
        assert len(within) == 3
        assert max(within) <= 1e-5
        against_a_tape = dict(sections["tape"]["rows"])
        assert len(against_a_tape) >= 7
        assert max(against_a_tape.values()) <= 1e-4
        written = page.read_text()
        assert "0.5" not in written.partition("## Within ourselves")[2].partition("\n## ")[0]
        assert re.findall("^#.*", written, re.MULTILINE) == re.findall("^#.*", committed, re.MULTILINE)

    def test_a_section_that_there_is_not_is_refused_with_those_there_are(self) -> None:
        from devtools.agreement import report

        done = CliRunner().invoke(report.main, ["tapes"])
        assert done.exit_code == 2
        assert "'tapes' is not one of 'notebook', 'tape', 'batch'" in done.output


@pytest.mark.tensorflow
class TestNetworks:
    def test_a_network_that_is_named_is_built_and_explained(self) -> None:
        from devtools.agreement import networks

        done = CliRunner().invoke(networks.main, ["efficientnet_lite0", "--json"])
        assert done.exit_code == 0, done.output
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

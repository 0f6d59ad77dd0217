"""docs/how-to/compare.md: its commands are run over two small datasets, and its figures are all there are."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from gradcam_worker.audit.comparison.report import FIGURES
from gradcam_worker.cli.main import main
from tests.audit.datasets import CORNER, MIDDLE_BOX, Image, folder_dataset

TEXT = (Path(__file__).parents[2] / "docs" / "how-to" / "compare.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```bash\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", TEXT, re.MULTILINE | re.DOTALL)
EXIT_CODES = [0, 7, 0]


def test_every_command_does_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [
        Image(number % 2, truth=number % 2, box=MIDDLE_BOX, sha256=f"{number:064x}") for number in range(120)
    ]
    moved = [replace(one, heat=CORNER) if one.predicted else one for one in images]
    folder_dataset(tmp_path / "cams" / "may", images)
    june = {"name": "efficientnet_lite0", "layer": "blocks", "weights_sha256": "cd" * 32}
    folder_dataset(tmp_path / "cams" / "june", moved, network=june)
    monkeypatch.chdir(tmp_path)
    for (command, printed), exit_code in zip(COMMANDS, EXIT_CODES, strict=True):
        assert main(shlex.split(command)[1:]) == exit_code
        out = capsys.readouterr().out
        for line in printed.splitlines():
            pattern = ".*".join(map(re.escape, line.split("...")))
            assert re.search(f"^{pattern}$", out, re.MULTILINE), (line, out)
    assert (tmp_path / "drift" / "comparison.json").exists()
    assert "gradcam_compare_moved" in (tmp_path / "metrics" / "gradcam.prom").read_text()
    assert len((tmp_path / "drift.jsonl").read_text().splitlines()) == 1


def test_the_figures_are_those_of_the_report() -> None:
    assert dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, re.MULTILINE)) == FIGURES

"""The exit codes of `gradcam`, and what it prints for programs as it fails."""

import json
from pathlib import Path

import pytest

from gradcam_worker import errors
from gradcam_worker.cli.exit_codes import MEANINGS, ExitCode, of_error
from gradcam_worker.cli.main import main
from gradcam_worker.client.datasets.backfills import error_of


def test_each_code_has_a_meaning_and_errors_have_the_code_of_their_cause() -> None:
    assert MEANINGS.keys() == {*ExitCode}
    codes = {one.code: of_error(one()) for one in errors.all_errors() if one is not errors.StatusUnavailable}
    expected = {
        "invalid_input": ExitCode.BAD_INPUT,
        "unknown_class": ExitCode.BAD_INPUT,
        "output_not_allowed": ExitCode.BAD_INPUT,
        "backfill_conflict": ExitCode.BAD_INPUT,
        "backfill_stopped": ExitCode.ROWS_FAILED,
        "backfill_impossible": ExitCode.BAD_INPUT,
        "backfill_canceled": ExitCode.CANCELED,
        "backfill_running": ExitCode.RUNNING_ELSEWHERE,
        "ledger_unavailable": ExitCode.UNREACHABLE,
        "broker_unavailable": ExitCode.UNREACHABLE,
        "storage_unavailable": ExitCode.UNREACHABLE,
        "no_worker": ExitCode.UNREACHABLE,
        "invalid_settings": ExitCode.FAILURE,
        "unknown_job": ExitCode.FAILURE,
    }
    assert codes.items() >= expected.items()


@pytest.mark.usefixtures("environment")
def test_with_json_an_error_is_one_line_of_json_wherever_the_option_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADCAM_OUTPUT", tmp_path.as_uri())
    where = f"--output={tmp_path.as_uri()}/out"
    for command in (["--json", "none.csv", where], ["none.csv", where, "--json"]):
        assert main(["backfill", *command]) == ExitCode.BAD_INPUT
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert document["error"]["code"] == "invalid_input"
        assert document["exit_code"] == ExitCode.BAD_INPUT
        assert document["error"]["message"] in err
        assert isinstance(error_of(out), errors.InvalidInput)
    assert main(["backfill", "none.csv", where, "--window", "0", "--json"]) == ExitCode.WRONG_USAGE
    out = capsys.readouterr().out
    assert json.loads(out)["error"]["code"] == "usage"
    assert main(["backfill", "none.csv", where]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().out == "", "without --json nothing is printed there"

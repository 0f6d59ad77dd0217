"""`gradcam`: help, wrong usage and wrong settings."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradcam_worker.cli.main import main


def test_help_shows_every_command_and_an_example_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ["demo", "worker", "explain", "submit", "status", "cancel", "replay", "redeliver"]
    commands += ["networks", "doctor", "top"]
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for command in commands:
        assert f"\n  {command} " in listed
        assert main([command, "--help"]) == 0
        examples = capsys.readouterr().out.split("Example")[1].splitlines()[1:]
        assert re.match(rf"    (GRADCAM_\w+=\S+ )*gradcam {command}", examples[0]), (
            "an example has its own line"
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain"],
        ["explain", "none.jpg"],
        ["explain", "none.jpg", "nor-this.jpg"],
        ["explain", __file__, "--classes", '"unclosed'],
        ["submit", "cat.jpg"],
        ["submit", "C:\\\\photos\\\\cat.jpg"],
        ["explain", __file__, "--top-n", "3", "--classes", "1"],
        ["explain", __file__, "--top-n", "0"],
        ["frobnicate"],
        ["submit"],
        ["cancel"],
        ["replay", "--since", "yesterday"],
        ["replay", "--since", "-2h"],
        ["replay", "--rate", "0"],
        ["redeliver", "--limit", "0"],
    ],
)
def test_wrong_usage_exits_with_2_and_a_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "Error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["submit", "cat.jpg"], 2, "of a file that workers can read, or use --upload"),
        (["submit", "s3://in/cat.jpg", "--upload"], 2, "s3://in/cat.jpg is a URI: omit --upload"),
        (
            ["submit", "cat.jpg", "--upload"],
            1,
            "--upload needs GRADCAM_UPLOADS, the folder for uploads: set it",
        ),
    ],
)
def test_an_error_about_an_image_names_options_of_the_command(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "upload_and_submit" not in error


def test_a_wrong_setting_exits_with_1_and_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADCAM_BROKER", "redis://x")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "Did you mean GRADCAM_BROKER_URL?" in shown.err
    assert "Traceback" not in shown.err


def test_each_wrong_setting_has_its_own_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADCAM_THREADS", "many")
    monkeypatch.setenv("GRADCAM_BROKER", "redis://x")
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "Error (invalid_settings)",
        "GRADCAM_BROKER",
        "GRADCAM_THREADS",
    ]


@pytest.mark.parametrize(
    ("preload", "broken", "message"),
    [
        ("tumors", False, "There is no network 'tumors'. Did you mean 'tumours'?"),
        ("tumours", True, "networks.toml cannot be used: networks: is missing."),
    ],
)
def test_a_worker_does_not_start_without_its_networks(
    preload: str,
    broken: bool,
    message: str,
    networks_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GRADCAM_PRELOAD", preload)
    if broken:
        networks_file.write_text("")
    assert main(["worker"]) == 1
    assert message in capsys.readouterr().err


def test_a_command_ends_without_collecting_the_garbage_of_its_libraries() -> None:
    program = (
        "import sys\n"
        "from gradcam_worker.cli.main import main\n"
        "class Garbage:\n"
        "    def __del__(self): print('collected')\n"
        "code = main(['--version'])\n"
        "garbage = Garbage()\n"
        "garbage.itself = garbage\n"
        "del garbage\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "gradcam, version" in done.stdout
    assert "collected" not in done.stdout


STARTING = """
import os, time
from gradcam_worker.cli import commands, main
os.getpid = lambda: {pid}
commands.run = lambda _: print("started", flush=True) or time.sleep(60)
main.main([])
"""


@pytest.mark.parametrize(("pid", "code"), [(1, 128 + signal.SIGTERM), (7, -signal.SIGTERM)])
def test_sigterm_ends_a_command_that_is_just_starting_also_as_the_first_process_of_a_container(
    pid: int, code: int
) -> None:
    program = [sys.executable, "-c", STARTING.format(pid=pid)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.wait(60) == code

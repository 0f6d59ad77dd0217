import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from rich.console import Console

from gradcam_worker.cli.main import main
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import GradcamError, InvalidJob, JobTimeout, LedgerUnavailable, StorageUnavailable
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.classes import ClassIndex
from gradcam_worker.ledger.dead_letters import make_replay_id
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import console
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.schemas.status import ClassScore, Problem, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, RecordingPublisher, TinyNetwork

WORKER = WorkerRef(id="gpu-1:7", device="cpu")


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Environment variables that name this test's Valkey."""
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    return settings


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
    ("arguments", "code", "said"),
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
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    shown = " ".join(capsys.readouterr().err.split())
    assert said in shown
    assert "upload_and_submit" not in shown


def test_a_wrong_setting_exits_with_1_and_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADCAM_BROKER", "redis://x")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "Did you mean GRADCAM_BROKER_URL?" in shown.err
    assert "Traceback" not in shown.err


def test_networks_are_listed_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["networks"]) == 0
    assert "block14_sepconv2_act" in capsys.readouterr().out
    assert main(["networks", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(CATALOG)
    assert {row["name"]: row["weights"] for row in rows if row["weights"] != "download"} == {
        "efficientnet_lite0": "shipped"
    }


OWN = f"""
[networks.tumours]
model = "s3://models/tumours.keras"
sha256 = "{"ab" * 32}"
preprocessing = "torch"
input_size = [384, 320]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry with one network of the operator's own."""
    path = tmp_path / "networks.toml"
    path.write_text(OWN)
    monkeypatch.setenv("GRADCAM_NETWORKS", str(path))
    return path


def test_own_networks_are_listed_with_the_others_and_every_row_fits_a_terminal(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vgg19.weights.h5").touch()
    monkeypatch.setenv("GRADCAM_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr("gradcam_worker.operations.console.out", Console(width=80))
    assert main(["networks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(CATALOG) + 2]] == [*CATALOG, "tumours"], "one line each"
    rows = {line.split()[0]: line.rstrip() for line in lines if line}
    assert rows["tumours"].split() == ["tumours", "384x320", "found", "in", "its", "graph", "s3"]
    assert rows["vgg19"].endswith(" folder")
    assert rows["s3,"] == "s3, file: a network of your own; GRADCAM_NETWORKS names the file."
    assert main(["networks", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[-1]
    assert (row["weights"], row["sha256"]) == ("s3://models/tumours.keras", "ab" * 32)


@pytest.mark.parametrize(
    ("preload", "broken", "why"),
    [
        ("tumors", False, "There is no network 'tumors'. Did you mean 'tumours'?"),
        ("tumours", True, "networks.toml cannot be used: networks: is missing."),
    ],
)
def test_a_worker_does_not_start_without_its_networks(
    preload: str,
    broken: bool,
    why: str,
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GRADCAM_PRELOAD", preload)
    if broken:
        own.write_text("")
    assert main(["worker"]) == 1
    assert why in capsys.readouterr().err


def test_the_options_of_a_method_reach_the_job(
    environment: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[Job] = []
    monkeypatch.setattr(
        "gradcam_worker.client.client.GradcamClient.submit", lambda _, job, **__: submitted.append(job)
    )
    assert main(["submit", "s3://photos/cat.jpg", "--network", "tumours"]) == 0
    options = ["--method", "layercam", "--layer", "auto", "--score", "probability", "--normalize", "joint"]
    assert main(["submit", "s3://photos/cat.jpg", *options, "--flip"]) == 0
    plain, chosen = submitted
    assert (plain.network, plain.method, plain.target.top_n) == ("tumours", MethodSpec(), 3)
    assert chosen.method == MethodSpec(
        name="layercam", layer="auto", score="probability", normalize="joint", flip=True
    )


def test_a_job_is_submitted_and_its_status_shown(
    environment: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "s3://photos/cat.jpg", "--classes", "285,tabby", "--key", "k"]) == 0
    job_id = capsys.readouterr().out.strip()
    assert main(["submit", "s3://photos/cat.jpg", "--classes", "285,tabby", "--key", "k", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": job_id}
    assert main(["status", job_id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "queued"
    assert main(["status", job_id]) == 0
    assert job_id in capsys.readouterr().out


def test_a_key_whose_job_has_failed_is_reported_and_retried_only_on_request(
    environment: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["submit", "s3://photos/cat.jpg", "--key", "order-42"]
    assert main(command) == 0
    job_id = capsys.readouterr().out.strip()
    ledger = RedisLedger(environment)
    ledger.advance(ledger.claim(ledger.read(job_id), WORKER).document, status="failed")
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == job_id
    assert "has failed: --retry-failed runs it again" in shown.err
    assert ledger.read(job_id).status == "failed"
    assert main([*command, "--retry-failed"]) == 0
    assert capsys.readouterr().out.strip() == job_id
    assert ledger.read(job_id).status == "queued"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_id_of_an_accepted_job_is_printed_even_if_the_ledger_fails_right_after(
    options: list[str],
    environment: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = Mock(side_effect=LedgerUnavailable("The ledger is gone."))
    monkeypatch.setattr("gradcam_worker.client.client.GradcamClient.status", gone)
    assert main(["submit", "s3://photos/cat.jpg", "--key", "order-42", *options]) == 0
    shown = capsys.readouterr()
    job_id = json.loads(shown.out)["id"] if options else shown.out.strip()
    assert RedisLedger(environment).read(job_id).status == "queued"
    assert gone.called
    assert not shown.err


def test_waiting_without_a_worker_times_out(
    environment: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "s3://photos/cat.jpg", "--wait", "--timeout", "0.1"]) == 1
    assert "is still queued after 0.1 s" in capsys.readouterr().err


def test_an_unknown_job_is_an_error(environment: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "01a2062b-306e-7164-a139-13398da125f6"]) == 1
    assert "unknown_job" in capsys.readouterr().err


def test_a_broker_out_of_reach_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADCAM_BROKER_URL", "redis://:planted@127.0.0.1:1/0")
    assert main(["submit", "s3://photos/cat.jpg"]) == 1
    shown = capsys.readouterr().err
    assert "cannot be reached" in shown
    assert "planted" not in shown


def test_a_queued_job_is_cancelled_and_a_final_one_is_not(
    environment: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, waiting, running = (
        RedisLedger(environment),
        *(
            GradcamClient(settings=environment).submit(
                image="s3://photos/cat.jpg", network="vgg16", target={"top_n": 1}
            )
            for _ in range(2)
        ),
    )
    assert main(["cancel", waiting]) == 0
    assert "canceled" in capsys.readouterr().out
    assert main(["cancel", waiting, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "canceled"
    document = ledger.claim(ledger.read(running), WORKER).document
    assert main(["cancel", running]) == 0
    assert "running · fetch · cancel requested" in capsys.readouterr().out
    ledger.advance(document, status="succeeded")
    assert main(["cancel", running]) == 1
    assert "Too late: the job is already final, with status succeeded." in capsys.readouterr().err


def test_failed_jobs_are_listed_and_shown_and_replayed_only_on_request(
    environment: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay"]) == 0
    assert "No dead letters" in capsys.readouterr().out
    ledger = RedisLedger(environment)
    down, slow = (
        failed_job(ledger, StorageUnavailable("The bucket [b]in[/b] is not there.")),
        failed_job(ledger, JobTimeout("It took too long.")),
    )
    ledger.refuse(refused := new_id(), {"image": 7}, InvalidJob("This is not a job."))
    assert main(["replay"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0].split() == ["id", "failed", "code", "attempt"]
    assert {line.split()[0] for line in listed[1:7:2]} == {down, slow, refused}
    assert all(len(line.rstrip()) <= 80 for line in listed)
    assert "The bucket [b]in[/b] is not there." in "".join(listed)
    assert main(["replay", "--limit", "1"]) == 0
    assert "... and 2 more" in capsys.readouterr().out
    assert main(["replay", "--code", "storage_unavailable", "--since", "2h", "--dry-run", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["id"], row["problem"]["code"]) == (down, "storage_unavailable")
    assert row["replay"]["id"] == make_replay_id(down)
    assert main(["replay", down, "--dry-run"]) == 0
    assert f"Its replay would be job {make_replay_id(down)}." in capsys.readouterr().out
    assert len(ledger.find_dead_letters()) == 3, "until now nothing was replayed"

    assert main(["replay", "--code", "storage_unavailable", "--since", "2h"]) == 0
    assert capsys.readouterr().out == f"{down} -> {make_replay_id(down)}\n"
    assert ledger.read(make_replay_id(down)).status == "queued"
    assert main(["replay", down]) == 1
    assert "has been replayed already" in capsys.readouterr().err
    assert main(["replay", "--all", "--rate", "1000", "--json"]) == 1, "one message is not a job"
    said = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert (said[slow]["new_id"], said[refused]["new_id"]) == (make_replay_id(slow), None)
    assert [job_id for job_id, _ in ledger.find_dead_letters()] == [refused]


def test_parked_events_are_listed_and_delivered_again_only_on_request(
    environment: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["redeliver"]) == 0
    assert "Nothing is parked" in capsys.readouterr().out
    url = "https://app.example/hook?token=planted"
    outbox = RedisOutbox(RedisLedger(environment).server, retention_s=60)
    jobs = [
        GradcamClient(settings=environment).submit(
            image="s3://photos/cat.jpg",
            network="vgg16",
            target={"top_n": 1},
            webhooks=[{"url": url, "events": ["job.queued"]}],
        )
        for _ in range(3)
    ]
    outbox.disable(url)
    assert not outbox.claim_deliveries(9, lease_s=60, limits={}, others_limit=9)
    assert main(["redeliver"]) == 0
    listed = capsys.readouterr().out
    assert set(jobs) <= set(listed.split())
    assert "Disabled, because it answered 410 (Gone): https://app.example/hook" in listed
    assert main(["redeliver", jobs[0], "--dry-run", "--json"]) == 0
    shown = capsys.readouterr().out
    [row] = json.loads(shown)
    assert (row["job_id"], row["recipient"], row["events"]) == (jobs[0], "https://app.example/hook", 1)
    assert "planted" not in listed + shown
    assert len(outbox.find_parked()) == 3, "until now nothing was delivered again"

    assert main(["redeliver", jobs[0]]) == 0
    assert [one.document.id for one in outbox.claim_deliveries(9, lease_s=60, limits={}, others_limit=9)] == [
        jobs[0]
    ]
    assert main(["redeliver", jobs[0]]) == 1
    assert f"Job {jobs[0]} has no parked events." in capsys.readouterr().err
    assert main(["redeliver", "--url", "https://other.example/hook"]) == 0
    assert len(outbox.find_parked()) == 2
    assert main(["redeliver", "--url", url, "--since", "1h"]) == 0
    assert (len(outbox.find_parked()), outbox.count_recipients()) == (0, 3)
    outbox.disable(url)
    assert main(["redeliver", "--url", url]) == 0
    assert outbox.find_disabled() == [], "though nothing was parked"


def failed_job(ledger: RedisLedger, error: GradcamError) -> str:
    """Make a job fail with this error; return its id."""
    job = Job.parse({"image": "s3://photos/cat.jpg", "network": "vgg16", "target": {"top_n": 1}})
    document = ledger.claim(ledger.submit(job), WORKER).document
    ledger.advance(document, status="failed", error=Problem.of(error, stage="upload", attempt=1))
    return job.id


@pytest.mark.tensorflow
class TestExplain:
    def test_files_are_explained_into_folders(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "cut.jpg").write_bytes((photos / "coffee.jpg").read_bytes()[:-2])
        images = [*(str(photos / f"{name}.jpg") for name in ("coffee", "camera")), str(tmp_path / "cut.jpg")]
        assert main(["explain", *images, "--top-n", "2", "-o", str(tmp_path)]) == 0
        shown, said = capsys.readouterr()
        assert f"{images[2]} image_damaged: 0.0% of the image is missing: its end marker is missing" in said
        assert said.count("image_damaged") == 1
        assert "espresso" in shown
        assert "95.4 %" in shown
        manifest = Manifest.model_validate_json((tmp_path / "coffee" / "manifest.json").read_bytes())
        assert [seen.class_.id for seen in manifest.explanations] == [967, 968]
        assert (tmp_path / "camera" / "overlay-1-872-tripod.jpg").exists()

    def test_any_artifact_and_metric_can_be_requested_and_metrics_are_shown(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wish = ["--artifact", "report", "--artifact", "overlay:png", "--metric", "deletion"]
        how = ["--method", "eigencam", "--layer", "auto", "--flip", "--top-n", "1"]
        assert main(["explain", str(photos / "coffee.jpg"), *wish, *how, "-o", str(tmp_path)]) == 0
        heading, row, *_ = capsys.readouterr().out.splitlines()
        assert heading.split() == ["image", "folder", "rank", "id", "class", "probability", "deletion"]
        assert re.fullmatch(r"coffee.jpg +coffee/ +1 +967 +espresso +9\d\.\d % +0\.\d{3} *", row)
        names = sorted(path.name for path in (tmp_path / "coffee").iterdir())
        assert names == ["manifest.json", "overlay-1-967-espresso.png", "report.html"]
        manifest = Manifest.model_validate_json((tmp_path / "coffee" / "manifest.json").read_bytes())
        assert manifest.explanations[0].metrics.keys() == {"deletion"}
        assert (manifest.method.name, manifest.method.flip) == ("eigencam", True)

    def test_a_bad_image_changes_the_exit_code_and_no_other_result(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "bad.jpg").write_text("<html>")
        images = [str(tmp_path / "bad.jpg"), str(photos / "coffee.jpg")]
        assert main(["explain", *images, "--json", "-o", str(tmp_path / "out")]) == 1
        bad, good = json.loads(capsys.readouterr().out)
        assert bad["error"]["code"] == "unsupported_media_type"
        assert good["manifest"]["explanations"][0]["class"]["name"] == "espresso"

    @pytest.mark.parametrize(
        ("name", "folder"),
        [("a[final].jpg", "a[final]"), ("[red]b.jpg", "[red]b"), ("...jpg", "image"), ("ü %?#.jpg", "ü %?#")],
    )
    def test_a_file_with_any_name_is_explained_below_the_output(
        self, name: str, folder: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / name).write_bytes((photos / "coffee.jpg").read_bytes())
        assert main(["explain", str(tmp_path / name), "--top-n", "1", "-o", str(tmp_path / "out")]) == 0
        assert name in capsys.readouterr().out
        assert [path.name for path in (tmp_path / "out").iterdir()] == [folder]
        (tmp_path / name).write_bytes(b"<html>")
        assert main(["explain", str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err

    def test_an_unknown_class_is_an_error_with_suggestions(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        image = str(photos / "coffee.jpg")
        assert main(["explain", image, "--classes", "expresso", "-o", str(tmp_path)]) == 1
        assert "espresso" in capsys.readouterr().err


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> TinyNetwork:
    """The network that is loaded, whatever its name."""
    network = TinyNetwork()
    monkeypatch.setattr("gradcam_worker.runtime.service_factory.load", lambda *_: network)
    return network


def bright(folder: Path, name: str) -> Path:
    cv2.imwrite(str(folder / name), np.full((16, 16, 3), 200, np.uint8))
    return folder / name


@pytest.mark.tensorflow
class TestManyFiles:
    """A file that fails does not stop the others."""

    @pytest.fixture
    def images(self, tmp_path: Path) -> list[Path]:
        """Eight files, of which only the first and the last are images."""
        (tmp_path / "page.jpg").write_text("<html>")
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "folder.jpg").mkdir()
        (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
        (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "none")
        bad = [tmp_path / f"{name}.jpg" for name in ("page", "empty", "folder", "circle", "nowhere", "none")]
        return [bright(tmp_path, "a.png"), *bad, bright(tmp_path, "z.png")]

    def test_the_others_are_explained_and_the_failures_are_listed_last(
        self, tiny: TinyNetwork, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", *map(str, images), "-o", str(tmp_path / "out")]) == 1
        shown = capsys.readouterr()
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "z"]
        assert {"a.png", "z.png"} <= set(shown.out.split())
        lines = [line for line in shown.err.splitlines() if line.strip()]
        while "could not be explained" not in lines[0]:
            assert "zero_heatmap" in lines.pop(0), "a warning about a file that is explained"
        assert lines[0] == "6 of 8 could not be explained:"
        assert [line.split()[0] for line in lines[1:]] == [str(image) for image in images[1:-1]]
        assert "is a folder: name the files in it" in lines[3]
        assert "image_not_found: There is no file" in lines[6]

    def test_json_has_an_error_for_each_failed_file(
        self, tiny: TinyNetwork, images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["explain", *map(str, images), "--json", "-o", str(tmp_path / "out")]) == 1
        found = json.loads(capsys.readouterr().out)
        assert [one["image"] for one in found] == list(map(str, images))
        assert ["manifest" in one for one in found] == [True, *[False] * 6, True]

    def test_an_unexpected_error_is_one_files_failure(
        self,
        tiny: TinyNetwork,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        whole, images = TinyNetwork.compute, [bright(tmp_path, name) for name in ("a.png", "b.png", "c.png")]
        turns = iter([None, TypeError("fixed batch"), None])

        def compute(self: TinyNetwork, *given: Any) -> Any:
            if error := next(turns):
                raise error
            return whole(self, *given)

        monkeypatch.setattr(TinyNetwork, "compute", compute)
        assert main(["explain", *map(str, images), "-o", str(tmp_path / "out")]) == 1
        shown = capsys.readouterr()
        assert "1 of 3 could not be explained:" in shown.err
        assert f"{images[1]} internal: Unforeseen TypeError: fixed batch" in shown.err
        assert {"a.png", "c.png"} <= set(shown.out.split())

    def test_an_interrupted_run_shows_its_results_and_can_be_repeated(
        self,
        tiny: TinyNetwork,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        images = [bright(tmp_path, name) for name in ("a.png", "b.png")]
        monkeypatch.setattr("gradcam_worker.operations.explain.run_job", interrupted := Interrupted(1))
        command = ["explain", *map(str, images), "-o", str(tmp_path / "out")]
        assert main(command) == 130
        shown = capsys.readouterr()
        assert "a.png" in shown.out
        assert "Stopped." in shown.err
        (tmp_path / "out" / "b").mkdir()  # the state after a killed run
        (tmp_path / "out" / "b" / "overlay-1-0-red.jpg").write_bytes(b"half")
        interrupted.after = 9
        assert main(command) == 0
        assert "b.png" in capsys.readouterr().out

    def test_a_folder_that_cannot_be_written_is_one_files_failure(
        self, tiny: TinyNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = [bright(tmp_path, name) for name in ("a.png", "b.png")]
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").touch()
        assert main(["explain", *map(str, images), "-o", str(tmp_path / "out")]) == 1
        shown = capsys.readouterr()
        assert "1 of 2 could not be explained:" in shown.err
        assert f"{images[0]} storage_unavailable: " in shown.err
        assert "b.png" in shown.out

    @pytest.mark.parametrize(
        ("wish", "why"),
        [
            (["--classes", "gren"], "There is no class 'gren'. Near: 1 (green)"),
            (["--network", "efficientnet"], "Did you mean 'efficientnet_lite0'"),
        ],
    )
    def test_an_error_that_concerns_all_files_is_printed_once(
        self,
        wish: list[str],
        why: str,
        tiny: TinyNetwork,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        images = [str(bright(tmp_path, name)) for name in ("a.png", "b.png")]
        tiny.labels = ClassIndex.of(["red", "green", "blue"])
        assert main(["explain", *images, *wish, "-o", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err.count(why) == 1


class Interrupted:
    """Explains `after` files, and is interrupted at the next one."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.after -= 1
        if self.after < 0:
            raise KeyboardInterrupt
        return run_job(*given, **named)


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "said",
    [
        ["--classes", '"benign, no finding",malignant'],
        ["--classes", '"benign, no finding"', "--classes", "malignant"],
        ["--classes", '0, "malignant"'],
    ],
)
def test_names_with_commas_are_quoted(
    said: list[str], tiny: TinyNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.labels = ClassIndex.of(["benign, no finding", "malignant", "other"])
    image = str(bright(tmp_path, "a.png"))
    assert main(["explain", image, *said, "--json", "-o", str(tmp_path / "out")]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert [one["class"]["id"] for one in found["manifest"]["explanations"]] == [0, 1]
    assert main(["explain", image, "--classes", "benign, no finding"]) == 1
    assert (
        "a name that holds a comma stands in double quotes, as in '\"crane, bird\",pier'"
        in capsys.readouterr().err
    )


def test_a_file_on_this_machine_is_uploaded_on_request(
    environment: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(["submit", str(tmp_path / "cat.jpg")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "has no scheme: write s3://bucket/key" in error
    assert "or use --upload" in error
    monkeypatch.setenv("GRADCAM_UPLOADS", (tmp_path / "up").as_uri())
    assert main(["submit", str(tmp_path / "cat.jpg"), "--upload"]) == 0
    job_id = capsys.readouterr().out.strip()
    assert RedisLedger(environment).read(job_id).status == "queued"
    assert [path.suffix for path in (tmp_path / "up").iterdir()] == [".jpg"]


def test_an_unknown_artifact_is_refused_with_a_list_of_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jpg").touch()
    assert main(["explain", str(tmp_path / "a.jpg"), "--artifact", "poster"]) == 1
    assert "'poster'" in (said := capsys.readouterr().err)
    assert "'animation'" in said


def test_the_name_of_a_class_is_printed_without_markup(capsys: pytest.CaptureFixture[str], job: Job) -> None:
    seen = ClassScore(rank=1, id=0, wnid="", name="benign [/b] [red]", probability=0.5)
    ledger = MemoryLedger()
    job_id = GradcamClient(ledger=ledger, publish=RecordingPublisher()).submit(job)
    console.show_status(ledger.read(job_id).model_copy(update={"predictions": (seen,)}))
    assert "benign [/b] [red]" in capsys.readouterr().out

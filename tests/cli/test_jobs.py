"""`gradcam submit`, `status` and `cancel`."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from gradcam_worker.cli.main import main
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations.terminal import console
from gradcam_worker.schemas.annotations import Annotations
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.options import MethodSpec, Target
from gradcam_worker.schemas.status import ClassScore, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, RecordingPublisher

WORKER = WorkerRef(id="gpu-1:7", device="cpu")


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


def test_what_is_known_of_the_image_reaches_the_job(
    environment: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[Job] = []
    monkeypatch.setattr(
        "gradcam_worker.client.client.GradcamClient.submit", lambda _, job, **__: submitted.append(job)
    )
    known = {"labels": ["tabby"], "boxes": [{"xyxy": [0, 0, 0.5, 1], "relative": True}]}
    assert main(["submit", "s3://photos/cat.jpg", "--annotations", json.dumps(known)]) == 0
    assert submitted[0].annotations == Annotations.model_validate(known)
    for wrong in ("tabby", '["tabby"]'):
        assert main(["submit", "s3://photos/cat.jpg", "--annotations", wrong]) != 0
        assert "no object of JSON: write it as in" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("labels", "options", "target"),
    [
        ('["benign", "malignant"]', [], Target(top_n=2)),
        ('["benign", "malignant"]', ["--against", "benign"], Target(top_n=1, against=["benign"])),
        ('["benign", "malignant"]', ["--top-n", "3"], Target(top_n=3)),
        ('["a", "b", "c", "d"]', [], Target(top_n=3)),
        ('"gone.txt"', [], Target(top_n=3)),  # the workers' registry counts, not this one
    ],
)
def test_top_n_is_at_most_the_number_of_classes_in_the_registry_of_this_machine(
    labels: str,
    options: list[str],
    target: Target,
    environment: Settings,
    networks_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    networks_file.write_text(f"{networks_file.read_text()}labels = {labels}\n")
    submitted: list[Job] = []
    monkeypatch.setattr(
        "gradcam_worker.client.client.GradcamClient.submit", lambda _, job, **__: submitted.append(job)
    )
    assert main(["submit", "s3://photos/cat.jpg", "--network", "tumours", *options]) == 0
    assert submitted[0].target == target


def test_inputs_of_the_network_reach_the_job(
    environment: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[Job] = []
    monkeypatch.setattr(
        "gradcam_worker.client.client.GradcamClient.submit", lambda _, job, **__: submitted.append(job)
    )
    assert main(["submit", "s3://photos/cat.jpg", "--input", "age=61", "--input", "code=a=b"]) == 0
    assert submitted[0].inputs == {"age": "61", "code": "a=b"}
    for wrong, why in (
        (["age"], "'age' is none of NAME=VALUE"),
        (["=61"], "'=61' is none of NAME=VALUE"),
        (["age=61", "age=62"], "'age=62' is given twice"),
    ):
        options = [word for one in wrong for word in ("--input", one)]
        assert main(["submit", "s3://photos/cat.jpg", *options]) == 2
        assert why in capsys.readouterr().err


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
    ledger.finish(ledger.claim(ledger.read(job_id), WORKER).document, status="failed")
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
    assert main(["submit", "s3://photos/cat.jpg"]) == 5
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
    ledger.finish(document, status="succeeded")
    assert main(["cancel", running]) == 1
    assert "Too late: the job is already final, with status succeeded." in capsys.readouterr().err


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


def test_the_name_of_a_class_is_printed_without_markup(capsys: pytest.CaptureFixture[str], job: Job) -> None:
    prediction = ClassScore(rank=1, id=0, wnid="", name="benign [/b] [red]", probability=0.5)
    ledger = MemoryLedger()
    job_id = GradcamClient(ledger=ledger, publish=RecordingPublisher()).submit(job)
    console.show_status(ledger.read(job_id).model_copy(update={"predictions": (prediction,)}))
    assert "benign [/b] [red]" in capsys.readouterr().out

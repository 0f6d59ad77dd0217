"""`gradcam replay` and `gradcam redeliver`."""

import json

import pytest

from gradcam_worker.cli.main import main
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import GradcamError, InvalidJob, JobTimeout, StorageUnavailable
from gradcam_worker.ledger.dead_letters import make_replay_id
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import Problem, WorkerRef
from gradcam_worker.settings import Settings

WORKER = WorkerRef(id="gpu-1:7", device="cpu")


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
    results = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert (results[slow]["new_id"], results[refused]["new_id"]) == (make_replay_id(slow), None)
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
    assert [
        delivery.document.id for delivery in outbox.claim_deliveries(9, lease_s=60, limits={}, others_limit=9)
    ] == [jobs[0]]
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
    ledger.finish(document, status="failed", error=Problem.of(error, stage="upload", attempt=1))
    return job.id

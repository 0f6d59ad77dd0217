"""`gradcam backfill`, with a worker that runs in a thread of the test."""

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, cast

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.cli.main import main
from gradcam_worker.client import AsyncGradcamClient, BackfillStatus, GradcamClient
from gradcam_worker.errors import BackfillConflict, BackfillStopped, InvalidInput, InvalidJob, WaitTimeout
from gradcam_worker.execution.handler import JobHandler
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores
from gradcam_worker.testing import fake_services

IMAGE = cv2.imencode(".png", np.full((20, 20, 3), (0, 0, 255), np.uint8))[1].tobytes()


class WorkerThread:
    """A worker that polls the ledger for queued shards and runs them."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.ledger = settings, RedisLedger(settings)
        self.images: dict[str, bytes | Exception] = {f"s3://in/{number}.png": IMAGE for number in range(40)}
        self.idle = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        stores = Stores(self.settings, cast("S3", None))  # a folder needs no S3
        services = fake_services(self.images, stores=stores)
        worker = WorkerRef(id="w", device="cpu")
        leases = LeaseManager(self.ledger, "w", 15)
        handler = JobHandler(
            self.settings,
            self.ledger,
            services,
            worker,
            leases,
            CircuitBreaker(lambda: None),
            admits=RedisBackfillRegistry(self.ledger.server).admits,
        )
        while not self._stopped.wait(0.01):
            self.ledger.renew_leases("w", "well", {})
            waiting: Any = self.ledger.server.redis.zrange(f"{self.settings.key_prefix}queued:shard", 0, -1)
            for job_id in () if self.idle.is_set() else waiting:
                handler.handle({"id": job_id}, job_id, kind=Shard)


@pytest.fixture
def worker(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WorkerThread]:
    """The command line finds this test's own Valkey, and a folder for results."""
    own = settings.model_copy(update={"output": f"file://{tmp_path}/results"})
    for name, value in own.to_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("gradcam_worker.backfill.runner.MAX_POLL_INTERVAL_S", 0.05)
    with WorkerThread(own) as thread:
        yield thread


@pytest.fixture
def image_list(tmp_path: Path) -> Path:
    """Twenty rows: nineteen images, and one that does not exist."""
    path = tmp_path / "photos.csv"
    rows = [f"s3://in/{number}.png" for number in range(19)] + ["s3://in/none.png"]
    path.write_text("\n".join(["image", *rows]) + "\n")
    return path


def arguments(image_list: Path, worker: WorkerThread, *more: str) -> list[str]:
    output = f"{worker.settings.output}/photos"
    return ["backfill", str(image_list), "--top-n", "1", "--shard-rows", "4", "--output", output, *more]


def output_of(worker: WorkerThread) -> Path:
    return Path(worker.settings.output.removeprefix("file://")) / "photos"


def test_a_list_becomes_a_dataset_and_status_says_so(
    worker: WorkerThread, image_list: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(image_list, worker)) == 0
    out, err = capsys.readouterr()
    folder = output_of(worker)
    assert out.splitlines() == [
        "Complete: 19 of 20 rows are explained.",
        "          1  image_not_found",
        f"Reason of each failure: file://{folder}/failed.jsonl",
        f"Dataset: file://{folder}",
        "Open it in Python, with one of the last three lines:",
        "from pyarrow.dataset import dataset",
        f'rows = dataset("{folder}/data")',
        "import polars; cams = polars.scan_pyarrow_dataset(rows).collect()",
        "import pandas; cams = rows.to_table().to_pandas()",
        f'import duckdb; cams = duckdb.read_parquet("{folder}/data/*.parquet")',
    ]
    assert re.search(r"^\d+ of (about )?\d+ rows · ", err)
    files = sorted(folder.joinpath("data").iterdir())
    assert [number for file in files for number in pq.read_table(file)["row"].to_pylist()] == list(range(20))
    assert main(["backfill", "status", f"file://{folder}"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"state +complete", shown)
    assert re.search(r"rows +20, 1 of them failed", shown)
    assert re.search(r"shards +5 done *\n", shown)
    assert main(["backfill", "cancel", f"file://{folder}"]) == 0
    assert capsys.readouterr().out == "The backfill is not running. No shards are in flight.\n"
    files[0].unlink()
    assert main(["backfill", "status", f"file://{folder}"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"state +damaged", shown)
    assert "dataset.json counts 5 shards, but 4 exist" in shown


def test_for_machines_each_line_is_json(
    worker: WorkerThread, image_list: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(image_list, worker, "--json", "--overlays")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].items() >= {"event": "started", "output": f"file://{output_of(worker)}"}.items()
    assert {line["event"] for line in lines[1:-1]} == {"progress"}
    last = lines[-1]
    assert last.items() >= {"event": "complete", "rows": 20, "codes": {"image_not_found": 1}}.items()
    assert last["output"] == f"file://{output_of(worker)}"
    assert len([*output_of(worker).joinpath("overlays").rglob("*.jpg")]) == 19
    assert main(["backfill", "status", last["output"], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.items() >= {"state": "complete", "shards_done": 5}.items()
    assert document["dataset"]["rows"] == 20


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, whatever tests before this one and their libraries have set."""
    import rich._emoji_codes  # noqa: F401  # now, since an interrupted import leaves a file open

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before or signal.default_int_handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_backfill_reports_shards_in_flight_and_can_be_resumed(
    worker: WorkerThread, image_list: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    worker.idle.set()
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        while worker.ledger.count_jobs()[0] != 4:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    assert main(arguments(image_list, worker)) == 130
    # The signal may come after the fourth shard was entered in the ledger and before the command knows it.
    message = r"Stopped\. [34] shards are in flight and will still finish\. Continue with --resume\.\n\Z"
    assert re.search(message, capsys.readouterr().err)
    assert signal.getsignal(signal.SIGTERM) == before
    assert main(["backfill", "status", f"file://{output_of(worker)}"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"state +stopped", shown)
    assert re.search(r"rows +0 of at least 16, 0 of them failed", shown)
    assert re.search(r"shards +0 done, [34] in flight", shown)
    worker.idle.clear()
    assert main(arguments(image_list, worker, "--resume")) == 0
    assert main(arguments(image_list, worker)) == 3
    assert "holds this very backfill, and it is complete: use --resume" in capsys.readouterr().err


def test_one_is_continued_without_its_input_and_options(
    worker: WorkerThread,
    image_list: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(image_list.parent)
    options = ["--classes", "red", "--classes", "0", "--overlays", "--shard-rows", "4", "--max-failed", "90%"]
    command = ["backfill", image_list.name, *options, "--output", f"file://{output_of(worker)}"]
    missing = worker.images.pop("s3://in/3.png")
    assert main(command) == 0
    begun = json.loads(output_of(worker).joinpath("backfill.json").read_text())
    assert begun["given"] == {
        "input_": str(image_list),
        "classes": ["red", "0"],
        "artifacts": ["overlay"],
        "shard_rows": "4",
        "max_failed": "90%",
    }
    monkeypatch.chdir("/")
    worker.images["s3://in/3.png"] = missing
    again = ["backfill", "--output", f"file://{output_of(worker)}"]
    assert main([*again, "--only-failed", "--max-failed", "80%"]) == 0
    assert "Complete: 19 of 20 rows are explained." in capsys.readouterr().out
    now = json.loads(output_of(worker).joinpath("backfill.json").read_text())
    assert now["id"] == begun["id"]
    assert now["given"] == {**begun["given"], "max_failed": "80%"}
    assert main([*again, "--resume", "--top-n", "1"]) == 2
    assert "give --top-n or --classes" in capsys.readouterr().err
    assert main([*again, "--resume", "--classes", "red"]) == 3
    told = capsys.readouterr().err
    assert "Its target is" in told
    assert told.endswith(" is asked for. Choose another output.\n")
    longer = image_list.with_name("longer.csv")
    longer.write_text(image_list.read_text() + image_list.read_text().splitlines()[-1] + "\n")
    assert main(["backfill", str(longer), *again[1:], "--changed"]) == 0
    assert "19 of 21 rows are explained." in capsys.readouterr().out
    now = json.loads(output_of(worker).joinpath("backfill.json").read_text())
    assert now["given"] == {**begun["given"], "max_failed": "80%", "input_": str(longer)}
    assert main(again) == 2
    assert "Missing argument 'INPUT'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "by an earlier version"),
        ({"input_": "-", "top_n": "1"}, "was standard input, which cannot be read"),
    ],
)
def test_what_cannot_be_repeated_is_told(
    worker: WorkerThread,
    image_list: Path,
    capsys: pytest.CaptureFixture[str],
    given: dict[str, str],
    said: str,
) -> None:
    assert main(arguments(image_list, worker)) == 0
    plan = output_of(worker) / "backfill.json"
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "given": given}))
    again = ["backfill", "--output", f"file://{output_of(worker)}", "--resume"]
    assert main(again) == 3
    assert said in capsys.readouterr().err
    given = {"input_": str(image_list), "for_api": "{}"}
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "given": given}))
    assert main([*again, "--top-n", "2"]) == 2
    assert "--top-n cannot be changed: another program began" in capsys.readouterr().err


def test_a_program_submits_one_and_learns_how_it_ended(worker: WorkerThread, image_list: Path) -> None:
    output = f"file://{output_of(worker)}"
    where: Any = {"input": str(image_list), "output": output, "network": "efficientnet_lite0"}
    with GradcamClient(settings=worker.settings) as client:
        with pytest.raises(InvalidInput, match=r"none\.csv cannot be read"):
            client.submit_backfill(**{**where, "input": "none.csv"}, top_n=1)
        with pytest.raises(InvalidJob, match="needs top_n or classes"):
            client.submit_backfill(**where)
        with pytest.raises(InvalidJob, match="No such option '--shard-row'"):
            client.submit_backfill(**where, top_n=1, shard_row=4)
        with pytest.raises(InvalidJob, match="flip: named by the program"):
            client.submit_backfill(**where, top_n=1, flip=True)
        backfill = client.submit_backfill(**where, top_n=1, method="layercam", shard_rows=4, overlays=True)
        status = backfill.wait()
        assert (status.state, status.rows, status.failed) == ("complete", 20, 1)
        assert status == client.backfill(backfill.id).status() == backfill.status()
        assert client.backfill(output).wait(5) == status, "another program may wait for it"
        with pytest.raises(BackfillConflict, match="holds another backfill"):
            client.submit_backfill(**where, top_n=1)

    async def again() -> BackfillStatus:
        async with AsyncGradcamClient(settings=worker.settings) as client:
            worker.idle.set()
            backfill = await client.submit_backfill(
                **{**where, "output": f"{output}-2"}, classes=["red"], shard_rows=4, max_failed=0
            )
            with pytest.raises(WaitTimeout, match=r"not complete after 0\.2 s. It runs on"):
                await backfill.wait(0.2)
            assert (await backfill.status()).state == "running"
            worker.idle.clear()
            with pytest.raises(BackfillStopped, match=r"1 of the 20 rows of .* have failed"):
                await backfill.wait()
            assert not (await backfill.cancel()).was_running
            return await client.backfill(output).status()

    assert asyncio.run(again()) == status
    plan = json.loads(output_of(worker).joinpath("backfill.json").read_text())
    assert "ends_with_parent" not in plan["given"]


def test_a_dry_run_measures_a_few_rows_and_leaves_nothing(
    worker: WorkerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "many.csv"
    uris = [f"s3://in/{number % 50}.png" for number in range(1000)]  # ten of fifty are not there
    listed.write_text("image,id\n" + "".join(f"{uri},{row}\n" for row, uri in enumerate([*uris, "no uri"])))
    command = arguments(listed, worker, "--overlays", "--dry-run", "--price-per-hour", "36")
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["event"] == "estimate"
    assert found["input"] == {"rows": 1001, "total": 1001, "whole": True, "unreadable": {"invalid_row": 1}}
    measured, whole = found["measured"], found["extrapolated"]
    assert measured["rows"] == 2 * 4 + 2 * measured["shard_rows"]  # two shards at a time, in three rounds
    assert measured["failed"].keys() <= {"image_not_found"}
    assert whole["rows"] == 1001
    share = sum(measured["failed"].values()) / measured["rows"]
    assert whole["failed"] == round(1 + share * 1000)
    assert whole["seconds"] == pytest.approx(1000 / measured["rows_per_s"], rel=0.1)
    assert whole["device_hours"] == pytest.approx(whole["seconds"] / 3600, abs=0.001)
    assert whole["price"] == pytest.approx(whole["device_hours"] * 36, abs=0.01)
    assert whole["bytes"] > 1000 * measured["bytes_per_row"] > 0
    assert not output_of(worker).exists(), "nothing is left"
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert re.search(r"read +1,001 rows, all of the input", shown)
    assert re.search(r"measured +\d+ rows by 1 worker: [\d.,]+ rows/s", shown)
    assert re.search(r"extrapolated +1,001 rows, about \d+ of them fail", shown)
    assert re.search(r"price \d", shown)
    again = arguments(listed, worker, "--shard-rows", "500")
    assert main(again) == 0, "it is no beginning of the backfill"


@pytest.mark.usefixtures("environment")
def test_a_dry_run_without_a_worker_says_what_it_has_read(
    image_list: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADCAM_OUTPUT", tmp_path.as_uri())
    output = f"{tmp_path.as_uri()}/x"
    assert main(["backfill", str(image_list), "--output", output, "--dry-run"]) == 5
    out, err = capsys.readouterr()
    assert re.search(r"read +20 rows, all of the input", out)
    assert "Error (no_worker): No worker is alive" in err


@pytest.mark.usefixtures("interruptible")
def test_a_backfill_is_cancelled_by_another_process_while_it_runs_and_after_it_was_stopped(
    worker: WorkerThread, image_list: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.idle.set()
    output = f"file://{output_of(worker)}"
    codes: list[int] = []

    def cancel() -> None:
        while worker.ledger.count_jobs()[0] != 4:
            time.sleep(0.01)
        codes.append(main(["backfill", "status", output]))
        codes.append(main(["backfill", "cancel", output]))

    canceller = threading.Thread(target=cancel)
    canceller.start()
    assert main(arguments(image_list, worker)) == 6
    canceller.join()
    out, err = capsys.readouterr()
    assert codes == [0, 0]
    assert re.search(rf"state +running, by process {os.getpid()} on ", out)
    assert "The backfill was running and is stopped. No shards are in flight." in out
    assert "cancelled on request" in err
    assert worker.ledger.count_jobs() == (0, 0)

    def interrupt() -> None:
        while worker.ledger.count_jobs()[0] != 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert main(arguments(image_list, worker)) == 130
    assert main(["backfill", "cancel", output, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"output": output, "ran": False, "ended": True, "shards_canceled": 4}
    assert worker.ledger.count_jobs() == (0, 0)
    assert main(["backfill", "status", output]) == 0
    assert "0 done, 0 in flight" in capsys.readouterr().out, "the four that the process left were cancelled"


@pytest.mark.parametrize("output", ["photos/2031/out", "photos", ".", "photos/2031"])
def test_files_that_backfills_wrote_are_not_read_as_input(
    worker: WorkerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    base = tmp_path / "results"
    photos = [base / "photos" / name for name in ("0.png", "2031/1.png", "2031/data/2.png", "overlays/3.png")]
    for path in photos:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGE)
        worker.images[path.as_uri()] = IMAGE

    def run(folder: str, *more: str) -> list[str]:
        options = ["--top-n", "1", "--shard-rows", "1", "--overlays", "--output", (base / folder).as_uri()]
        assert main(["backfill", str(base / "photos"), *options, *more]) == 0
        out = capsys.readouterr().out
        assert f"Complete: {len(expected)} of {len(expected)} rows are explained." in out
        files = sorted((base / folder).joinpath("data").glob("*.parquet"))
        return [uri for file in files for uri in pq.read_table(file)["uri"].to_pylist()]

    below = base / output  # what lies below the output is left out, if that lies below the input
    expected = [path.as_uri() for path in photos if "2031" not in output or below not in path.parents]
    assert run(output) == expected
    written = sorted(path for path in (base / output).rglob("*.jpg"))
    assert len(written) == len(expected)
    for more in ("--resume", "--changed"):
        assert run(output, more) == expected
    if expected == [path.as_uri() for path in photos]:
        assert run("photos/another") == expected, "the files of the first are no input of another one"
    assert run(output, "--changed") == expected
    assert sorted(path for path in (base / output).rglob("*.jpg") if "another" not in path.parts) == written


def test_a_backfill_that_explains_no_row_fails_whatever_max_failed_says(
    worker: WorkerThread, image_list: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.images.clear()
    assert main([*arguments(image_list, worker), "--max-failed", "100%"]) == 4
    assert "Nothing is explained: 0 of 20 rows are explained." in capsys.readouterr().out


def test_an_error_is_one_sentence_on_standard_error(
    worker: WorkerThread, image_list: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*command: str) -> str:
        assert main(["backfill", *command]) == 3
        return capsys.readouterr().err

    output = f"file://{output_of(worker)}"
    command = [str(image_list), "--output", output]
    assert "is not allowed: it must be below" in error_of(str(image_list), "--output", "s3://elsewhere/x")
    assert "holds no backfill: there is no backfill.json" in error_of("status", output)
    assert "holds no backfill: there is no backfill.json" in error_of("cancel", output)
    assert "none.csv" in error_of("none.csv", "--output", output)
    assert "There is no class 'purple'" in error_of(*command, "--classes", "purple")
    assert not output_of(worker).joinpath("dataset.json").exists()
    assert main([*arguments(image_list, worker), "--max-failed", "0"]) == 4
    assert capsys.readouterr().err.endswith("More than 0% of the rows have failed.\n")
    assert "Its target is" in error_of(*command, "--top-n", "2", "--shard-rows", "4")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["list.csv"],
        ["list.csv", "--output", "s3://a/b", "--max-failed", "101%"],
        ["list.csv", "--output", "s3://a/b", "--max-failed", "some"],
        ["list.csv", "--output", "s3://a/b", "--max-failed", "50%%"],
        ["list.csv", "--output", "s3://a/b", "--rate", "0"],
        ["list.csv", "--output", "s3://a/b", "--window", "0"],
        ["list.csv", "--output", "s3://a/b", "--shard-rows", "5000"],
        ["list.csv", "--output", "s3://a/b", "--top-n", "3", "--classes", "tabby"],
        ["list.csv", "--output", "s3://a/b", "--artifact", "grid"],
        ["status"],
        ["cancel"],
    ],
)
def test_wrong_usage_is_reported_without_a_traceback(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["backfill", *command]) == 2
    err = capsys.readouterr().err
    assert "Error: " in err
    assert re.search(r"^Usage: \S.* backfill( status| cancel)? \[OPTIONS\] (IN|OUT)PUT$", err, re.MULTILINE)


@pytest.mark.parametrize("command", [["--help"], ["status", "--help"], ["cancel", "-h"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backfill", *command]) == 0
    assert re.search(r"Examples?:\n    gradcam backfill \S+", capsys.readouterr().out)


def test_a_backfill_without_redis_fails_before_it_writes_anything(
    image_list: Path,
    worker: WorkerThread,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("GRADCAM_BROKER_URL", f"redis://127.0.0.1:{free_port}/0")
    assert main(arguments(image_list, worker)) == 5
    assert "cannot be reached" in capsys.readouterr().err
    assert not output_of(worker).exists()


def test_columns_of_the_list_and_what_is_known_of_its_images_are_in_the_dataset(
    worker: WorkerThread, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ['s3://in/0.png,"0,0,10,20",red,5,x', "s3://in/1.png,,,,", "s3://in/2.png,oops,green,6,"]
    where = tmp_path / "known.csv"
    where.write_text("\n".join(["image,box,truth,n,width", *rows]) + "\n")
    known = ["--label", "truth", "--boxes", "box", "--boxes-format", "xyxy", "--classes-from", "truth"]
    assert main(arguments(where, worker, *known)) == 3
    assert "has the column 'width', as the dataset itself" in capsys.readouterr().err
    assert main(arguments(where, worker, *known, "--drop-columns", "width")) == 0
    assert "Column 'box': 1 value is left out" in capsys.readouterr().err
    output = output_of(worker)
    files = sorted((output / "data").iterdir())
    table = pq.read_table(files[0])
    assert table.column_names[-2:] == ["truth", "n"]
    found = {(row["row"], row["truth"], row["n"]) for row in table.to_pylist()}
    assert found == {(0, "red", "5"), (1, None, None), (2, "green", "6")}
    first, *others = table.to_pylist()
    assert (first["truth_ids"], first["correct"], first["truth_boxes"]) == ([0], True, [[0, 0, 10, 20]])
    assert {row["class_name"] for row in others if row["row"] == 2} == {"red", "green"}
    where.write_text(where.read_text().replace("green,6", "green,7"))
    again = ["backfill", "--output", output.as_uri()]
    assert main([*again, "--resume"]) == 3
    assert "The input has changed" in capsys.readouterr().err
    assert main([*again, "--changed"]) == 0
    (file,) = (output / "data").iterdir()
    assert pq.read_table(file)["n"].to_pylist()[-1] == "7"


def test_a_backfill_of_a_list_whose_columns_were_not_carried_goes_on_so(
    worker: WorkerThread, tmp_path: Path
) -> None:
    where = tmp_path / "list.csv"
    where.write_text("image,note,width\n" + "".join(f"s3://in/{row}.png,n{row},1\n" for row in range(6)))
    assert main(arguments(where, worker, "--drop-columns", "*")) == 0
    plan = output_of(worker) / "backfill.json"
    stored = json.loads(plan.read_text())
    del stored["given"]  # as an earlier version wrote it
    plan.write_text(json.dumps(stored))
    assert main(arguments(where, worker, "--resume")) == 0
    assert main(arguments(where, worker, "--changed", "--drop-columns", "width")) == 0
    files = sorted((output_of(worker) / "data").iterdir())
    assert [note for file in files for note in pq.read_table(file)["note"].to_pylist()] == [
        f"n{row}" for row in range(6)
    ]

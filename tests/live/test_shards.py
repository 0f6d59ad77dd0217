"""Shards in real worker processes, over a network that costs nothing: who waits for them, what kills them."""

import base64
import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from devtools.faults import tiny_network, tiny_worker
from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.broker import publisher
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.shard import Row, Shard, data_key
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live]

WAIT_S = 100
SHARDS, IN_HAND, THREADS = 20, 2, 3


def picture(color: tuple[int, int, int]) -> str:
    """A data URI of nothing but one colour (RGB)."""
    data = cv2.imencode(".png", np.full((32, 32, 3), color[::-1], np.uint8))[1].tobytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


def mask() -> str:
    """A data URI of a mask of 16 x 16 pixels, of the left half."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, :8] = 1
    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", pixels)[1].tobytes()).decode()


HEALTHY = [picture((20 * number, 250 - 20 * number, 90)) for number in range(8)]


# What is known of four images: the left half is the object.
KNOWN: list[dict[str, Any]] = [
    {"annotations": {"labels": ["green"], "boxes": [{"xyxy": [0, 0, 16, 32]}]}, "carried": [7]},
    {"annotations": {"mask": {"uri": mask()}, "labels": ["mauve"]}, "classes": ["blue", "red", "green"]},
    {"annotations": {"mask": {"rle": {"size": [32, 32], "counts": [0, 512, 512]}}}, "carried": [9]},
]


def check_annotated(document: StatusDocument, records: list[dict[str, Any]]) -> None:
    """The images have one colour, so that their heat is everywhere the same."""
    assert [one["row"] % 100 for one in records] == [0, 1, 1, 1, 2, 3]
    assert [one["site"] for one in records] == [7, None, None, None, 9, None]
    assert [one["truth_ids"] for one in records] == [[1], [], [], [], None, None]
    assert [one["correct"] for one in records] == [True, None, None, None, None, None]
    for one in records[:-1]:
        assert one["inside_area"] in {0.5, None}
        assert (one["heat_inside"], one["inside_area"]) == (one["inside_area"], one["heat_inside"])
    assert [one["heat_inside"] for one in records] == [0.5, 0.5, None, None, 0.5, None]
    assert [one["heat_features"] is None for one in records] == [False, False, True, True, False, False]
    assert document.rows is not None
    assert document.rows.warnings == {"label_unknown": 1}


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.05)


@dataclass
class Yard:
    """A broker, a folder for what shards leave, and workers; it watches how many shards one has in hand."""

    settings: Settings
    folder: Path
    most: int = 0  # shards that were unacknowledged at once
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger, self.publisher = RedisLedger(self.settings), publisher.Publisher(self.settings)
        self.client = GradcamClient(settings=self.settings)
        self.backfill = new_id()
        facts = {"backfill": self.backfill}
        registry = RedisBackfillRegistry(self.ledger.server)
        self.token = registry.renew(self.settings.output, "me", facts, [], "a token", enter=True).token

    def submit(self, rows: list[str], more: Sequence[dict[str, Any]] = (), **changes: Any) -> Shard:
        number, known = len(self.ids), [*more, *[{}] * (len(rows) - len(more))]
        shard = Shard(
            backfill=self.backfill,
            index=number,
            key=f"{number:08d}-0123456789abcdef",
            first=100 * number,
            rows=tuple(Row.model_validate({"uri": one, **of}) for one, of in zip(rows, known, strict=True)),
            network=tiny_network.NETWORK,
            target={"top_n": 1},  # type: ignore[arg-type]
            output=self.settings.output,
            token=self.token,
            **changes,
        )
        self.ids.append(shard.id)
        self.ledger.submit(shard)
        self.publisher.republish([shard.id], "shard")
        return shard

    def documents(self) -> list[StatusDocument]:
        found = self.ledger.read_many(self.ids)
        return [found[one] for one in self.ids]

    def running(self) -> list[StatusDocument]:
        return [one for one in self.documents() if one.status == "running"]

    def in_hand(self) -> int:
        """Messages of shards that workers hold."""
        held: Any = self.ledger.server.redis.hvals(f"{self.settings.key_prefix}unacked")
        return sum(json.loads(one)[2] == publisher.SHARDS for one in held)

    def table(self, shard: Shard) -> list[dict[str, Any]]:
        path = self.folder / "results" / data_key(shard.key)
        found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return found

    @contextlib.contextmanager
    def worker(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        process = parent_watch.spawn(
            tiny_worker.command(),
            log=self.folder / f"{name}.log",
            environment=self.settings.to_environment(),
            grace_s=self.settings.shutdown_timeout_s + 15,
        )
        try:
            yield process
        finally:
            parent_watch.stop(process)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.03):
                self.most = max(self.most, self.in_hand())

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.fixture
def yard(tmp_path: Path, public_server: Any) -> Iterator[Yard]:
    with servers.valkey(tmp_path) as server:
        settings = Settings(
            broker_url=f"redis://127.0.0.1:{server.port}/0",
            output=f"file://{tmp_path}/results",
            image_schemes=("data", "http"),
            image_hosts=(public_server.host,),
            private_networks=("127.0.0.0/8",),
            lease_s=1,
            lost_after_s=3,
            retry_backoff_s=0.1,
            fetch_timeout_s=300,
            threads=THREADS,
            shards=IN_HAND,
            max_batch=4,
            shutdown_timeout_s=1,
        )
        yield Yard(settings, tmp_path)


def test_shards_leave_room_for_who_is_urgent_survive_their_workers_and_leave_out_what_kills_them(
    yard: Yard, public_server: Any, answer: Any
) -> None:
    asked, opened = threading.Event(), threading.Event()

    def hold() -> None:
        asked.set()
        opened.wait(WAIT_S)

    data = cv2.imencode(".png", np.full((32, 32, 3), 90, np.uint8))[1].tobytes()
    slow = public_server.url("/shards/slow", answer(200, data, before=hold))
    rows = [*HEALTHY[:5], slow, *HEALTHY[5:]]
    shards = [yard.submit(rows) for _ in range(SHARDS)]
    with yard.watched():
        with yard.worker("first") as supervisor:
            wait_for(lambda: len(yard.running()) == IN_HAND, "the shards' start")
            assert asked.wait(WAIT_S)
            for _ in range(THREADS):
                job = yard.client.submit(image=HEALTHY[0], network=tiny_network.NETWORK, target={"top_n": 1})
                assert yard.client.wait(job, WAIT_S).status == "succeeded"
            assert len(yard.running()) == IN_HAND, "nobody waited for a shard"
            time.sleep(2)  # leases
            assert [one.attempt for one in yard.running()] == [1] * IN_HAND
            supervisor.terminate()
            assert supervisor.wait(WAIT_S) == 0
            handed_back = [one for one in yard.documents() if one.attempt]
            assert [(one.status, one.error) for one in handed_back] == [("queued", None)] * IN_HAND
            assert yard.in_hand() == 0
        opened.set()
        with yard.worker("second"):
            wait_for(lambda: all(one.final for one in yard.documents()), "the shards' end")
            assert yard.most == IN_HAND
            poisoned = yard.submit([*HEALTHY[:6], picture(tiny_network.POISON), *HEALTHY[6:]])
            shards += [yard.submit(rows) for _ in range(3)]
            wait_for(lambda: all(one.final for one in yard.documents()), "the end of the poisoned one")
            wish = {"annotated": True, "features": True, "carried": {"site": "int64"}}
            annotated = yard.submit(HEALTHY[:4], KNOWN, **wish)
            wait_for(lambda: yard.documents()[-1].final, "the end of the annotated one")
    check_annotated(yard.documents()[-1], yard.table(annotated))
    yard.ids.pop()
    documents = {one.metadata["shard"]: one for one in yard.documents()}
    assert {one.status for one in documents.values()} == {"succeeded"}
    for shard in shards:
        records = yard.table(shard)
        assert [one["row"] - shard.first for one in records] == [*range(len(rows))]
        assert not any(one["error"] for one in records)
        assert [one | {"row": 0} for one in records] == [one | {"row": 0} for one in yard.table(shards[0])]
    found = yard.table(poisoned)
    assert [one["error"] for one in found] == [None] * 6 + ["worker_lost"] + [None] * 2
    document = documents.pop(str(poisoned.index))
    assert document.attempt == 4, "all together; in groups; row by row; without it"
    assert document.metrics["failed"] == document.metrics["failed_worker_lost"] == 1
    log = (yard.folder / "second.log").read_text()
    assert log.count("exit_code=-9 ") == 3
    assert max(one.attempt for one in documents.values()) == 2, "its neighbours died with it once"

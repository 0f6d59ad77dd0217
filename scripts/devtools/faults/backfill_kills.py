"""A backfill whose submitter and whose two workers are killed at random, again and again."""

import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from devtools.bench import backfill_command, simulated_network, testbed
from devtools.processes import family
from gradcam_worker.operations import servers
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3

NETWORK = "no_time"
WORKERS = 2
PHOTOS, SIZE = 64, (48, 64)  # small ones: what is attacked is the way that rows take
SHORTEST_S, LONGEST_S = 0.5, 3.0  # between two kills
PATIENCE_S = 900
SEED = 0


@dataclass(frozen=True)
class Survived:
    """What became of the rows."""

    rows: int
    kills: int  # of the submitter and of workers, each time all of those that are drawn
    lost: int
    doubled: int
    seconds: float


@contextlib.contextmanager
def place(folder: Path) -> Iterator[Settings]:
    """Servers that outlive everybody, with photos."""
    with servers.valkey(folder) as valkey, servers.s3(folder, ("photos", "results")) as s3_server:
        short = {"lease_s": 2, "lost_after_s": 3, "retry_backoff_s": 0.2}
        settings = testbed.settings_of(folder, valkey, s3_server, **short)
        s3 = S3(settings)
        for number, photo in enumerate(testbed.photographs(PHOTOS, SIZE)):
            s3.put("photos", f"{number:05}.jpg", photo, "image/jpeg")
        yield settings


@contextlib.contextmanager
def _workers(settings: Settings, folder: Path) -> Iterator[None]:
    """Workers that run within the block, and are killed with all their processes at its end."""
    log, passes = folder / "worker.log", str(folder / "passes")
    keepers = [simulated_network.start_worker(settings, log, passes, grace_s=5) for _ in range(WORKERS)]
    try:
        yield
    finally:
        for keeper in keepers:
            for pid in reversed(family(keeper.pid)):  # the program itself before its keeper
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            keeper.wait()
            if keeper.stdin:
                keeper.stdin.close()


def survive(rows: int, kills: int) -> Survived:
    """Run one to its end while it is attacked, and count its rows."""
    draw, begun = random.Random(SEED), time.monotonic()  # noqa: S311  # repeatable, not secret
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradcam-kills-")))
        settings = stack.enter_context(place(folder))
        uris = (f"s3://photos/{number % PHOTOS:05}.jpg" for number in range(rows))
        source = backfill_command.write_input(folder / "input.jsonl", uris)
        output, log = f"{settings.output}/kills", folder / "submitter.log"
        # So slowly that no run is over before the last kill.
        rate = f"{rows / (kills * LONGEST_S):.0f}"
        words = backfill_command.command(source, output, NETWORK, "--shard-rows", "64", "--rate", rate)
        for done in range(kills + 1):
            with backfill_command.started(settings, words, log) as submitter, _workers(settings, folder):
                if done < kills:
                    time.sleep(draw.uniform(SHORTEST_S, LONGEST_S))
                    ended = submitter.poll()
                else:
                    ended = submitter.wait(PATIENCE_S) or None
            if ended is not None:
                tail = log.read_text(errors="replace")[-2000:]
                message = f"The backfill ended with {ended} after {done} of {kills} kills: {tail}"
                raise RuntimeError(message)
            words += [] if "--resume" in words else ["--resume"]
        counted = backfill_command.counted(settings, output, rows)
    return Survived(rows, kills, counted.lost, counted.doubled, time.monotonic() - begun)

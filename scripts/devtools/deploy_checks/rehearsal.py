"""The image, without Docker: made by its Dockerfile, started, timed, tested, stopped.

Target `cpu` is made in a fresh folder as `dockerfile_runner` says. Then the image's command is started with
the image's environment, as the image's user, beside an embedded Valkey and an embedded S3 server, and asked
for /ready. The smoke test of docker/compose.yaml follows, in a container of its own; then SIGTERM, as from
`docker stop`. `scripts/check-deploy --rehearse` prints how long it took.
"""

import contextlib
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from devtools.deploy_checks.dockerfile_runner import Builder, Failed, Made
from gradcam_worker.operations import servers

UID = 10001
READY_WITHIN_S = 15.0  # from its start, on a CPU, with efficientnet_lite0
GIVE_UP_S = 120.0


class Outcome(NamedTuple):
    """What came of it."""

    smoke: str  # what the smoke test printed
    findings: list[str]  # what was not as it should be, however busy this machine is with other things
    made_s: float
    ready_s: float  # from the start of the container's command to the first 200 of /ready
    smoke_s: float


@contextlib.contextmanager
def _servers() -> Iterator[dict[str, str]]:
    """A queue and a store; the settings of a container that uses them."""
    with tempfile.TemporaryDirectory(prefix="gradcam-servers-") as folder, contextlib.ExitStack() as stack:
        valkey = stack.enter_context(servers.valkey(Path(folder)))
        s3 = stack.enter_context(servers.s3(Path(folder), ("photos", "results")))
        yield {
            "GRADCAM_BROKER_URL": f"redis://127.0.0.1:{valkey.port}/0",
            "GRADCAM_OUTPUT": "s3://results/cams",
            "GRADCAM_UPLOADS": "s3://photos/uploads",
            "GRADCAM_S3_ENDPOINT_URL": s3.url,
            "GRADCAM_S3_ACCESS_KEY_ID": s3.access_key_id,
            "GRADCAM_S3_SECRET_ACCESS_KEY": s3.secret_access_key,
            "GRADCAM_PRELOAD": "efficientnet_lite0",
            "GRADCAM_METRICS_PORT": str(servers.free_port()),
        }


def rehearse(target: str = "cpu") -> Outcome:
    """Make the image and run it. Raises Failed, subprocess.TimeoutExpired."""
    with tempfile.TemporaryDirectory(prefix="gradcam-rehearsal-") as scratch:
        begun = time.monotonic()
        builder = Builder(Path(scratch), UID)
        builder.own(builder.folder)
        made = builder.make(target)
        made_s = time.monotonic() - begun
        with _servers() as settings:
            return _run(builder, made, settings, made_s)


def _run(builder: Builder, made: Made, settings: dict[str, str], made_s: float) -> Outcome:
    environment = {**builder.environment(made), **settings}
    temporary = Path(environment["TMPDIR"])  # their /tmp
    log, smoke_log = temporary / "worker.log", temporary / "smoke.log"
    entrypoint = made.words("ENTRYPOINT")

    def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                words,
                cwd=made.place(""),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **builder.as_user,
            )

    def exit_code(words: list[str], log: Path) -> int:
        with start(words, log) as process:
            try:
                return process.wait(GIVE_UP_S)
            finally:
                process.kill()

    since, begun = time.time(), time.monotonic()
    worker = start([*entrypoint, *made.words("CMD")], log)
    try:
        _wait_until_ready(f"http://127.0.0.1:{settings['GRADCAM_METRICS_PORT']}/ready", worker, log)
        ready_s = time.monotonic() - begun
        health = exit_code(made.words("HEALTHCHECK"), temporary / "health.log")
        smoke_code = exit_code([*entrypoint, "demo", "--against-running", str(temporary / "demo")], smoke_log)
        smoke_s = time.monotonic() - begun - ready_s
        worker.terminate()
        code = worker.wait(GIVE_UP_S)
    finally:
        worker.kill()  # the worker processes end with it
        worker.wait()
    user, written = made.started_with["USER"], ", ".join(_written(made.folder, since))
    smoke, worker_said = smoke_log.read_text(errors="replace"), log.read_text(errors="replace")
    checks = [
        (user != f"{UID}:0", f"The image's user is {user}, not {UID}:0."),
        (health, f"The image's health check ended with {health} while the worker was ready."),
        (smoke_code, f"The smoke test ended with {smoke_code}: {smoke[-2000:]}"),
        (code, f"After SIGTERM the worker ended with {code}, not 0. Its log ends: {worker_said[-800:]}"),
        (written, f"The image's command wrote outside /cache and /tmp: {written}"),
    ]
    return Outcome(smoke, [finding for wrong, finding in checks if wrong], made_s, ready_s, smoke_s)


def _wait_until_ready(url: str, worker: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + GIVE_UP_S
    while time.monotonic() < end and worker.poll() is None:
        with contextlib.suppress(OSError):  # also what is answered while it is not ready
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310  # ours, on 127.0.0.1
            return
        time.sleep(0.05)
    tail = log.read_text(errors="replace")[-2000:]
    message = f"The worker ended, or was not ready within {GIVE_UP_S:.0f} s: {tail}"
    raise Failed(message)


def _written(folder: Path, since: float) -> Iterator[str]:
    """Files and folders of the image that are newer, except where it may write: /tmp lies elsewhere."""
    for path in folder.rglob("*"):
        if not path.is_relative_to(folder / "cache") and path.lstat().st_mtime > since:
            yield str(path.relative_to(folder))


def main() -> list[str]:
    """Rehearse, print how long it took, and return what was not as it should be."""
    try:
        outcome = rehearse()
    except (Failed, subprocess.TimeoutExpired) as error:
        return [str(error)]
    allowed = f"(allowed: {READY_WITHIN_S:.0f} s)"
    ready = f"ready {outcome.ready_s:.1f} s after its start {allowed}"
    print(outcome.smoke)
    print(f"Made in {outcome.made_s:.0f} s, {ready}, smoke test {outcome.smoke_s:.1f} s.")
    late = [f"The worker was {ready}: try again on an idle machine."]
    return outcome.findings + late * (outcome.ready_s > READY_WITHIN_S)

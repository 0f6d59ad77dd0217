"""The images, without Docker: made by their Dockerfile, started, timed, tested, stopped.

Target `cpu` is made in a fresh folder as `dockerfile_runner` says. Then the image's command and `gradcam
deliver` are started with the image's environment beside an embedded Valkey and an embedded S3 server, and
asked for /ready: on a read-only root, and not as the image's user but as one that nobody knows, without HOME,
see `read_only_root`. The smoke test of docker/compose.yaml follows, in a container of its own; then SIGTERM,
as from `docker stop`. `scripts/check-deploy --rehearse` prints how long it took, and does the same with
target `client`: the HTTP API, and a job that is submitted to it.
"""

import contextlib
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from devtools.deploy_checks import read_only_root
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


@dataclass(frozen=True)
class Image:
    """A target that was made, and the environment that its containers get here."""

    builder: Builder
    made: Made
    environment: dict[str, str]

    @classmethod
    def make(
        cls, target: str, scratch: Path, settings: dict[str, str], *, copies_packages: bool = False
    ) -> "Image":
        """Make a target below a folder. Raises Failed."""
        builder = Builder(scratch, UID, copies_packages)
        builder.own(builder.folder)
        made = builder.make(target)
        environment = {**builder.environment(made), **settings}
        builder.folder.chmod(0o755)
        Path(environment["TMPDIR"]).chmod(0o1777)  # their /tmp
        if not read_only_root.reason():  # a user whom nobody knows has no home
            del environment["HOME"]
        return cls(builder, made, environment)

    def log(self, name: str) -> Path:
        """The file that `start` writes."""
        return Path(self.environment["TMPDIR"]) / f"{name}.log"

    def start(self, name: str, words: Sequence[str], **variables: str) -> subprocess.Popen[bytes]:
        """Start a container, without its entrypoint."""
        writable = [self.made.place("/cache"), Path(self.environment["TMPDIR"])]
        user = {} if not read_only_root.reason() else self.builder.as_user
        with self.log(name).open("wb") as output:
            return subprocess.Popen(
                read_only_root.command(words, writable),
                cwd=self.made.place(""),
                env=self.environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **user,
            )

    def exit_code(self, name: str, words: Sequence[str]) -> int:
        """Run one to its end."""
        with self.start(name, words) as process:
            try:
                return process.wait(GIVE_UP_S)
            finally:
                process.kill()

    @contextlib.contextmanager
    def running(self, name: str, words: Sequence[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run one until the block is left."""
        process = self.start(name, words, **variables)
        try:
            yield process
        finally:
            process.kill()  # its own processes end with it
            process.wait()

    def wait_until_ready(self, name: str, process: subprocess.Popen[bytes], port: str) -> None:
        """Wait for the first 200 of /ready. Raises Failed."""
        _wait_until_ready(f"http://127.0.0.1:{port}/ready", process, self.log(name))

    def stop(self, name: str, process: subprocess.Popen[bytes]) -> Iterator[str]:
        """Stop one as `docker stop` does; yield what was not right."""
        process.terminate()
        if code := process.wait(GIVE_UP_S):
            tail = self.log(name).read_text(errors="replace")[-800:]
            yield f"After SIGTERM {name} ended with {code}, not 0. Its log ends: {tail}"


def rehearse(target: str = "cpu", *, copies_packages: bool = False) -> Outcome:
    """Make the image, see `Builder`, and run it. Raises Failed, subprocess.TimeoutExpired."""
    with tempfile.TemporaryDirectory(prefix="gradcam-rehearsal-") as scratch, _servers() as settings:
        begun = time.monotonic()
        if copies_packages:  # as the suite does, which need not wait until a worker knows how to be fastest
            settings |= {"GRADCAM_FORWARD": "tensorflow", "GRADCAM_MAX_BATCH": "8"}
        image = Image.make(target, Path(scratch), settings, copies_packages=copies_packages)
        return _run(image, time.monotonic() - begun)


def _run(image: Image, made_s: float) -> Outcome:
    made, port = image.made, image.environment["GRADCAM_METRICS_PORT"]
    entrypoint, second_port = made.words("ENTRYPOINT"), str(servers.free_port())
    since, begun = time.time(), time.monotonic()
    with (
        image.running("worker", [*entrypoint, *made.words("CMD")]) as worker,
        image.running("deliver", [*entrypoint, "deliver"], GRADCAM_METRICS_PORT=second_port) as deliver,
    ):
        image.wait_until_ready("worker", worker, port)
        ready_s = time.monotonic() - begun
        image.wait_until_ready("deliver", deliver, second_port)
        health = image.exit_code("health", made.words("HEALTHCHECK"))
        out = Path(image.environment["TMPDIR"]) / "demo"
        smoke_code = image.exit_code("smoke", [*entrypoint, "demo", "--against-running", str(out)])
        smoke_s = time.monotonic() - begun - ready_s
        ended = [*image.stop("worker", worker), *image.stop("deliver", deliver)]
    user, written = made.started_with["USER"], ", ".join(_written(made.folder, since))
    smoke = image.log("smoke").read_text(errors="replace")
    checks = [
        (user != f"{UID}:0", f"The image's user is {user}, not {UID}:0."),
        (health, f"The image's health check ended with {health} while the worker was ready."),
        (smoke_code, f"The smoke test ended with {smoke_code}: {smoke[-2000:]}"),
        (written, f"The image's command wrote outside /cache and /tmp: {written}"),
    ]
    wrong = [finding for is_wrong, finding in checks if is_wrong]
    return Outcome(smoke, [*wrong, *ended], made_s, ready_s, smoke_s)


def rehearse_client() -> list[str]:
    """Make target `client`, start what it starts, and submit a job; return what was not as it should be.

    Raises Failed, subprocess.TimeoutExpired.
    """
    with tempfile.TemporaryDirectory(prefix="gradcam-rehearsal-") as scratch, _servers() as settings:
        image = Image.make("client", Path(scratch), settings)
        made, port = image.made, str(servers.free_port())
        words = [port if word == "8000" else word for word in made.words("CMD")]
        with image.running("gateway", [*made.words("ENTRYPOINT"), *words]) as gateway:
            image.wait_until_ready("gateway", gateway, port)
            health = image.exit_code("health", made.words("HEALTHCHECK"))
            submit = [*made.words("ENTRYPOINT"), "submit", "s3://photos/any.jpg"]
            submitted = image.exit_code("submit", submit)
            ended = [*image.stop("gateway", gateway)]
        checks = [
            (health, f"The client image's health check ended with {health} while it was ready."),
            (submitted, f"submit ended with {submitted}: {image.log('submit').read_text(errors='replace')}"),
        ]
        return [*(finding for is_wrong, finding in checks if is_wrong), *ended]


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
        outcome, client = rehearse(), rehearse_client()
    except (Failed, subprocess.TimeoutExpired) as error:
        return [str(error)]
    if why := read_only_root.reason():
        print(f"Not as any user, and not on a read-only root: {why}.")
    allowed = f"(allowed: {READY_WITHIN_S:.0f} s)"
    ready = f"ready {outcome.ready_s:.1f} s after its start {allowed}"
    print(outcome.smoke)
    print(f"Made in {outcome.made_s:.0f} s, {ready}, smoke test {outcome.smoke_s:.1f} s.")
    late = [f"The worker was {ready}: try again on an idle machine."]
    return outcome.findings + client + late * (outcome.ready_s > READY_WITHIN_S)

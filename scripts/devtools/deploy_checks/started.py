"""Worker, delivery process, HTTP API and client, each started with the environment that a cluster gives it.

That is what `cluster_environment` says of the chart's own pods, under a release called gradcam, with the
variables of all Services that any release of `helm.RELEASES` would have in the namespace. A client is what
runs in somebody else's pod beside them: it gets these variables, too, and one job explained.

Only what exists in a cluster alone is replaced: the addresses of Redis and S3, and ports and folders.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from devtools.deploy_checks import cluster_environment, helm
from devtools.deploy_checks.wiring import Document, workloads
from gradcam_worker.operations import servers

GIVE_UP_S = 120.0
GRADCAM = (sys.executable, "-P", "-m", "gradcam_worker")
PROBES = ("/live", "/ready", "/startup", "/metrics")


def findings(worker: Sequence[str] = ()) -> Iterator[str]:
    """Start all of them, let the client have an image explained, and stop them.

    Args:
        worker: A program that stands in for `gradcam worker`.
    """
    documents, links = _rendered()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradcam-started-")))
        valkey = stack.enter_context(servers.valkey(folder))
        s3 = stack.enter_context(servers.s3(folder, ("gradcam", "photos")))
        picture = cv2.imencode(".png", np.full((64, 64, 3), 128, np.uint8))[1]
        (s3.root / "photos" / "grey.png").write_bytes(picture.tobytes())
        secret = {
            "GRADCAM_BROKER_URL": f"redis://127.0.0.1:{valkey.port}/0",
            "GRADCAM_S3_ENDPOINT_URL": s3.url,
            "GRADCAM_S3_ACCESS_KEY_ID": s3.access_key_id,
            "GRADCAM_S3_SECRET_ACCESS_KEY": s3.secret_access_key,
        }
        here = {"PATH": os.environ["PATH"], "TMPDIR": str(folder), "KERAS_BACKEND": "tensorflow"}
        pods = {
            each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]["template"]
            for each in workloads(documents)
        }
        begun = {}
        for name in ("worker", "deliver", "gateway"):
            its = links | cluster_environment.given_by_the_chart(documents, pods[name]) | secret
            words = _words(pods[name], worker if name == "worker" else ())
            begun[name] = stack.enter_context(_Process.started(name, words, folder, its | here))
        command = ["submit", "s3://photos/grey.png", "--top-n", "1", "--wait", "--timeout", str(GIVE_UP_S)]
        client = subprocess.run(
            [*GRADCAM, *command],
            env=links | secret | here,
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * GIVE_UP_S,
        )
        if client.returncode:
            yield f"client: it ended with {client.returncode}: {client.stdout}{client.stderr}"
        for process in begun.values():
            yield from process.findings()


def _rendered() -> tuple[list[Document], dict[str, str]]:
    """What a release called gradcam makes, and the variables of the Services of all releases."""
    values = helm.CHART / "ci" / "openshift.yaml"  # with the HTTP API, and every Service that there can be
    releases = {release: helm.template(values, release=release)[0] for release in helm.RELEASES}
    links = [cluster_environment.service_links(documents) for documents in releases.values()]
    return releases["gradcam"], {name: value for each in links for name, value in each.items()}


def _words(pod: Document, stand_in: Sequence[str]) -> list[str]:
    """What a pod's container runs, with a port that is free here."""
    (container,) = pod["spec"]["containers"]
    args = [*container["args"]]
    if "--port" in args:
        args[args.index("--port") + 1] = str(servers.free_port())
    return [*stand_in] or [*GRADCAM, *args]


class _Process:
    """One of them, and what it answers."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self._name, self._process, self._port, self._log = name, process, port, log

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, name: str, words: list[str], folder: Path, environment: dict[str, str]
    ) -> Iterator["_Process"]:
        """Run it until the block is left, with its folders and its port here."""
        port, cache, log = servers.free_port(), folder / name, folder / f"{name}.log"
        cache.mkdir()
        moved = {key: value.replace("/cache", str(cache)) for key, value in environment.items()}
        moved |= {"GRADCAM_METRICS_PORT": str(port), "GRADCAM_METRICS_HOST": "127.0.0.1"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                words, env=moved, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield cls(name, process, port, log)
        finally:
            process.kill()
            process.wait()

    def findings(self) -> Iterator[str]:
        """Wait until it is ready, ask it whatever a cluster asks, and stop it."""
        answers = {path: self._answer(path) for path in ("/ready", *PROBES)}
        wrong = {path: answer for path, answer in answers.items() if answer != "200"}
        self._process.terminate()
        try:
            code: object = self._process.wait(GIVE_UP_S)
        except subprocess.TimeoutExpired:
            code = "no end"
        if wrong or code:
            tail = self._log.read_text(errors="replace")[-2000:]
            yield f"{self._name}: it answered {wrong}, and SIGTERM led to {code}. Its log ends: {tail}"

    def _answer(self, path: str) -> str:
        """200, or the last answer that came in time."""
        end, said = time.monotonic() + GIVE_UP_S, "nothing"
        while time.monotonic() < end and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5).close()
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.read()[:500]!r}"
            except OSError as error:
                said = str(error)
            else:
                return "200"
            time.sleep(0.05)
        return said

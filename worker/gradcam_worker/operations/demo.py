"""`gradcam demo`: explains five photos through a real queue, worker and object store on this machine.

`run` starts a Valkey server, an S3 server and a worker, each in its own process, as in production. They stop
when this process ends, however it ends. `run_against_running` sends the same photos through servers and
workers that run already: a smoke test of a deployment.
"""

import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from rich.live import Live
from rich.table import Table

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.client.results import SettingsObjects
from gradcam_worker.errors import InvalidSettings, WorkerLost
from gradcam_worker.gradcam.classes import DATA, caption, percent
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.gradcam.imaging.sheet import as_tile, sheet
from gradcam_worker.operations import servers
from gradcam_worker.operations.signals import exit_on_sigterm
from gradcam_worker.operations.terminal import console
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

NETWORK = "efficientnet_lite0"
BUCKETS = ("photos", "results")
OUTPUT = "s3://results/demo"
SHUTDOWN_TIMEOUT_S = 10
TIMEOUT_S = 240  # loading TensorFlow from a cold disk can take a minute
TILE_PIXELS = 320 * 240  # of one image on the contact sheet


@dataclass(frozen=True)
class DemoJob:
    """A job of the demo, its photo, and a text that says which classes are explained."""

    photo: Path
    classes: str
    job: Job

    def folder(self, root: Path) -> Path:
        """The folder below `root` for the results."""
        return root / (self.photo.stem + ("-classes" if self.job.target.classes else ""))


def run(folder: Path) -> int:
    """Run the demo.

    Args:
        folder: For the results and the worker's log.

    Returns:
        The exit code: 0 if all jobs succeeded.
    """
    signal.signal(signal.SIGTERM, exit_on_sigterm)  # so that the `with` block stops everything
    started_s = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradcam-demo-")))
        valkey = stack.enter_context(servers.valkey(scratch))
        _print(f"Valkey, for the queue and the ledger, listens on 127.0.0.1:{valkey.port}")
        s3_server = stack.enter_context(servers.s3(scratch, BUCKETS))
        _print(f"An S3 server, for photos and results, listens on {s3_server.url}")
        settings = Settings(
            broker_url=f"redis://127.0.0.1:{valkey.port}/0",
            output=OUTPUT,
            uploads="s3://photos",
            s3_endpoint_url=s3_server.url,
            s3_access_key_id=s3_server.access_key_id,
            s3_secret_access_key=SecretStr(s3_server.secret_access_key),
            preload=(NETWORK,),
            threads=4,
            shutdown_timeout_s=SHUTDOWN_TIMEOUT_S,
        )
        log = folder / "worker.log"
        log.unlink(missing_ok=True)
        worker = servers.gradcam("worker", settings=settings, log=log)
        stack.callback(parent_watch.stop, worker)
        _print(f"A worker is starting: process {worker.pid}, log {log}")
        succeeded = _explain(settings, folder, worker, log)
    if succeeded:
        _print(f"The worker and the servers are stopped. The demo took {time.monotonic() - started_s:.0f} s.")
    return 0 if succeeded else 1


def run_against_running(folder: Path) -> int:
    """Send the photos through the queue, the workers and the storage that the settings name.

    The photos are uploaded to GRADCAM_UPLOADS. Raises also what the client raises.

    Args:
        folder: For a copy of the results.

    Returns:
        The exit code: 0 if all jobs succeeded.

    Raises:
        InvalidSettings: GRADCAM_UPLOADS is not set.
        WorkerLost: No worker runs the jobs.
    """
    settings = Settings.from_environment()
    if not settings.uploads:
        message = "GRADCAM_UPLOADS must name a folder for the photos, as in s3://photos/demo."
        raise InvalidSettings(message)
    folder.mkdir(parents=True, exist_ok=True)
    return 0 if _explain(settings, folder) else 1


def _explain(
    settings: Settings, folder: Path, worker: subprocess.Popen[bytes] | None = None, log: Path | None = None
) -> bool:
    """Submit the jobs, wait, download and print the results; return whether all jobs succeeded."""
    objects = SettingsObjects(settings)
    with GradcamClient(settings=settings) as client:
        jobs = _submit(objects, client, settings.uploads.rstrip("/"))
        documents = _wait(client, jobs, worker, log)
    manifests = _download(objects, jobs, documents, folder)
    _print_results(jobs, documents, manifests)
    if len(manifests) < len(jobs):
        return False
    contact_sheet = _write_contact_sheet(jobs, manifests, folder)
    console.out.print()
    _print(f"Overlays, heatmap arrays and manifests are in {folder}/")
    _print(f"All overlays in one image: {contact_sheet}")
    return True


def _print(text: str) -> None:
    console.out.print(text, markup=False, soft_wrap=True)


def _submit(objects: SettingsObjects, client: GradcamClient, uploads: str) -> list[DemoJob]:
    """Upload the photos; submit a job for the top 3 of each, and one for a list of classes."""
    photos = sorted((DATA / "photos").glob("*.jpg"))
    targets: list[tuple[Path, str, dict[str, Any]]] = [(photo, "top 3", {"top_n": 3}) for photo in photos]
    targets.append((photos[0], "812, football_helmet", {"classes": [812, "football_helmet"]}))
    for photo in photos:
        objects.put(f"{uploads}/{photo.name}", photo.read_bytes(), "image/jpeg")
    jobs = []
    for photo, classes, target in targets:
        fields = {"image": f"{uploads}/{photo.name}", "network": NETWORK, "target": target}
        jobs.append(DemoJob(photo, classes, Job.parse(fields)))
    client.submit_many(demo_job.job for demo_job in jobs)
    _print(f"{len(photos)} photos are in {uploads}, {len(jobs)} jobs are in the queue\n")
    return jobs


def _wait(
    client: GradcamClient, jobs: list[DemoJob], worker: subprocess.Popen[bytes] | None, log: Path | None
) -> dict[str, StatusDocument]:
    """Show the jobs' states until all are final. Raises WorkerLost."""
    end = time.monotonic() + TIMEOUT_S
    with Live(console=console.out, refresh_per_second=8, transient=True) as live:
        while True:
            documents = client.statuses(demo_job.job.id for demo_job in jobs)
            live.update(_status_table(jobs, documents))
            if all(document.final for document in documents.values()):
                return documents
            if (worker and worker.poll() is not None) or time.monotonic() > end:
                told = f" {console.show_log_end(log)}" if log else ""
                message = f"The worker ended or took over {TIMEOUT_S} s.{told}"
                raise WorkerLost(message)
            time.sleep(0.1)


def _status_table(jobs: list[DemoJob], documents: dict[str, StatusDocument]) -> Table:
    table = console.table("photo", "classes", "status")
    for demo_job in jobs:
        status = console.status_text(documents[demo_job.job.id])
        table.add_row(demo_job.photo.name, demo_job.classes, status)
    return table


def _print_results(
    jobs: list[DemoJob], documents: dict[str, StatusDocument], manifests: dict[str, Manifest]
) -> None:
    numbers = ("rank", "id", "probability", "seconds")
    table = console.table("photo", "rank", "id", "class", "probability", "seconds", numbers=numbers)
    for demo_job in jobs:
        document = documents[demo_job.job.id]
        if document.error:
            table.add_row(demo_job.photo.name, "", "", f"[red]{document.error.code}[/]", "", "")
            continue
        seconds = sum(console.durations(document).values()) - document.metrics["queue_s"]
        names, times = [demo_job.photo.name, f"[dim]{demo_job.classes}[/]"], [f"{seconds:.2f}"]
        for explanation in manifests[demo_job.job.id].explanations:
            label, probability = explanation.class_, percent(explanation.probability)
            cells = (str(explanation.rank), str(label.id), label.name, probability)
            table.add_row(names.pop(0) if names else "", *cells, times.pop(0) if times else "")
    console.out.print(table)
    console.out.print()
    for demo_job in jobs:
        document = documents[demo_job.job.id]
        if document.result:
            _print(document.result.manifest_uri)
        elif document.error:
            _print(f"{demo_job.photo.name}: {document.error.detail}")


def _download(
    objects: SettingsObjects, jobs: list[DemoJob], documents: dict[str, StatusDocument], folder: Path
) -> dict[str, Manifest]:
    """Download the results of the jobs that succeeded, each to its own folder; return manifests by job id."""
    manifests = {}
    for demo_job in jobs:
        result = documents[demo_job.job.id].result
        if not result:
            continue
        target = demo_job.folder(folder)
        target.mkdir(exist_ok=True)
        data = objects.read(result.manifest_uri)
        (target / "manifest.json").write_bytes(data)
        manifest = manifests[demo_job.job.id] = Manifest.model_validate_json(data)
        artifacts = (artifact for explanation in manifest.explanations for artifact in explanation.artifacts)
        for uri in {artifact.uri for artifact in artifacts}:
            (target / uri.rpartition("/")[2]).write_bytes(objects.read(uri))
    return manifests


def _write_contact_sheet(jobs: list[DemoJob], manifests: dict[str, Manifest], folder: Path) -> Path:
    """Write an image with a row for each job: the photo, then its overlays; return its path."""
    rows = []
    for demo_job in jobs:
        photo = decode(demo_job.photo.read_bytes()).pixels
        row = [(f"{demo_job.photo.stem}: {demo_job.classes}", as_tile(photo, TILE_PIXELS))]
        for explanation in manifests[demo_job.job.id].explanations:
            uri = next(artifact.uri for artifact in explanation.artifacts if artifact.kind == "overlay")
            overlay = decode((demo_job.folder(folder) / uri.rpartition("/")[2]).read_bytes()).pixels
            title = caption(explanation.class_.id, explanation.class_.name, explanation.probability)
            row.append((title, as_tile(overlay, TILE_PIXELS)))
        rows.append(row)
    file = folder / "contact-sheet.jpg"
    file.write_bytes(encode(sheet(rows)))
    return file

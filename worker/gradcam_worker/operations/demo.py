"""`gradcam demo`: five photos through the real thing, on this machine only.

An embedded Valkey, an embedded S3 server and a worker, each a process of its own, doing what they do
in production. Everything ends with this process, however it ends. `against_running` sends the same photos
through whatever runs already: the smoke test of a deployment.
"""

import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

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
from gradcam_worker.operations import console, servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import ArtifactRecord, Manifest
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

NETWORK = "efficientnet_lite0"
BUCKETS = ("photos", "results")
OUTPUT = "s3://results/demo"
SHUTDOWN_S = 10
TIMEOUT_S = 240  # TensorFlow alone may need a minute to load on a cold disk
TILE = 320 * 240  # pixels of a picture on the contact sheet


@dataclass(frozen=True)
class Asked:
    """A job of the demo and the photo it is about."""

    photo: Path
    wish: str
    job: Job


def run(folder: Path) -> int:
    """Run the demo; results go to `folder`. Returns 0 where all jobs succeeded."""
    signal.signal(signal.SIGTERM, _terminated)  # so that everything is stopped on the way out
    begun = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradcam-demo-")))
        valkey = stack.enter_context(servers.valkey(scratch))
        _say(f"Valkey, the queue and the ledger, listens on 127.0.0.1:{valkey.port}")
        s3_server = stack.enter_context(servers.s3(scratch, BUCKETS))
        _say(f"An S3 server, the object store, listens on {s3_server.url}")
        settings = Settings(
            broker_url=f"redis://127.0.0.1:{valkey.port}/0",
            output=OUTPUT,
            uploads="s3://photos",
            s3_endpoint_url=s3_server.url,
            s3_access_key_id=s3_server.access_key_id,
            s3_secret_access_key=SecretStr(s3_server.secret_access_key),
            preload=(NETWORK,),
            threads=4,
            shutdown_timeout_s=SHUTDOWN_S,
        )
        log = folder / "worker.log"
        log.unlink(missing_ok=True)
        worker = _start_worker(settings, log)
        stack.callback(parent_watch.stop, worker)
        _say(f"A worker is starting (process {worker.pid}, its log is {log})")
        all_well = _explain(settings, folder, worker, log)
    if all_well:
        _say(f"Everything that was started is stopped. It took {time.monotonic() - begun:.0f} s.")
    return 0 if all_well else 1


def against_running(folder: Path) -> int:
    """Send the photos through the queue, the workers and the storage that `GRADCAM_*` name.

    They are put below GRADCAM_UPLOADS; results go to `folder` too. Returns 0 where all jobs succeeded;
    raises InvalidSettings, WorkerLost where no worker takes them, and what the client raises.
    """
    settings = Settings.from_environment()
    if not settings.uploads:
        message = "GRADCAM_UPLOADS must say where the photos may go, as in s3://photos/demo."
        raise InvalidSettings(message)
    folder.mkdir(parents=True, exist_ok=True)
    return 0 if _explain(settings, folder) else 1


def _explain(
    settings: Settings, folder: Path, worker: subprocess.Popen[bytes] | None = None, log: Path | None = None
) -> bool:
    """Submit, watch, download, and print what came of it; whether all jobs succeeded."""
    places = SettingsObjects(settings)
    with GradcamClient(settings=settings) as client:
        asked = _submit(places, client, settings.uploads.rstrip("/"))
        documents = _watch(client, asked, worker, log)
    manifests = _download(places, asked, documents, folder)
    _print_results(asked, documents, manifests)
    if len(manifests) < len(asked):
        return False
    contact_sheet = _contact_sheet(asked, manifests, folder)
    console.out.print()
    _say(f"Overlays, heatmap arrays and manifests are in {folder}/")
    _say(f"The contact sheet is {contact_sheet}")
    return True


def _say(text: str) -> None:
    console.out.print(text, markup=False, soft_wrap=True)


def _terminated(*_: object) -> NoReturn:
    sys.exit(143)


def _start_worker(settings: Settings, log: Path) -> subprocess.Popen[bytes]:
    """The same command that an operator types, in a process of its own."""
    return parent_watch.spawn(
        [sys.executable, "-P", "-m", "gradcam_worker", "worker"],
        log=log,
        environment=settings.to_environment(),
        grace_s=SHUTDOWN_S + 12,
    )


def _submit(places: SettingsObjects, client: GradcamClient, uploads: str) -> list[Asked]:
    """Put the photos below `uploads`, then submit five jobs for the top 3 and one for a list of classes."""
    photos = sorted((DATA / "photos").glob("*.jpg"))
    wishes: list[tuple[Path, str, dict[str, Any]]] = [(photo, "top 3", {"top_n": 3}) for photo in photos]
    wishes.append((photos[0], "812, football_helmet", {"classes": [812, "football_helmet"]}))
    for photo in photos:
        places.put(f"{uploads}/{photo.name}", photo.read_bytes(), "image/jpeg")
    asked = []
    for photo, wish, target in wishes:
        fields = {"image": f"{uploads}/{photo.name}", "network": NETWORK, "target": target}
        asked.append(Asked(photo, wish, Job.parse(fields)))
    client.submit_many(one.job for one in asked)
    _say(f"{len(photos)} photos are in {uploads}, {len(asked)} jobs are in the queue\n")
    return asked


def _watch(
    client: GradcamClient, asked: list[Asked], worker: subprocess.Popen[bytes] | None, log: Path | None
) -> dict[str, StatusDocument]:
    """Show the jobs as they move, until all are final."""
    end = time.monotonic() + TIMEOUT_S
    with Live(console=console.out, refresh_per_second=8, transient=True) as live:
        while True:
            documents = client.statuses(one.job.id for one in asked)
            live.update(_progress(asked, documents))
            if all(document.final for document in documents.values()):
                return documents
            if (worker and worker.poll() is not None) or time.monotonic() > end:
                tail = f" Its last words:\n{log.read_text(errors='replace')[-800:]}" if log else ""
                message = f"The worker ended or took over {TIMEOUT_S} s.{tail}"
                raise WorkerLost(message)
            time.sleep(0.1)


def _progress(asked: list[Asked], documents: dict[str, StatusDocument]) -> Table:
    table = console.table("photo", "asked for", "status")
    for one in asked:
        status = console.status_text(documents[one.job.id])
        table.add_row(one.photo.name, one.wish, status)
    return table


def _print_results(
    asked: list[Asked], documents: dict[str, StatusDocument], manifests: dict[str, Manifest]
) -> None:
    numbers = ("rank", "id", "probability", "seconds")
    table = console.table("photo", "rank", "id", "class", "probability", "seconds", numbers=numbers)
    for one in asked:
        document = documents[one.job.id]
        if document.error:
            table.add_row(one.photo.name, "", "", f"[red]{document.error.code}[/]", "", "")
            continue
        spent = sum(console.seconds(document).values()) - document.metrics["queue_s"]
        left, right = [one.photo.name, f"[dim]{one.wish}[/]"], [f"{spent:.2f}"]
        for seen in manifests[one.job.id].explanations:
            label, probability = seen.class_, percent(seen.probability)
            cells = (str(seen.rank), str(label.id), label.name, probability)
            table.add_row(left.pop(0) if left else "", *cells, right.pop(0) if right else "")
    console.out.print(table)
    console.out.print()
    for one in asked:
        document = documents[one.job.id]
        if document.result:
            _say(document.result.manifest_uri)
        elif document.error:
            _say(f"{one.photo.name}: {document.error.detail}")


def _download(
    places: SettingsObjects, asked: list[Asked], documents: dict[str, StatusDocument], folder: Path
) -> dict[str, Manifest]:
    """Fetch what the jobs that succeeded left behind, a folder for each; return their manifests."""
    manifests = {}
    for one in asked:
        result = documents[one.job.id].result
        if not result:
            continue
        place = _place(folder, one)
        place.mkdir(exist_ok=True)
        data = places.read(result.manifest_uri)
        (place / "manifest.json").write_bytes(data)
        manifest = manifests[one.job.id] = Manifest.model_validate_json(data)
        for uri in {record.uri for seen in manifest.explanations for record in seen.artifacts}:
            (place / uri.rpartition("/")[2]).write_bytes(places.read(uri))
    return manifests


def _contact_sheet(asked: list[Asked], manifests: dict[str, Manifest], folder: Path) -> Path:
    """One row for each job: the photo, then its overlays; return where the picture is."""
    rows = []
    for one in asked:
        if one.job.id not in manifests:
            continue
        photo = decode(one.photo.read_bytes()).pixels
        rows.append([(f"{one.photo.stem}: {one.wish}", as_tile(photo, TILE))])
        for seen in manifests[one.job.id].explanations:
            overlay = next(_name(record) for record in seen.artifacts if record.kind == "overlay")
            pixels = decode((_place(folder, one) / overlay).read_bytes()).pixels
            title = caption(seen.class_.id, seen.class_.name, seen.probability)
            rows[-1].append((title, as_tile(pixels, TILE)))
    file = folder / "contact-sheet.jpg"
    file.write_bytes(encode(sheet(rows)))
    return file


def _place(folder: Path, one: Asked) -> Path:
    return folder / (one.photo.stem + ("-classes" if one.job.target.classes else ""))


def _name(record: ArtifactRecord) -> str:
    return record.uri.rpartition("/")[2]

"""`gradcam explain`: the river without a queue, from files to a folder."""

import logging
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from gradcam_worker.errors import GradcamError, ImageNotFound, InternalError
from gradcam_worker.execution.pipeline import JobContext, run_job
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.classes import percent
from gradcam_worker.operations import console
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.runtime import service_factory
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.settings import Settings

log = logging.getLogger("gradcam")

TIMEOUT_S = 300  # for one image; the first one may have to load VGG16


def explain_files(
    images: tuple[Path, ...],
    wish: dict[str, Any],
    output: Path,
    settings: Settings,
    *,
    as_json: bool,
) -> int:
    """Explain files one after the other, each into its own folder below `output`; 1 if any failed.

    `wish` holds the fields of a job that are the same for all: network, target, method. What fails for one
    file does not stop the others. Raises what stands in the way of all: InvalidJob, UnknownNetwork,
    NetworkIncompatible, WeightsUnavailable, UnknownClass; KeyboardInterrupt once what was done by then has
    been shown.
    """
    output = output.absolute()
    own: dict[str, Any] = {"image_schemes": ("file",), "image_roots": ("/",), "output": output.as_uri()}
    service_factory.prepare(settings)
    services = service_factory.build_services(
        settings.model_copy(update=own | {"max_batch": 1})
    )  # one after the other
    job = Job.parse({"image": "file:///", "timeout_s": TIMEOUT_S, **wish})
    network = services.model_cache.load(services.networks.find(job.network))
    network.labels.select(top_n=job.target.top_n, classes=job.target.classes)
    folders = _folders(images)
    made: dict[Path, Manifest | GradcamError] = {}
    stopped = False
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console.err, transient=True) as progress:
        try:
            for image in progress.track(images, description=f"explaining with {job.network}"):
                made[image] = _one(job, image, services, folders[image], output)
        except KeyboardInterrupt:
            stopped = True
    if as_json:
        console.print_json([_record(image, result) for image, result in made.items()])
    else:
        _print(made, folders, output)
    if stopped:
        raise KeyboardInterrupt
    return 1 if any(isinstance(result, GradcamError) for result in made.values()) else 0


def _folders(images: tuple[Path, ...]) -> dict[Path, str]:
    """A folder name for each image: its own, numbered where two share it."""
    taken: set[str] = set()
    folders = {}
    for image in images:
        stem = image.stem.strip(".") or "image"  # a file may be called `...jpg`
        name, number = stem, 1
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name)
        folders[image] = name
    return folders


def _one(job: Job, image: Path, services: Services, folder: str, output: Path) -> Manifest | GradcamError:
    context = JobContext(Deadline(TIMEOUT_S), lambda _: None)
    own = job.model_copy(update={"image": job.image.model_copy(update={"uri": image.absolute().as_uri()})})
    if image.is_dir():
        return ImageNotFound(f"{image} is a folder: name the files in it, as in {image}/*.jpg.")
    try:
        run_job(own, services, context, folder=folder)
        return Manifest.model_validate_json((output / folder / "manifest.json").read_bytes())
    except GradcamError as error:
        return error
    except Exception as error:
        log.debug("%s cannot be explained", image, exc_info=True)
        return InternalError.of(error)


def _record(image: Path, result: Manifest | GradcamError) -> dict[str, Any]:
    if isinstance(result, GradcamError):
        return {"image": str(image), "error": {"code": result.code, "detail": str(result)}}
    return {"image": str(image), "manifest": result.model_dump(mode="json")}


def _print(made: dict[Path, Manifest | GradcamError], folders: dict[Path, str], output: Path) -> None:
    manifests = [result for result in made.values() if isinstance(result, Manifest)]
    metrics = [
        *dict.fromkeys(name for one in manifests for seen in one.explanations for name in seen.metrics)
    ]
    numbers = ("rank", "id", "probability", *metrics)
    table = console.table("image", "folder", "rank", "id", "class", "probability", *metrics, numbers=numbers)
    failed = {image: result for image, result in made.items() if isinstance(result, GradcamError)}
    for image, result in made.items():
        if isinstance(result, GradcamError):
            continue
        for warned in result.warnings:
            said = console.plain(console.warning_text(warned))
            console.err.print(console.plain(str(image), "yellow"), said, soft_wrap=True)
        names = [console.plain(image.name), console.plain(f"{folders[image]}/")]
        for seen in result.explanations:
            label, probability = seen.class_, percent(seen.probability)
            measured = [f"{seen.metrics[name]:.3f}" if name in seen.metrics else "" for name in metrics]
            row = (str(seen.rank), str(label.id), console.plain(label.name), probability)
            table.add_row(*names, *row, *measured)
            names = [console.plain(""), console.plain("")]
    if table.rows:
        console.out.print(table)
        console.out.print()
        console.out.print(console.plain(f"Overlays, arrays and manifests are below {output}"), soft_wrap=True)
    if failed:
        console.err.print(f"{len(failed)} of {len(made)} could not be explained:")
    for image, error in failed.items():
        said = console.plain(f"{error.code}: {error}")
        console.err.print(console.plain(str(image), "red"), said, soft_wrap=True)

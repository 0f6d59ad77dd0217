"""`gradcam explain`: explains image files without a queue, into a folder."""

from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from gradcam_worker.errors import GradcamError, ImageNotFound, InternalError
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.execution.scoring import method_of
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.classes import percent, versus
from gradcam_worker.gradcam.explain import values_of
from gradcam_worker.gradcam.methods import masking
from gradcam_worker.operations.terminal import console
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.runtime import service_factory
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.options import default_target, is_default_target
from gradcam_worker.schemas.status import PassState
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

TIMEOUT_S = 300  # for one image; the first one also waits until the network is loaded
IN_PASSES_TIMEOUT_S = 3600  # by a method that scores the image a thousand times


def explain_files(
    images: tuple[Path, ...],
    spec: dict[str, Any],
    output: Path,
    settings: Settings,
    *,
    as_json: bool,
) -> int:
    """Explain files one after the other, and print the results. A file that fails does not stop the others.

    Args:
        images: The files.
        spec: Fields of a job that are the same for all: network, target, method and so on.
        output: Folder for the results; each image gets a folder in it.
        settings: Where weights and networks are.
        as_json: Print JSON.

    Returns:
        The exit code: 1 if any file failed.

    Raises:
        InvalidJob, InvalidNetworkInput, UnknownNetwork, NetworkIncompatible, MethodNotSupported,
            WeightsUnavailable, UnknownClass: No file can be explained.
        KeyboardInterrupt: After the results so far were printed.
    """
    output = output.absolute()
    changes = {
        "image_schemes": ("file",),
        "image_roots": ("/",),
        "output": output.as_uri(),
        "max_batch": 1,  # files are explained one after the other
    }
    service_factory.prepare(settings)
    services = service_factory.build_services(settings.model_copy(update=changes))
    fields = {"image": "file:///", "timeout_s": TIMEOUT_S, **spec}
    job = Job.parse({**fields, "target": default_target(spec["target"])})
    network = services.inference.load(services.networks.find(job.network))
    if is_default_target(spec["target"]):
        job = Job.parse({**fields, "target": default_target(spec["target"], len(network.labels))})
    selected = network.labels.select(top_n=job.target.top_n, classes=job.target.classes)
    network.labels.select_against(job.target.against, selected)
    values_of(network.facts, job.inputs)
    in_passes = masking.is_masking(method_of(job.method, network.facts))
    timeout_s = IN_PASSES_TIMEOUT_S if in_passes else TIMEOUT_S
    folders = _folders(images)
    results: dict[Path, Manifest | GradcamError] = {}
    interrupted = False
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console.err, transient=True) as progress:
        try:
            description = f"explaining with {job.network}"
            task = progress.add_task(description, total=len(images))

            def show(passes: PassState | None) -> None:
                part = f", pass {passes.done} of {passes.total}" if passes else ""
                progress.update(task, description=description + part)

            for image in images:
                context = JobContext(
                    Deadline(timeout_s), lambda stage: show(stage.passes), created_at=utc_now()
                )
                results[image] = _explain_file(job, image, services, folders[image], output, context)
                progress.advance(task)
        except KeyboardInterrupt:
            interrupted = True
    if as_json:
        console.print_json([_result_facts(image, result) for image, result in results.items()])
    else:
        _print_results(results, folders, output)
    if interrupted:
        raise KeyboardInterrupt
    return 1 if any(isinstance(result, GradcamError) for result in results.values()) else 0


def _folders(images: tuple[Path, ...]) -> dict[Path, str]:
    """Choose a folder name for each image: the name of its file, numbered if two are the same."""
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


def _explain_file(
    job: Job, image: Path, services: Services, folder: str, output: Path, context: JobContext
) -> Manifest | GradcamError:
    file_job = job.model_copy(
        update={"image": job.image.model_copy(update={"uri": image.absolute().as_uri()})}
    )
    if image.is_dir():
        return ImageNotFound(f"{image} is a folder: name the files in it, as in {image}/*.jpg.")
    try:
        run_job(file_job, services, context, folder=folder)
        return Manifest.model_validate_json((output / folder / "manifest.json").read_bytes())
    except GradcamError as error:
        return error
    except Exception as error:  # noqa: BLE001  # an unexpected failure of one file does not stop the others
        log.debug("file_explanation_failed", image=image, error=error)
        return InternalError.of(error)


def _result_facts(image: Path, result: Manifest | GradcamError) -> dict[str, Any]:
    if isinstance(result, GradcamError):
        return {"image": str(image), "error": {"code": result.code, "detail": str(result)}}
    return {"image": str(image), "manifest": result.model_dump(mode="json")}


def _print_results(
    results: dict[Path, Manifest | GradcamError], folders: dict[Path, str], output: Path
) -> None:
    manifests = {image: result for image, result in results.items() if isinstance(result, Manifest)}
    failures = {image: result for image, result in results.items() if isinstance(result, GradcamError)}
    explanations = [explanation for manifest in manifests.values() for explanation in manifest.explanations]
    metrics = [*dict.fromkeys(name for explanation in explanations for name in explanation.metrics)]
    numbers = ("rank", "id", "probability", *metrics)
    table = console.table("image", "folder", "rank", "id", "class", "probability", *metrics, numbers=numbers)
    for image, manifest in manifests.items():
        for warning in manifest.warnings:
            _print_about(image, "yellow", console.warning_text(warning))
        names = [console.plain(image.name), console.plain(f"{folders[image]}/")]
        for explanation in manifest.explanations:
            label, probability = explanation.class_, percent(explanation.probability)
            values = explanation.metrics
            measured = [f"{values[name]:.3f}" if name in values else "" for name in metrics]
            name = ", ".join(filter(None, (label.name, versus(manifest.against))))
            row = (str(explanation.rank), str(label.id), console.plain(name), probability)
            table.add_row(*names, *row, *measured)
            names = [console.plain(""), console.plain("")]
    if table.rows:
        console.out.print(table)
        console.out.print()
        console.out.print(console.plain(f"Overlays, arrays and manifests are in {output}"), soft_wrap=True)
    if failures:
        console.err.print(f"{len(failures)} of {len(results)} could not be explained:")
    for image, error in failures.items():
        _print_about(image, "red", f"{error.code}: {error}")


def _print_about(image: Path, style: str, text: str) -> None:
    console.err.print(console.plain(str(image), style), console.plain(text), soft_wrap=True)

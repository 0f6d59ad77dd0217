"""The commands about a job: explain, submit, status, cancel."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradcam_worker.cli.options import explanation_options, json_option, with_default_target
from gradcam_worker.errors import GradcamError, InvalidSettings
from gradcam_worker.operations.terminal import console
from gradcam_worker.schemas.job import Job, describe_missing_scheme
from gradcam_worker.schemas.model import EXAMPLES
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets

if TYPE_CHECKING:
    from gradcam_worker.client.client import GradcamClient

status_json_option = json_option("Print the status document as JSON.")


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@explanation_options
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="explained",
    show_default=True,
    help="Folder for the results; each image gets a folder in it.",
)
def explain(images: tuple[Path, ...], output: Path, *, spec: dict[str, Any], as_json: bool) -> int:
    """Explain image files without a queue.

    Everything runs in this process, on this machine. An image that cannot be explained does not stop the
    others. Exit code 1 if any image failed.

    \b
    Example:
      gradcam explain cat.jpg
      gradcam explain *.jpg --network vgg16 --top-n 5 -o out
      gradcam explain pier.jpg --classes pier,dock,460
      gradcam explain cat.jpg --classes "Egyptian cat" --against tabby,lynx
      gradcam explain scan.png --network tumours --classes '"benign, no finding",malignant'
      gradcam explain cat.jpg --artifact report --artifact overlay:png --metric deletion
    """
    if not any(image.exists() for image in images):
        message = f"there is no file {images[0]}" + (
            ", and none of the others exists" if len(images) > 1 else ""
        )
        raise click.UsageError(message)
    from gradcam_worker.operations.explain import explain_files

    return explain_files(images, spec, output, Settings.from_environment(), as_json=as_json)


def _parse_annotations(_: click.Context, option: click.Parameter, text: str | None) -> dict[str, Any] | None:
    """Click callback of what is known of an image; None: not given."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        message = f"{text[:60]!r} is no object of JSON: write it as in {EXAMPLES['annotations']}"
        raise click.BadParameter(message, param=option)
    return found


@click.command()
@click.argument("uri")
@explanation_options
@click.option(
    "--upload", is_flag=True, help="URI is a file on this machine: upload it to GRADCAM_UPLOADS first."
)
@click.option(
    "--annotations",
    metavar="JSON",
    callback=_parse_annotations,
    help='What is known of the image: labels, boxes or a mask, as in \'{"labels": ["tabby"]}\'. Then the '
    "manifest says whether the heat lies on the object.",
)
@click.option("--wait/--no-wait", default=False, help="Wait until the job is final, and show the result.")
@click.option(
    "--timeout", "timeout_s", default=120.0, show_default=True, help="Longest time to wait, in seconds."
)
@click.option("--key", "idempotency_key", help="Idempotency key: a second job with the same key is not run.")
@click.option("--retry-failed", is_flag=True, help="If the job with this key has failed, run it again.")
def submit(
    uri: str,
    timeout_s: float,
    idempotency_key: str | None,
    *,
    retry_failed: bool,
    spec: dict[str, Any],
    upload: bool,
    annotations: dict[str, Any] | None,
    wait: bool,
    as_json: bool,
) -> int:
    """Submit a job for the image at URI.

    Prints the id of the job, or with --wait its result.

    \b
    Example:
      gradcam submit s3://photos/cat.jpg --top-n 3 --wait
      gradcam submit s3://photos/pier.jpg --network vgg16 --classes pier,dock
      gradcam submit s3://photos/cat.jpg --key order-42 --retry-failed
      gradcam submit pier.jpg --upload
    """
    from gradcam_worker.client.client import GradcamClient

    if not upload and (why := describe_missing_scheme(uri)):
        message = f"{why}, or use --upload"
        raise click.UsageError(message)
    if upload and ("://" in uri or uri.startswith("data:")):
        message = (
            f"--upload takes a file on this machine, but {without_secrets(uri)[:200]} is a URI: omit --upload"
        )
        raise click.UsageError(message)
    settings = Settings.from_environment()
    if upload and not settings.uploads:
        message = "--upload needs GRADCAM_UPLOADS, the folder for uploads: set it, as in s3://photos/uploads."
        raise InvalidSettings(message)
    known = {"annotations": annotations} if annotations else {}
    fields = {"idempotency_key": idempotency_key, **with_default_target(spec, settings.networks), **known}
    job = None if upload else Job.parse({"image": uri, **fields})
    client = GradcamClient(settings=settings)
    if job:
        job_id = client.submit(job, retry_failed=retry_failed)
    else:
        job_id = client.upload_and_submit(uri, retry_failed=retry_failed, **fields)
    if not wait:  # before anything else can fail: the job is accepted
        console.print_json({"id": job_id}) if as_json else console.out.print(job_id)
    if idempotency_key and not retry_failed:
        _print_retry_hint(client, job_id)
    if not wait:
        return 0
    with console.err.status(f"waiting for job {job_id}"):
        document = client.wait(job_id, timeout_s)
    return _show_outcome(document, as_json=as_json)


def _print_retry_hint(client: "GradcamClient", job_id: str) -> None:
    """Print how to run the job again if it has failed. An error here does not fail the command."""
    with suppress(GradcamError):
        if client.status(job_id).status == "failed":
            hint = f"Job {job_id} has this key and has failed: --retry-failed runs it again."
            console.err.print(hint, markup=False, soft_wrap=True)


@click.command()
@click.argument("job_id")
@status_json_option
def status(job_id: str, *, as_json: bool) -> int:
    """Show the status of a job.

    Exit code 1 if it failed, expired or was cancelled.

    \b
    Example:
      gradcam status 01a2062b-306e-7164-a139-13398da125f6
    """
    from gradcam_worker.client.client import GradcamClient

    return _show_outcome(GradcamClient(settings=Settings.from_environment()).status(job_id), as_json=as_json)


@click.command()
@click.argument("job_id")
@status_json_option
def cancel(job_id: str, *, as_json: bool) -> int:
    """Cancel a job.

    A queued job is cancelled at once, a running one as soon as its worker notices. Exit code 1 if the job
    had finished already.

    \b
    Example:
      gradcam cancel 01a2062b-306e-7164-a139-13398da125f6
    """
    from gradcam_worker.client.client import GradcamClient

    document = GradcamClient(settings=Settings.from_environment()).cancel(job_id)
    _print(document, as_json=as_json)
    if document.final and document.status != "canceled":
        console.err.print(f"Too late: the job is already final, with status {document.status}.")
        return 1
    return 0


def _show_outcome(document: StatusDocument, *, as_json: bool) -> int:
    """Print a status document; return the exit code: 1 if the job is final without success."""
    _print(document, as_json=as_json)
    return 1 if document.final and document.status != "succeeded" else 0


def _print(document: StatusDocument, *, as_json: bool) -> None:
    if as_json:
        console.print_json(document.model_dump(mode="json"))
    else:
        console.show_status(document)

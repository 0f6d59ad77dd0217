"""The commands about one job: explain | submit | status | cancel."""

import functools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from gradcam_worker.errors import GradcamError, InvalidSettings
from gradcam_worker.operations import console
from gradcam_worker.schemas.job import Job, describe_missing_scheme
from gradcam_worker.schemas.options import MethodSpec, Metric
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets

if TYPE_CHECKING:
    from gradcam_worker.client.client import GradcamClient

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULT_NETWORK = "efficientnet_lite0"
METHODS, SCORES, NORMALIZE = (
    get_args(MethodSpec.model_fields[name].annotation) for name in ("name", "score", "normalize")
)


def explanation_options(command: Command) -> Command:
    """The options that say what to explain, the same for every command that takes them.

    The command gets them as `spec`: fields of a job.
    """

    @functools.wraps(command)
    def with_spec(
        *,
        network: str,
        top_n: int | None,
        classes: tuple[str, ...] | None,
        method: str,
        layer: str | None,
        score: str,
        normalize: str,
        flip: bool,
        artifacts: tuple[str, ...],
        metrics: tuple[str, ...],
        **others: Any,
    ) -> Any:
        how = {"name": method, "layer": layer, "score": score, "normalize": normalize, "flip": flip}
        spec: dict[str, Any] = {
            "network": network,
            "target": _target(top_n, classes),
            "method": how,
            "metrics": metrics,
        }
        if artifacts:
            spec["artifacts"] = [_artifact(one) for one in artifacts]
        return command(spec=spec, **others)

    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines."),
        click.option("--metric", "metrics", type=click.Choice(get_args(Metric)), multiple=True),
        click.option(
            "--artifact",
            "artifacts",
            metavar="KIND[:FORMAT]",
            multiple=True,
            help="overlay, heatmap, grid, animation or report; as often as wanted. [overlay heatmap]",
        ),
        click.option(
            "--classes",
            metavar="A,B,...",
            multiple=True,
            callback=console.comma_list,
            help="Ids, wnids or names, instead of --top-n; as often as wanted. A name with a comma stands in "
            "quotes: '\"crane, bird\"'.",
        ),
        click.option("--top-n", type=click.IntRange(1, 1000), help="The n most probable classes. [3]"),
        click.option("--flip/--no-flip", default=False, help="Smooth: average with the mirror image's map."),
        click.option("--normalize", type=click.Choice(NORMALIZE), default=NORMALIZE[0], show_default=True),
        click.option("--score", type=click.Choice(SCORES), default=SCORES[0], show_default=True),
        click.option("--layer", help="Any layer, or auto: found in the graph. [the network's own]"),
        click.option("--method", type=click.Choice(METHODS), default=METHODS[0], show_default=True),
        click.option("--network", default=DEFAULT_NETWORK, show_default=True, help="See `gradcam networks`."),
    ):
        with_spec = option(with_spec)
    return with_spec  # type: ignore[return-value]  # it is called by click alone, by names


def _artifact(text: str) -> dict[str, str]:
    """`overlay:png` -> an artifact's fields; `Job` checks kind and format."""
    kind, _, form = text.partition(":")
    return {"kind": kind, "format": form} if form else {"kind": kind}


def _target(top_n: int | None, classes: tuple[str, ...] | None) -> dict[str, Any]:
    if top_n and classes is not None:
        message = "give --top-n or --classes, not both"
        raise click.UsageError(message)
    if classes is None:
        return {"top_n": top_n or 3}
    return {"classes": list(classes)}


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@explanation_options
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="explained",
    show_default=True,
    help="Where results go, a folder for each image.",
)
def explain(images: tuple[Path, ...], output: Path, *, spec: dict[str, Any], as_json: bool) -> int:
    """Explain IMAGES here and now: no queue, no servers.

    One that cannot be explained does not stop the others. Exit code 1 where any failed.

    \b
    Examples:
      gradcam explain cat.jpg
      gradcam explain *.jpg --network vgg16 --top-n 5 -o out
      gradcam explain pier.jpg --classes pier,dock,460
      gradcam explain scan.png --network tumours --classes '"benign, no finding",malignant'
      gradcam explain cat.jpg --artifact report --artifact overlay:png --metric deletion
    """
    if not any(image.exists() for image in images):
        message = f"there is no file {images[0]}" + (", nor any other of these" if len(images) > 1 else "")
        raise click.UsageError(message)
    from gradcam_worker.operations.explain import explain_files

    return explain_files(images, spec, output, Settings.from_environment(), as_json=as_json)


@click.command()
@click.argument("uri")
@explanation_options
@click.option("--upload", is_flag=True, help="URI is a file of this machine: put it below GRADCAM_UPLOADS.")
@click.option("--wait/--no-wait", default=False, help="Wait until the job has ended, and show the result.")
@click.option("--timeout", "timeout_s", default=120.0, show_default=True, help="Seconds to wait.")
@click.option("--key", "idempotency_key", help="Idempotency key: the same key never runs twice.")
@click.option(
    "--retry-failed", is_flag=True, help="Where the job of this key has failed, try it again. [leave it]"
)
def submit(
    uri: str,
    timeout_s: float,
    idempotency_key: str | None,
    *,
    retry_failed: bool,
    spec: dict[str, Any],
    upload: bool,
    wait: bool,
    as_json: bool,
) -> int:
    """Queue the image at URI for a worker.

    \b
    Examples:
      gradcam submit s3://photos/cat.jpg --top-n 3 --wait
      gradcam submit s3://photos/pier.jpg --network vgg16 --classes pier,dock
      gradcam submit s3://photos/cat.jpg --key order-42 --retry-failed
      gradcam submit pier.jpg --upload
    """
    from gradcam_worker.client.client import GradcamClient

    if not upload and (why := describe_missing_scheme(uri)):
        message = f"{why}, or say --upload"
        raise click.UsageError(message)
    if upload and ("://" in uri or uri.startswith("data:")):
        message = (
            f"--upload takes a file of this machine, and {without_secrets(uri)[:200]} is a URI: leave it out"
        )
        raise click.UsageError(message)
    settings = Settings.from_environment()
    if upload and not settings.uploads:
        message = "--upload needs to know where images go: set GRADCAM_UPLOADS, as in s3://photos/uploads."
        raise InvalidSettings(message)
    fields = {"idempotency_key": idempotency_key, **spec}
    job = None if upload else Job.parse({"image": uri, **fields})
    client = GradcamClient(settings=settings)
    if job:
        job_id = client.submit(job, retry_failed=retry_failed)
    else:
        job_id = client.upload_and_submit(uri, retry_failed=retry_failed, **fields)
    if not wait:  # first of all: the job is accepted, whatever comes now
        console.print_json({"id": job_id}) if as_json else console.out.print(job_id)
    if idempotency_key and not retry_failed:
        _hint_at_failure(client, job_id)
    if not wait:
        return 0
    with console.err.status(f"waiting for job {job_id}"):
        document = client.wait(job_id, timeout_s)
    return _shown(document, as_json=as_json)


def _hint_at_failure(client: "GradcamClient", job_id: str) -> None:
    """Say where the job that has the key has failed. A courtesy: it fails no command."""
    with suppress(GradcamError):
        if client.status(job_id).status == "failed":
            said = f"Job {job_id} has this key, and has failed: --retry-failed tries it again."
            console.err.print(said, markup=False, soft_wrap=True)


@click.command()
@click.argument("job_id")
@click.option("--json", "as_json", is_flag=True, help="Print the status document as JSON.")
def status(job_id: str, *, as_json: bool) -> int:
    """Show what has become of a job. Exit code 1 where it failed.

    \b
    Example:
      gradcam status 01a2062b-306e-7164-a139-13398da125f6
    """
    from gradcam_worker.client.client import GradcamClient

    return _shown(GradcamClient(settings=Settings.from_environment()).status(job_id), as_json=as_json)


@click.command()
@click.argument("job_id")
@click.option("--json", "as_json", is_flag=True, help="Print the status document as JSON.")
def cancel(job_id: str, *, as_json: bool) -> int:
    """Stop a job: at once while it waits, else as soon as its worker sees it.

    Exit code 1 where it had ended already.

    \b
    Example:
      gradcam cancel 01a2062b-306e-7164-a139-13398da125f6
    """
    from gradcam_worker.client.client import GradcamClient

    document = GradcamClient(settings=Settings.from_environment()).cancel(job_id)
    _print(document, as_json=as_json)
    if document.final and document.status != "canceled":
        console.err.print(f"Too late: the job had ended, as {document.status}.")
        return 1
    return 0


def _shown(document: StatusDocument, *, as_json: bool) -> int:
    _print(document, as_json=as_json)
    return 1 if document.final and document.status != "succeeded" else 0


def _print(document: StatusDocument, *, as_json: bool) -> None:
    if as_json:
        console.print_json(document.model_dump(mode="json"))
    else:
        console.show(document)

"""Runs one job, from the URI of its image to its manifest."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from gradcam_worker.artifacts import artifacts
from gradcam_worker.artifacts.render import render
from gradcam_worker.errors import ImageForbidden, ImageNotFound, InvalidJob
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.network import Method
from gradcam_worker.images.prepare import fetch_image
from gradcam_worker.observability import tracing
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.shard import Work, terms_of
from gradcam_worker.schemas.status import (
    ClassScore,
    ManifestRef,
    NetworkRef,
    ResultWarning,
    RowSearch,
    RowState,
)
from gradcam_worker.storage.stores import Store
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")


@dataclass(frozen=True)
class JobResult:
    """The fields of the status document of a job that succeeded."""

    network: NetworkRef
    predictions: tuple[ClassScore, ...]
    result: ManifestRef
    warnings: tuple[ResultWarning, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    rows: RowState | None = None  # of a shard's rows


@dataclass(frozen=True)
class Progress:
    """The fields of the status document that say how far a job is."""

    stage: str  # shown to people
    rows: RowState | None = None  # of a shard's rows: what other processes need to know


@dataclass
class JobContext:
    """One attempt at a job: its deadline, its current stage, and how long each stage took."""

    deadline: Deadline
    report_progress: Callable[[Progress], None]  # called when a stage begins
    attempt: int = 1
    current_stage: str = "check"
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: Callable[[Progress], None] = lambda _: None  # reports what must survive this process
    after_crash: bool = False  # a worker died while it ran this job
    row_search: RowSearch | None = None  # of a shard: state of the search for the row that killed the worker
    is_last_attempt: bool = False

    @contextmanager
    def enter_stage(self, stage: str) -> Iterator[None]:
        """Report a stage, and measure how long the block takes.

        Raises:
            JobTimeout: The deadline passed.
        """
        self.current_stage = stage
        self.deadline.check(stage)
        self.report_progress(Progress(stage))
        begun_s = time.monotonic()
        try:
            with tracing.span(stage):
                yield
        finally:
            self.metrics[f"{stage}_s"] = took_s = round(time.monotonic() - begun_s, 4)
            log.debug("job_stage_finished", stage=stage, took_s=took_s)


def run_job(job: Job, services: Services, context: JobContext, *, folder: str | None = None) -> JobResult:
    """Run one job.

    Args:
        job: The job.
        services: The services that it uses.
        context: This attempt. After an error, `current_stage` names the stage that raised it.
        folder: Folder of the artifacts in the output; by default the job's id.

    Returns:
        The fields of the status document of a job that succeeded.

    Raises:
        GradcamError: The job failed.
    """
    with ExitStack() as resources:
        return _explain(job, services, context, resources, folder or job.id)


def _explain(
    job: Job, services: Services, context: JobContext, resources: ExitStack, folder: str
) -> JobResult:
    store = admit(job, services)
    bulk = job.priority == "bulk"
    with services.model_cache.reserve() as slot:
        with context.enter_stage("fetch"):
            find_result = partial(_find_result, job, services, context, store, folder)
            if job.image.sha256 and (result := find_result(job.image.sha256)):
                return result  # whether or not the image still exists
            try:
                fetched = resources.enter_context(fetch_image(job.image, services, context.deadline))
            except (ImageNotFound, ImageForbidden):
                # Without the image there is no checksum to compare with the manifest's.
                if not job.image.sha256 and (result := find_result(None)):
                    return result
                raise
            if not job.image.sha256 and (result := find_result(fetched.sha256)):
                return result
        with context.enter_stage("decode"):
            image = resources.enter_context(fetched.decode())
            record = image.record
            tracing.annotate(media_type=record.media_type, width=record.width, height=record.height)
        with context.enter_stage("load"):
            network = services.model_cache.load(services.networks.find(job.network))
            classes = network.labels.select(top_n=job.target.top_n, classes=job.target.classes)
        context.deadline.extend(context.metrics["load_s"])  # weights may have to be downloaded
        with context.enter_stage("explain"):
            pixels = image.fit(network.facts)
            method = Method(**job.method.model_dump())
            inferred = slot.infer(network, pixels, classes, method, context.deadline, bulk=bulk)
            tracing.annotate(
                batch_size=inferred.batch_size,
                batch_wait_s=inferred.waited_s,
                computed_s=inferred.computed_s,
            )
    explanation = inferred.explanation
    if job.metrics:
        with context.enter_stage("measure"):
            explanation = services.model_cache.measure(
                network, pixels, explanation, job.metrics, context.deadline, bulk=bulk
            )
    with context.enter_stage("render"):
        rendered = render(
            job.artifacts, image, explanation, context.deadline, job_id=job.id, method=job.method
        )
        image.release()
    with context.enter_stage("upload"):
        records = artifacts.upload(store, folder, rendered, context.deadline)
        manifest = artifacts.build_manifest(job, record, explanation, rendered, records)
        reference = artifacts.write_manifest(store, folder, manifest, context.deadline)
    context.metrics |= {
        "batch_wait_s": round(inferred.waited_s, 4),
        "explain_s": round(inferred.computed_s, 4),
        "batch_size": inferred.batch_size,
    }
    return _job_result(job, manifest, reference)


def _find_result(
    job: Job, services: Services, context: JobContext, store: Store, folder: str, image_sha256: str | None
) -> JobResult | None:
    """Find the result of an earlier attempt that wrote its manifest, but not the job's final state."""
    if context.attempt == 1:
        return None
    row = services.networks.find(job.network)
    match = artifacts.find_manifest(store, folder, job, image_sha256, row, context.deadline)
    return _job_result(job, *match) if match else None


def _job_result(job: Job, manifest: Manifest, reference: ManifestRef) -> JobResult:
    network = manifest.network
    return JobResult(
        network=NetworkRef(name=job.network, layer=network.layer, weights_sha256=network.weights_sha256),
        predictions=manifest.predictions,
        result=reference,
        warnings=manifest.warnings,
    )


def admit(job: Work, services: Services) -> Store:
    """Refuse what the operator does not allow, before anything is fetched; open the output.

    Returns:
        The output.

    Raises:
        InvalidJob: The job wants more classes than are allowed.
        UnknownNetwork: No network is registered under this name.
        UriNotAllowed: A webhook's URL is not allowed.
        OutputNotAllowed: The output is not allowed.
    """
    services.networks.find(job.network)
    class_count = job.target.top_n or len(job.target.classes or ())
    if class_count > services.max_classes:
        message = (
            f"The job asks for {class_count} classes; "
            f"at most {services.max_classes} are allowed (GRADCAM_MAX_CLASSES)."
        )
        raise InvalidJob(message)
    for webhook in terms_of(job).webhooks:
        services.webhooks.check(webhook)
    return services.stores.open(job.output)

"""Runs one job, from the URI of its image to its manifest."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from gradcam_worker.artifacts import artifacts
from gradcam_worker.artifacts.render import Source, render
from gradcam_worker.errors import ImageForbidden, ImageNotFound
from gradcam_worker.execution.annotations import Labels, find_mask, locate
from gradcam_worker.execution.attempt import JobContext, JobResult, Progress, admit
from gradcam_worker.execution.scoring import explain_in_passes, method_of, spec_of
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.explain import values_of
from gradcam_worker.gradcam.methods import masking
from gradcam_worker.images.masks import read_mask
from gradcam_worker.images.prepare import fetch_image
from gradcam_worker.observability import tracing
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.status import (
    ManifestRef,
    NetworkRef,
    PassState,
)
from gradcam_worker.storage.store import Store


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
    with services.inference.reserve() as slot:
        with context.enter_stage("fetch"):
            find_result = partial(_find_result, job, services, context, store, folder)
            if job.image.sha256 and (result := find_result(job.image.sha256)):
                return result  # whether or not the image still exists
            # Before the image, whose memory is reserved until it is drawn: nobody waits for two reservations.
            mask = find_mask(
                job.annotations,
                partial(
                    read_mask,
                    services=services,
                    deadline=context.deadline,
                    redirects=job.image.redirects,
                ),
            )
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
            image = resources.enter_context(
                fetched.decode(fast_jpeg=services.networks.find(job.network).sizing.fast_jpeg)
            )
            record = image.record
            tracing.annotate(media_type=record.media_type, width=record.width, height=record.height)
        with context.enter_stage("load"):
            network = services.inference.load(services.networks.find(job.network), context.deadline)
            classes = network.labels.select(top_n=job.target.top_n, classes=job.target.classes)
            against = network.labels.select_against(job.target.against, classes)
            method = replace(method_of(job.method, network.facts), against=against)
            values = values_of(network.facts, job.inputs)
        with context.enter_stage("explain"):
            pixels, placement = image.fit(network.facts), image.placement(network.facts)
            inferred = None
            if not masking.is_masking(method):
                inferred = slot.infer(
                    network, pixels, classes, method, context.deadline, bulk=bulk, values=values
                )
                tracing.annotate(
                    batch_size=inferred.batch_size,
                    batch_wait_s=inferred.waited_s,
                    computed_s=inferred.computed_s,
                )
    if inferred:
        explanation = inferred.explanation
        context.metrics |= {
            "batch_wait_s": round(inferred.waited_s, 4),
            "explain_s": round(inferred.computed_s, 4),
            "batch_size": inferred.batch_size,
        }
    else:  # no batch waits for this job any more
        with context.enter_stage("explain"):
            explanation = explain_in_passes(
                services.inference,
                network,
                pixels,
                classes,
                method,
                context,
                partial(_report, context),
                values,
            )
    if placement:
        explanation = replace(explanation, placement=placement)
    located = locate(
        explanation, (record.height, record.width), job.annotations, mask, Labels(network.labels)
    )
    if job.metrics:
        with context.enter_stage("measure"):
            explanation = services.inference.measure(
                network, pixels, explanation, job.metrics, context.deadline, bulk=bulk, values=values
            )
    with store.upload(context.deadline) as upload:
        with context.enter_stage("render"):
            rendered = render(
                job.artifacts,
                image,
                explanation,
                context.deadline,
                source=Source(job.id, spec_of(method), context.created_at, job.metadata),
                ready=lambda artifact: upload.add(artifacts.object_of(folder, artifact)),
            )
            image.release()
        with context.enter_stage("upload"):
            records = artifacts.describe(store, folder, rendered)
            manifest = artifacts.build_manifest(job, record, explanation, rendered, records, located)
            last, reference = artifacts.encode_manifest(store, folder, manifest)
            upload.finish(last)
    return _job_result(job, manifest, reference)


def _report(context: JobContext, passes: PassState) -> None:
    context.report_progress(Progress("explain", passes=passes))


def _find_result(
    job: Job, services: Services, context: JobContext, store: Store, folder: str, image_sha256: str | None
) -> JobResult | None:
    """Find the result of an earlier attempt that wrote its manifest, but not the job's final state."""
    if context.attempt == 1:
        return None
    row = services.networks.find(job.network)
    converts = services.limits.convert_colors
    match = artifacts.find_manifest(
        store, folder, job, image_sha256, row, context.deadline, convert_colors=converts
    )
    return _job_result(job, *match) if match else None


def _job_result(job: Job, manifest: Manifest, reference: ManifestRef) -> JobResult:
    network = manifest.network
    return JobResult(
        network=NetworkRef(name=job.network, layer=network.layer, weights_sha256=network.weights_sha256),
        predictions=manifest.predictions,
        result=reference,
        warnings=manifest.warnings,
        passes=_all_passes(manifest),
    )


def _all_passes(manifest: Manifest) -> PassState | None:
    """The passes that a result has cost, if its method only needs scores."""
    images = manifest.method.scored_images
    if images is None:
        return None
    total = -(-images // masking.pass_size(manifest.network.input_size))
    return PassState(done=total, total=total)

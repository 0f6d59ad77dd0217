"""Compares what an attacked run left in the bucket with what an undisturbed run of the same jobs leaves."""

import time
from pathlib import Path

from devtools.faults.cluster import Cluster
from devtools.faults.observer import sha256
from devtools.faults.verdict import Verdict
from gradcam_worker.client.client import GradcamClient

UNFINISHED = ".rclone_temp_put_"  # of an upload during which this S3 server was killed
JOBS_PER_S = 5  # at least: how long the undisturbed run may take ...
PATIENCE_S = 180.0  # ... beside this
POLL_INTERVAL_S = 0.5


def checksums(bucket: Path) -> dict[str, dict[str, str]]:
    """Job id -> each of its objects by its key -> sha256."""
    jobs: dict[str, dict[str, str]] = {}
    for folder in (bucket / "cams").iterdir():
        files = [path for path in folder.rglob("*") if path.is_file() and UNFINISHED not in path.name]
        jobs[folder.name] = {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in files}
    return jobs


def compare(cluster: Cluster, verdict: Verdict, jobs: int) -> None:
    """Run the first `jobs` jobs once more, in one process, with the same ids and nothing that disturbs them.

    The objects of the attacked run are moved away first. Counts `wrong_bytes`.
    """
    cluster.stop_workers()
    attacked = checksums(cluster.bucket)
    with cluster.s3.dead():
        cluster.bucket.rename(cluster.folder / "attacked")
    changes = {"key_prefix": "undisturbed:", "job_processes": 0}
    settings = cluster.settings.model_copy(update=changes)
    client = GradcamClient(settings=settings)
    cluster.work(settings)
    ids = [client.submit(cluster.job(number)) for number in range(jobs)]
    ends: dict[str, str] = {}
    end = time.monotonic() + PATIENCE_S + jobs / JOBS_PER_S
    while len(ends) < jobs and time.monotonic() < end:
        time.sleep(POLL_INTERVAL_S)
        found = client.statuses(job_id for job_id in ids if job_id not in ends)
        ends |= {job_id: document.status for job_id, document in found.items() if document.final}
    for job_id in ids:
        known = ends.get(job_id) == "succeeded" or job_id not in attacked
        verdict.require(known, f"Undisturbed, job {job_id} ended as {ends.get(job_id)}.")
    cluster.stop_workers()
    undisturbed = checksums(cluster.bucket)
    wrong = [job_id for job_id in ids if attacked.get(job_id) != undisturbed.get(job_id)]
    verdict.wrong_bytes = len(wrong)
    verdict.figures["objects_compared"] = sum(map(len, undisturbed.values()))
    for job_id in wrong[:1]:
        objects = [sorted(run.get(job_id, {})) for run in (attacked, undisturbed)]
        verdict.broken.append(f"{job_id}: attacked {objects[0]}, undisturbed {objects[1]}")

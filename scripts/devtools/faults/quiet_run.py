"""What an attacked run left in the bucket, compared with what a quiet run of the very same jobs leaves."""

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

from devtools.faults.cluster import Cluster
from devtools.faults.verdict import Verdict
from gradcam_worker.client.client import GradcamClient

UNFINISHED = ".rclone_temp_put_"  # what this S3 server leaves of an upload that it was killed in
QUIET_WORKERS = 2


def checksums(bucket: Path) -> dict[str, dict[str, str]]:
    """Job id -> each of its objects by its key -> sha256."""
    found: dict[str, dict[str, str]] = {}
    for folder in (bucket / "cams").iterdir():
        files = [path for path in folder.rglob("*") if path.is_file() and UNFINISHED not in path.name]
        found[folder.name] = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }
    return found


def compare_with_a_quiet_run(
    cluster: Cluster, verdict: Verdict, numbers: Iterable[int], patience_s: float
) -> None:
    """Run the very same jobs once more, under the same addresses, with nothing that disturbs them.

    What the attacked run wrote is put aside first. Counts `wrong_bytes`.
    """
    cluster.stop_workers()
    attacked = checksums(cluster.bucket)
    cluster.s3.kill()
    cluster.bucket.rename(cluster.folder / "attacked")
    cluster.s3.start()
    settings = cluster.settings.model_copy(update={"key_prefix": "quiet:"})
    client = GradcamClient(settings=settings)
    for _ in range(QUIET_WORKERS):
        cluster.work(settings)
    ids = [client.submit(cluster.job(number)) for number in numbers]
    end = time.monotonic() + patience_s
    for job_id in ids:
        document = client.wait(job_id, max(end - time.monotonic(), 1))
        if document.status != "succeeded" and job_id in attacked:
            verdict.broken.append(f"The quiet run of {job_id} ended {document.status}.")
    cluster.stop_workers()
    quiet = checksums(cluster.bucket)
    wrong = [job_id for job_id in ids if attacked.get(job_id) != quiet.get(job_id)]
    verdict.wrong_bytes = len(wrong)
    verdict.figures["objects_compared"] = sum(len(one) for one in quiet.values())
    if wrong:
        ours, theirs = attacked.get(wrong[0], {}), quiet.get(wrong[0], {})
        verdict.broken.append(f"{wrong[0]}: attacked {sorted(ours)}, quiet {sorted(theirs)}")

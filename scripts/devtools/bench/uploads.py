"""What the object store costs one job, whose artifacts are put and image read, by boto3 alone and by ours.

    python uploads.py

starts the embedded S3 server. The server's own CPU time is not counted: it is a stand-in for one elsewhere.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pydantic import SecretStr

from devtools.bench.timing import Cost, Way, take_turns
from gradcam_worker.operations import servers
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Object, Stores

OVERLAY, ARRAYS, PHOTO = 52_000, 7_000, 110_000  # bytes: 500 x 375 pixels, and eight maps of 14 x 14
CLASSES, REPEATS = 8, 40


def measure(settings: Settings) -> tuple[Cost, ...]:
    """Both ways to put the default artifacts of eight classes and to read a photo; a call is a job's."""
    s3 = S3(settings)
    store = Stores(settings, s3).open()
    bucket = settings.output.removeprefix("s3://")
    objects: list[Object] = [(f"{n}.jpg", os.urandom(OVERLAY), "image/jpeg") for n in range(CLASSES)]
    objects.append(("heatmaps.npz", os.urandom(ARRAYS), "application/x-npz"))
    s3.put(bucket, "photo", os.urandom(PHOTO), "image/jpeg")

    def boto3_puts() -> None:
        for key, data, media_type in objects:
            s3.client.put_object(Bucket=bucket, Key=key, Body=data, ContentType=media_type)

    def ours_puts() -> None:
        store.put_many(objects, Deadline(30))

    def boto3_reads() -> bytes:
        return bytes(s3.client.get_object(Bucket=bucket, Key="photo")["Body"].read())

    ways: dict[str, Callable[[], object]] = {
        "put boto3": boto3_puts,
        "put ours": ours_puts,
        "read boto3": boto3_reads,
        "read ours": partial(s3.read_image, bucket, "photo", PHOTO, Deadline(300)),
    }
    return take_turns([Way(name, 1, REPEATS, run) for name, run in ways.items()])


def main() -> None:
    """Print milliseconds of wall and of CPU time a job."""
    with tempfile.TemporaryDirectory() as folder, servers.s3(Path(folder), ("results",)) as server:
        settings = Settings(
            output="s3://results",
            s3_endpoint_url=server.url,
            s3_access_key_id=server.access_key_id,
            s3_secret_access_key=SecretStr(server.secret_access_key),
        )
        for cost in measure(settings):
            print(f"{cost.way:<12} wall {1000 * cost.wall:7.2f} ms, CPU {1000 * cost.cpu:7.2f} ms")


if __name__ == "__main__":
    main()

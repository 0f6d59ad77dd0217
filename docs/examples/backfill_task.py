"""A task for Airflow, Dagster, Prefect or cron: explain all photos of a prefix or list into one dataset.

It may be killed at any moment and started again, here or on another machine: what is done is not done again.
The settings are those of the other commands (GRADCAM_BROKER_URL, GRADCAM_OUTPUT, GRADCAM_S3_...).

    python docs/examples/backfill_task.py s3://photos/2031/ s3://results/cams/2031
"""

import sys

from gradcam_worker import GradcamClient


def explain_photos(photos: str, output: str, **options: int) -> int:
    """Explain each photo's most probable class.

    Args:
        photos: A prefix, a folder or a list.
        output: Where the dataset is written.
        **options: Of `gradcam backfill`.

    Returns:
        The number of photos that could not be explained. The dataset says why of each.
    """
    with GradcamClient() as client:
        backfill = client.submit_backfill(
            photos, output, network="efficientnet_lite0", top_n=1, changed=True, **options
        )
        return backfill.wait().failed


if __name__ == "__main__":
    if failed := explain_photos(*sys.argv[1:3]):
        sys.exit(f"{failed} photos could not be explained.")

"""Which names can be those of buckets, by the rules of S3 and of those that speak as it does.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html, with the capital letters and
underscores that are found in old buckets.
"""

import re

from gradcam_worker.text.urls import ACCESS_POINT

LONGEST = 255  # characters: of the oldest buckets; 63 since 2018
NAME = re.compile(rf"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){{0,{LONGEST - 1}}}")
OUTPOST = "--op-s3"  # at the end of an alias that stands for the host of an outpost
RIGHT = "it must have letters, digits, hyphens, underscores and single dots, and begin with no dot or hyphen"


def objection(bucket: str, *, own_server: bool = False) -> str | None:
    """Why this cannot be a bucket, as the rest of a sentence; None where it can.

    `own_server`: an endpoint is configured, so that a name that stands for a host of Amazon's is refused.
    """
    arn = bucket.startswith("arn:")
    if own_server and (arn or bucket.endswith(OUTPOST)):
        what = "an ARN" if arn else "the alias of an outpost"
        return f"is {what}, which names a host of Amazon's, and GRADCAM_S3_ENDPOINT_URL names another server"
    if arn and not ACCESS_POINT.fullmatch(bucket):
        return "is no ARN of an access point as arn:aws:s3:REGION:ACCOUNT:accesspoint:NAME"
    if not arn and not NAME.fullmatch(bucket):
        return f"is no name of a bucket: {RIGHT}"
    return None

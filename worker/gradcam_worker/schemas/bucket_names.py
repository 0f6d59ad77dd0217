"""Rules for bucket names, of S3 and of servers that are compatible with it.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html, and also the capital letters and
underscores of old buckets.
"""

import re

from gradcam_worker.text.urls import ACCESS_POINT

MAX_CHARACTERS = 255  # of the oldest buckets; 63 since 2018
NAME = re.compile(rf"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){{0,{MAX_CHARACTERS - 1}}}")
OUTPOST_SUFFIX = "--op-s3"  # of an alias that stands for the host of an outpost
NAME_RULE = (
    "it must have letters, digits, hyphens, underscores and single dots, and begin with no dot or hyphen"
)


def describe_problem(bucket: str, *, own_server: bool = False) -> str | None:
    """Describe what is wrong with the name of a bucket.

    Args:
        bucket: The name, or the ARN of an access point.
        own_server: Whether an endpoint is configured: names that stand for a host of Amazon's are wrong then.

    Returns:
        The predicate of a sentence about the name; None if the name is valid.
    """
    arn = bucket.startswith("arn:")
    if own_server and (arn or bucket.endswith(OUTPOST_SUFFIX)):
        what = "an ARN" if arn else "the alias of an outpost"
        return f"is {what}, which names a host of Amazon's, and GRADCAM_S3_ENDPOINT_URL names another server"
    if arn and not ACCESS_POINT.fullmatch(bucket):
        return "is no ARN of an access point, such as arn:aws:s3:REGION:ACCOUNT:accesspoint:NAME"
    if not arn and not NAME.fullmatch(bucket):
        return f"is no name of a bucket: {NAME_RULE}"
    return None

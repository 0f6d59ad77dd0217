"""Where artifacts go and images come from: S3, folders.

Begin at `stores.Stores`; `s3` is the one door to S3.
"""

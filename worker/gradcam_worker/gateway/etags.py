"""Answers that callers have already."""


def is_held(etag: str, if_none_match: str | None) -> bool:
    """Whether a caller has the answer with this ETag.

    Args:
        etag: Of the answer.
        if_none_match: The header of the request. Weak and strong ETags are equal here (RFC 9110, 13.1.2).

    Returns:
        Whether it has.
    """
    given = {one.strip().removeprefix("W/") for one in (if_none_match or "").split(",")}
    return not given.isdisjoint({etag.removeprefix("W/"), "*"})

"""The body of a request, up to a limit."""

from fastapi import Request

from gradcam_worker.errors import RequestTooLarge


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body of a request.

    Args:
        request: The request.
        max_bytes: The largest size.

    Returns:
        The body.

    Raises:
        RequestTooLarge: It has more bytes; no more than these are read.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body has more than {max_bytes:,} bytes.")

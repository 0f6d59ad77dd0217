"""What everything on the wire has in common: frozen models, ids, times, and findings as sentences."""

import re

from pydantic import BaseModel, ConfigDict, ValidationError

MAX_KEY_BYTES = 1024  # of an S3 key: S3's own limit
MAX_URI_BYTES = 8192  # of any other address: more than most servers read of one
# A URL, pixels, a secret in place of its name, a user with a password
SECRETIVE = re.compile(r"://|^data:|whsec_|:[^\s@]*@", re.IGNORECASE)


class RequestModel(BaseModel):
    """What every model on the wire has in common."""

    # Pydantic's own words, which a traceback shows, repeat nothing of what was received: see `describe`.
    model_config = ConfigDict(
        frozen=True, extra="forbid", serialize_by_alias=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    def to_json(self) -> str:
        """The model as JSON text, always the same text for the same model."""
        return self.model_dump_json()


class ResponseModel(RequestModel):
    """What workers tell: a later version may say more, and whoever reads it passes over that.

    What workers are asked for, a slip of the pen in it too, is refused: that is `RequestModel`.
    """

    model_config = ConfigDict(extra="ignore")


def too_long(uri: str) -> str | None:
    """Why an address is too long for anything to be stored there; None where it is not.

    Counted in UTF-8. A data: URI is no address: how long it may be is a setting.
    """
    if len(uri) * 4 <= MAX_KEY_BYTES:  # most are: a character has four bytes at most
        return None
    scheme, _, rest = uri.partition(":")
    scheme = scheme.casefold()
    if scheme == "data":
        return None
    size = _bytes(uri)
    if size > MAX_URI_BYTES:
        return f"its URI has {size:,} bytes; at most {MAX_URI_BYTES:,} are allowed"
    size = _bytes(rest.removeprefix("//").partition("/")[2]) if scheme == "s3" else 0
    if size > MAX_KEY_BYTES:
        return f"its S3 key has {size:,} bytes; at most {MAX_KEY_BYTES:,} are allowed"
    return None


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def describe(error: ValidationError) -> str:
    """Pydantic's findings as one sentence: `target.top_n: Input should be ... (received 0)`.

    What was received is shown where it is short and plain: a URL may hold a secret, and so may the
    value of a field that is not ours.
    """
    findings = []
    errors = error.errors(include_url=False)
    for found in errors[:8]:
        inner = [one["loc"] for one in errors if len(one["loc"]) > len(found["loc"])]
        if found["loc"] in {place[: len(found["loc"])] for place in inner}:
            continue  # it only follows from what is wrong inside it
        place = ".".join(_shown(step) if isinstance(step, str) else str(step) for step in found["loc"])
        what = re.sub("^Value error, ", "", found["msg"])
        received, plain = found["input"], isinstance(found["input"], str | int | float | None)
        if found["type"] == "extra_forbidden":
            what, plain = "unknown field", False
        elif found["type"] == "missing" or SECRETIVE.search(str(received)[:2000]):
            plain = False
        shown = f" (received {repr(received)[:60]})" if plain else ""
        findings.append(f"{place or 'the message'}: {what}{shown}")
    return "; ".join(findings)[:2000]


def _shown(name: str) -> str:
    """The name of a field, which may be a stranger's."""
    return "..." if SECRETIVE.search(name[:2000]) else repr(name)[1:-1][:60]


WEBHOOK_SECRET_PREFIX = "whsec_"  # noqa: S105  # how one begins

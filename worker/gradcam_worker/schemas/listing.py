"""What a list of jobs is asked for, and one page of it."""

import base64
import binascii
import re
from typing import Annotated, Self

from pydantic import (
    AwareDatetime,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from gradcam_worker.errors import InvalidQuery
from gradcam_worker.schemas.model import RequestModel, ResponseModel, describe
from gradcam_worker.schemas.options import Name
from gradcam_worker.schemas.status import Status, StatusDocument

MAX_PAGE = 200  # jobs
MAX_LABEL = 2 * 256 + 1  # characters: one of a job's metadata

Cursor = tuple[int, str]  # created_at of a job, in microseconds since the epoch, and its id


def _check_time(value: object) -> object:
    """Refuse a text that is no time of RFC 3339: pydantic also takes seconds since the epoch."""
    if isinstance(value, str) and not re.match(r"\d{4}-\d\d-\d\d[Tt ].*([Zz]|[+-]\d\d:?\d\d)$", value):
        message = "is a time with its zone, as in 2026-01-31T12:00:00Z"
        raise ValueError(message)
    return value


class JobQuery(RequestModel):
    """Which jobs to list: those that fulfil all conditions, newest first."""

    status: Status | None = None
    """only jobs in this state"""
    network: Name | None = None
    """only jobs for this network"""
    label: Annotated[str, StringConstraints(max_length=MAX_LABEL)] | None = None
    """only jobs with this entry in their metadata, as `name=value`"""
    created_after: Annotated[AwareDatetime, BeforeValidator(_check_time)] | None = None
    """only jobs that were created later"""
    cursor: Annotated[str, StringConstraints(max_length=400)] | None = None
    """where to go on: what the previous page ended with"""
    limit: int = Field(default=50, ge=1, le=MAX_PAGE)
    """the most jobs of one page"""

    @field_validator("label")
    @classmethod
    def _check_label(cls, label: str | None) -> str | None:
        if label is not None and not label.partition("=")[1]:
            message = "is an entry of the jobs' metadata, as in customer=42"
            raise ValueError(message)
        return label

    @field_validator("cursor")
    @classmethod
    def _check_cursor(cls, cursor: str | None) -> str | None:
        if cursor is not None:
            parse_cursor(cursor)
        return cursor

    @classmethod
    def parse(cls, **fields: object) -> Self:
        """Make a query of untrusted values.

        Args:
            **fields: The fields; None: not given.

        Returns:
            The query.

        Raises:
            InvalidQuery: A field is invalid or unknown. The message names each.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            message = f"Jobs cannot be listed so: {describe(error)}."
            raise InvalidQuery(message) from error

    @classmethod
    def of_all(cls, **conditions: object) -> Self:
        """Make a query for the first page of all jobs that fulfil these conditions. Raises InvalidQuery."""
        if paged := [name for name in ("cursor", "limit") if name in conditions]:
            message = (
                f"Jobs cannot be listed so: {paged[0]}: every job is listed; list_page takes a {paged[0]}."
            )
            raise InvalidQuery(message)
        return cls.parse(**conditions, limit=MAX_PAGE)

    def accepts(self, document: StatusDocument) -> bool:
        """Whether a job fulfils the conditions that its document tells: all but the network.

        Args:
            document: The job's document.

        Returns:
            Whether it is to be listed.
        """
        name, _, value = (self.label or "").partition("=")
        return (
            self.status in {None, document.status}
            and (self.label is None or document.metadata.get(name) == value)
            and (self.created_after is None or document.created_at > self.created_after)
        )


class JobPage(ResponseModel):
    """A page of a list of jobs, newest first."""

    jobs: tuple[StatusDocument, ...] = ()
    cursor: str | None = None
    """for the next page; none: this is the last one. There may be fewer jobs than asked for, and a cursor."""


def position_of(document: StatusDocument) -> Cursor:
    """A job's place in a list, which never changes."""
    return int(document.created_at.timestamp() * 1_000_000), document.id


def cursor_after(position: Cursor) -> str:
    """Make the cursor of a page that ended at a position."""
    at, job_id = position
    return base64.urlsafe_b64encode(f"{at}:{job_id}".encode()).decode().rstrip("=")


def parse_cursor(cursor: str) -> Cursor:
    """Read a cursor.

    Args:
        cursor: What `cursor_after` made.

    Returns:
        The position after which the next page begins.

    Raises:
        ValueError: It is no cursor.
    """
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        at, job_id = text.split(":")
        return int(at), job_id
    except (ValueError, binascii.Error) as error:
        message = "is not what a page of jobs ended with"
        raise ValueError(message) from error

import re

import pytest

from devtools.docs import reference_pages
from gradcam_worker import errors
from gradcam_worker.errors import (
    GradcamError,
    ImageError,
    ImageNotFound,
    InternalError,
    JobError,
    LedgerUnavailable,
    LocalError,
    ModelError,
    PermanentError,
    RedisUnavailable,
    RetryableError,
    StatusUnavailable,
    UnknownClass,
    WaitTimeout,
    public_message,
    with_sentence,
)
from gradcam_worker.schemas.status import Problem

OUTCOMES = (PermanentError, RetryableError, LocalError)
EVERY = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, GradcamError)]
LEAVES = errors.all_errors()


def test_every_error_that_is_raised_has_a_code_of_its_own() -> None:
    codes = [one.code for one in LEAVES]
    assert len(codes) == len(set(codes))
    below = {one for one in EVERY if not any(one in other.__bases__ for other in EVERY)}
    assert below == set(LEAVES), "what has errors below it is a cause, and is not raised"


def branch(start: str, error: type[GradcamError]) -> str:
    becomes = {PermanentError: "fails", RetryableError: "retried", LocalError: "raised"}
    return f"{start + error.__name__:<35}{error.code:<26}{becomes[reference_pages.outcome(error)]}"


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = [line.strip() for line in (errors.__doc__ or "").splitlines()]
    groups = reference_pages.by_cause()
    others = groups.pop(GradcamError)
    tree = ["GradcamError"]
    for cause, kinds in groups.items():
        starts = ["│   ├── "] * (len(kinds) - 1) + ["│   └── "]
        tree += [f"├── {cause.__name__}", *map(branch, starts, kinds)]
    tree += map(branch, ["├── "] * (len(others) - 1) + ["└── "], others)
    assert drawn[2 : 2 + len(tree)] == tree
    assert len(tree) == len(EVERY) - len(OUTCOMES)


def test_every_error_says_what_becomes_of_a_job_and_has_at_most_one_cause() -> None:
    for one in LEAVES:
        assert len([kind for kind in OUTCOMES if issubclass(one, kind)]) == 1, one
        above = {kind for kind in one.__mro__ if issubclass(kind, GradcamError)}
        assert len(above - {one, GradcamError, *OUTCOMES}) <= 1, one


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ImageNotFound, ImageError),
        (UnknownClass, ModelError),
        (WaitTimeout, JobError),
        (LedgerUnavailable, RedisUnavailable),
    ],
)
def test_an_error_is_caught_by_its_cause(error: type[GradcamError], cause: type[GradcamError]) -> None:
    with pytest.raises(cause, match="What was received"):
        raise error("What was received.")  # noqa: EM101, TRY003


def test_every_error_describes_itself_in_one_sentence() -> None:
    for one in LEAVES:
        assert (one.__doc__ or "").strip().endswith("."), one


# An end user who is told so makes the same request once more.
AGAIN = re.compile(r"\b(try|tried|look|ask|submit)\b[^.]*\bagain\b", re.IGNORECASE)


def test_whoever_is_told_to_try_again_has_an_error_that_is_retryable_and_no_other() -> None:
    for one in EVERY:
        assert bool(AGAIN.search(one.public_message)) == one.retryable, one
        if issubclass(one, PermanentError | RetryableError):
            assert one.retryable == issubclass(one, RetryableError), one


def test_a_server_that_will_refuse_again_is_not_asked_again() -> None:
    assert LedgerUnavailable("Out of reach.").retryable
    refused = LedgerUnavailable("Wrong password.", retryable=False, changed_nothing=True)
    longer = with_sentence(refused, "The job was not accepted.")
    assert (longer.retryable, longer.changed_nothing) == (False, True)
    assert str(longer) == "Wrong password. The job was not accepted."
    assert str(refused) == "Wrong password."
    assert LedgerUnavailable.retryable


def test_what_an_error_carries_is_kept_where_it_says_more() -> None:
    assert with_sentence(StatusUnavailable("Busy.", retry_after_s=7), "Later.").retry_after_s == 7


# What tells strangers how a service is built, or what it holds.
TELLING = r"gradcam|setting|bucket|host|server|redis|s3\b|queue|ledger|broker|worker|path|folder|byte|http"


def test_every_error_has_a_sentence_for_end_users_of_its_own() -> None:
    for one in EVERY:
        assert "public_message" in vars(one), one
        assert re.fullmatch(r"[A-Z][A-Za-z ,]+\.( [A-Z][A-Za-z ,]+\.)?", one.public_message), one
        assert not re.search(TELLING, one.public_message, re.IGNORECASE), one


def test_what_end_users_are_told_says_nothing_of_the_error_but_its_class() -> None:
    planted = "GRADCAM_OUTPUT: s3://planted-bucket/key at planted-host:9000 begins with 'planted bytes'"
    for one in LEAVES:
        error = one(planted)
        problem = Problem.of(error, stage="fetch", attempt=1)
        assert error.public_message == problem.public_message == public_message(one.code)
        assert problem.detail == f"{planted}."


def test_whether_an_image_is_there_is_nothing_for_strangers() -> None:
    assert public_message("image_not_found") == public_message("image_forbidden")


def test_a_code_of_a_later_version_has_a_sentence_too() -> None:
    assert public_message("image_haunted") == GradcamError.public_message
    assert public_message("internal") == InternalError.public_message != GradcamError.public_message

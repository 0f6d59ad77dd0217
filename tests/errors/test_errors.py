import re

from gradcam_worker import errors
from gradcam_worker.errors import GradcamError, InternalError, public_message
from gradcam_worker.schemas.status import Problem


def descendants(root: type[GradcamError]) -> list[type[GradcamError]]:
    return [one for child in root.__subclasses__() for one in (child, *descendants(child))]


LEAVES = [
    one for one in descendants(GradcamError) if one.__module__ == errors.__name__ and "code" in vars(one)
]


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [one.code for one in LEAVES]
    assert len(codes) == len(set(codes))


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = {line.strip(" │├└─").split()[0] for line in (errors.__doc__ or "").splitlines() if "──" in line}
    defined = {one.__name__ for one in descendants(GradcamError) if one.__module__ == errors.__name__}
    assert drawn == defined | {"InternalError"}


def test_every_error_describes_itself_in_one_sentence() -> None:
    for one in LEAVES:
        assert (one.__doc__ or "").strip().endswith("."), one


# What tells strangers how a service is built, or what it holds.
TELLING = r"gradcam|setting|bucket|host|server|redis|s3\b|queue|ledger|broker|worker|path|folder|byte|http"


def test_every_error_has_a_sentence_for_end_users_of_its_own() -> None:
    every: list[type[GradcamError]] = [GradcamError, *descendants(GradcamError)]
    for one in every:
        if one.__module__ == errors.__name__:
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

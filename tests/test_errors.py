from worker import errors
from worker.errors import GradcamError


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

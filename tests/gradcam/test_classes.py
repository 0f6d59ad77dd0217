import hashlib

import pytest

from gradcam_worker.errors import AmbiguousClass, InvalidJob, UnknownClass
from gradcam_worker.gradcam.classes import DATA, ClassIndex, imagenet

SHARED_NAMES = {"crane", "maillot"}


def test_the_index_is_the_file_that_keras_uses() -> None:
    data = (DATA / "imagenet_class_index.json").read_bytes()
    assert hashlib.md5(data, usedforsecurity=False).hexdigest() == "c2c37ea517e94d9795004a39431a14cb"


def test_the_labels_are_in_the_order_of_the_scores() -> None:
    assert [label.id for label in imagenet().labels] == list(range(1000))
    assert imagenet()[517] == (517, "n03126707", "crane")


@pytest.mark.parametrize(
    "name_or_id",
    [
        812,
        "812",
        "n04266014",
        "N04266014",
        "space_shuttle",
        "Space Shuttle",
        "SPACE-SHUTTLE",
        "  space shuttle  ",
    ],
)
def test_a_class_is_found_by_id_wnid_and_any_spelling_of_its_name(name_or_id: int | str) -> None:
    assert imagenet().find(name_or_id).id == 812


def test_every_class_is_found_by_its_own_id_and_wnid() -> None:
    for label in imagenet().labels:
        assert imagenet().find(label.id) == imagenet().find(label.wnid) == label


def test_every_name_that_only_one_class_has_is_found_as_it_is_spelled() -> None:
    unique = [label for label in imagenet().labels if label.name not in SHARED_NAMES]
    assert len(unique) == 996
    assert [imagenet().find(label.name) for label in unique] == unique


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("crane", ["134 (n02012849, crane)", "517 (n03126707, crane)"]),
        ("Maillot", ["638 (n03710637, maillot)", "639 (n03710721, maillot)"]),
        ("CARDIGAN", ["264 (n02113186, Cardigan)", "474 (n02963159, cardigan)"]),
    ],
)
def test_a_name_two_classes_share_is_refused_with_both_ids(name: str, choices: list[str]) -> None:
    with pytest.raises(AmbiguousClass) as refused:
        imagenet().find(name)
    assert all(choice in str(refused.value) for choice in choices)


@pytest.mark.parametrize(("name", "class_id"), [("cardigan", 474), ("Cardigan", 264)])
def test_names_that_differ_only_by_case_are_found_as_they_are_spelled(name: str, class_id: int) -> None:
    assert imagenet().find(name).id == class_id


@pytest.mark.parametrize("name_or_id", [-1, 1000, "1000", 10**9])
def test_an_id_out_of_range_is_refused_with_the_range(name_or_id: int | str) -> None:
    with pytest.raises(UnknownClass, match=f"{name_or_id}.*from 0 to 999"):
        imagenet().find(name_or_id)


def test_a_misspelled_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownClass, match=r"'Expresso'\. Near: 967 \(n07920052, espresso\)"):
        imagenet().find("Expresso")


@pytest.mark.parametrize(
    ("name_or_id", "similar"),
    [
        ("catt", ["tiger_cat", "Persian_cat", "Siamese_cat"]),
        ("golden retreiver", ["golden_retriever"]),
        ("labrador", ["Labrador_retriever"]),
        ("tabby cat", ["tabby"]),
        ("n0209960", ["n02099601"]),
        ("Egyptain_cat", ["Egyptian_cat"]),
    ],
)
def test_suggestions_are_similar_to_the_name_or_to_one_of_its_words(
    name_or_id: str, similar: list[str]
) -> None:
    with pytest.raises(UnknownClass) as refused:
        imagenet().find(name_or_id)
    suggestions = str(refused.value).partition("Near: ")[2]
    assert [suggestions.index(name) for name in similar] == sorted(
        suggestions.index(name) for name in similar
    )
    assert suggestions.index(similar[0]) < 20, "the most similar comes first"
    assert "crate" not in suggestions


@pytest.mark.parametrize("name_or_id", ["", "   ", "qqqqqqqq", "-3", "1.5"])
def test_a_name_that_resembles_no_class_is_refused_without_suggestions(name_or_id: str) -> None:
    with pytest.raises(UnknownClass, match=rf"There is no class '{name_or_id}'\.$"):
        imagenet().find(name_or_id)


@pytest.mark.parametrize("top_n", [1, 3, 1000])
def test_the_top_n_are_ranks_from_the_first_on(top_n: int) -> None:
    assert imagenet().select(top_n=top_n) == tuple(-rank for rank in range(1, top_n + 1))


@pytest.mark.parametrize("top_n", [0, -1, 1001, 5000])
def test_a_top_n_out_of_range_is_refused_with_the_range(top_n: int) -> None:
    with pytest.raises(InvalidJob, match=f"top_n is {top_n}: it must be from 1 to 1000"):
        imagenet().select(top_n=top_n)


def test_listed_classes_keep_their_order() -> None:
    assert imagenet().select(classes=["espresso", 0, "n04266014"]) == (967, 0, 812)


def test_a_repeated_class_counts_once_at_its_first_position() -> None:
    assert imagenet().select(classes=[967, 1, "espresso", "n07920052", "967"]) == (967, 1)


def test_one_bad_name_in_a_list_refuses_the_list() -> None:
    with pytest.raises(UnknownClass, match="nonesuch"):
        imagenet().select(classes=["espresso", "nonesuch"])


def test_an_empty_list_of_classes_is_refused() -> None:
    with pytest.raises(InvalidJob, match="empty"):
        imagenet().select(classes=[])


def test_both_or_neither_of_top_n_and_classes_are_refused() -> None:
    for top_n, classes in [(3, [1]), (3, []), (None, None)]:
        with pytest.raises(InvalidJob, match="exactly one of top_n and classes"):
            imagenet().select(top_n=top_n, classes=classes)


def test_a_class_whose_name_is_a_number_is_found_by_its_name_and_other_numbers_are_ids() -> None:
    index = ClassIndex.of(["1", "2", "3", "zero"])
    assert [index.find(name_or_id).id for name_or_id in ("3", "2", 3, "zero", "0")] == [2, 1, 3, 3, 0]


def test_names_without_wnids_are_shown_without_them() -> None:
    index = ClassIndex.of(["benign", "benign"])
    with pytest.raises(AmbiguousClass, match=r"ask for 0 \(benign\) or 1 \(benign\)"):
        index.find("benign")
    assert ClassIndex.numbered(2)[1] == (1, "", "class_1")

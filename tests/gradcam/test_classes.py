import hashlib

import pytest

from gradcam_worker.errors import AmbiguousClass, InvalidJob, UnknownClass
from gradcam_worker.gradcam.classes import DATA, ClassIndex, imagenet

SHARED_NAMES = {"crane", "maillot"}


def test_the_index_is_the_file_that_keras_itself_expects() -> None:
    data = (DATA / "imagenet_class_index.json").read_bytes()
    assert hashlib.md5(data, usedforsecurity=False).hexdigest() == "c2c37ea517e94d9795004a39431a14cb"


def test_the_labels_stand_in_the_order_of_the_scores() -> None:
    assert [label.id for label in imagenet().labels] == list(range(1000))
    assert imagenet()[517] == (517, "n03126707", "crane")


@pytest.mark.parametrize(
    "wish",
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
def test_a_class_is_found_by_id_wnid_and_any_spelling_of_its_name(wish: int | str) -> None:
    assert imagenet().find(wish).id == 812


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


@pytest.mark.parametrize("wish", [-1, 1000, "1000", 10**9])
def test_an_id_out_of_range_is_refused_with_the_range(wish: int | str) -> None:
    with pytest.raises(UnknownClass, match=f"{wish}.*from 0 to 999"):
        imagenet().find(wish)


def test_a_misspelled_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownClass, match=r"'Expresso'\. Near: 967 \(n07920052, espresso\)"):
        imagenet().find("Expresso")


@pytest.mark.parametrize(
    ("wish", "near"),
    [
        ("catt", ["tiger_cat", "Persian_cat", "Siamese_cat"]),
        ("golden retreiver", ["golden_retriever"]),
        ("labrador", ["Labrador_retriever"]),
        ("tabby cat", ["tabby"]),
        ("n0209960", ["n02099601"]),
        ("Egyptain_cat", ["Egyptian_cat"]),
    ],
)
def test_what_is_suggested_is_like_what_was_said_as_a_whole_or_in_one_of_its_words(
    wish: str, near: list[str]
) -> None:
    with pytest.raises(UnknownClass) as refused:
        imagenet().find(wish)
    told = str(refused.value).partition("Near: ")[2]
    assert [told.index(one) for one in near] == sorted(told.index(one) for one in near)
    assert told.index(near[0]) < 20, "it comes first"
    assert "crate" not in told


@pytest.mark.parametrize("wish", ["", "   ", "qqqqqqqq", "-3", "1.5"])
def test_a_name_like_no_other_is_refused_without_a_guess(wish: str) -> None:
    with pytest.raises(UnknownClass, match=rf"There is no class '{wish}'\.$"):
        imagenet().find(wish)


@pytest.mark.parametrize("top_n", [1, 3, 1000])
def test_the_top_n_are_ranks_from_the_first_on(top_n: int) -> None:
    assert imagenet().wanted(top_n=top_n) == tuple(-rank for rank in range(1, top_n + 1))


@pytest.mark.parametrize("top_n", [0, -1, 1001, 5000])
def test_a_top_n_out_of_range_is_refused_with_the_range(top_n: int) -> None:
    with pytest.raises(InvalidJob, match=f"top_n is {top_n}: it must be from 1 to 1000"):
        imagenet().wanted(top_n=top_n)


def test_listed_classes_keep_their_order() -> None:
    assert imagenet().wanted(classes=["espresso", 0, "n04266014"]) == (967, 0, 812)


def test_a_class_named_twice_is_wanted_once_where_it_was_named_first() -> None:
    assert imagenet().wanted(classes=[967, 1, "espresso", "n07920052", "967"]) == (967, 1)


def test_one_bad_name_in_a_list_refuses_the_list() -> None:
    with pytest.raises(UnknownClass, match="nonesuch"):
        imagenet().wanted(classes=["espresso", "nonesuch"])


def test_an_empty_list_of_classes_is_refused() -> None:
    with pytest.raises(InvalidJob, match="empty"):
        imagenet().wanted(classes=[])


def test_both_or_neither_of_top_n_and_classes_are_refused() -> None:
    for top_n, classes in [(3, [1]), (3, []), (None, None)]:
        with pytest.raises(InvalidJob, match="exactly one of top_n and classes"):
            imagenet().wanted(top_n=top_n, classes=classes)


def test_a_class_whose_name_is_a_number_is_found_by_its_name_and_others_by_their_ids() -> None:
    digits = ClassIndex.of(["1", "2", "3", "zero"])
    assert [digits.find(wish).id for wish in ("3", "2", 3, "zero", "0")] == [2, 1, 3, 3, 0]


def test_names_without_wnids_are_shown_without_them() -> None:
    index = ClassIndex.of(["benign", "benign"])
    with pytest.raises(AmbiguousClass, match=r"ask for 0 \(benign\) or 1 \(benign\)"):
        index.find("benign")
    assert ClassIndex.numbered(2)[1] == (1, "", "class_1")

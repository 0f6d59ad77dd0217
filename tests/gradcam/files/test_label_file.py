"""Names of classes, in each of the ways in which people store them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.files import label_file

NAMES = ("crane, bird", "pier", "12")
CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "id2label": {"0": "crane, bird", "1": "pier", "2": "12"},
    "label2id": {"crane, bird": 0, "pier": 1, "12": 2},
    "num_channels": 3,
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.txt", "crane, bird\npier\n12\n"),
        ("labels", "\ncrane, bird\r\n pier\t\r\n12\r\n\r\n".lstrip()),
        ("labels.txt", "0 crane, bird\n1 pier\n2 12\n"),
        ("labels.json", '["crane, bird", "pier", "12"]'),
        ("class_indices.json", '{"12": 2, "crane, bird": 0, "pier": 1}'),
        ("id2label.JSON", '{"0": "crane, bird", "2": "12", "1": "pier"}'),
        ("config.json", json.dumps(CONFIG)),
        ("config.json", json.dumps({key: value for key, value in CONFIG.items() if key != "id2label"})),
        ("labels.csv", 'id,name\n0,"crane, bird"\n1,pier\n2,12\n'),
        ("labels.csv", 'label, id\r\n12, 2\r\n"crane, bird", 0\r\npier, 1\r\n\r\n'),
        ("labels.csv", 'Class Name,area,Class-Index\n"crane, bird",7,0\npier,8,1\n12,9,2'),
        ("labels.csv", 'label,name\n0,"crane, bird"\n1,pier\n2,12'),
        ("labels.csv", '0,"crane, bird"\n1,pier\n2,12'),
        ("labels.csv", "id;name\n0;crane, bird\n1;pier\n2;12"),
        ("labels.csv", '"crane, bird"\npier\n12\n'),
        ("labels.csv", 'name\n"crane, bird"\npier\n12\n'),
        ("labels.tsv", "id\tname\n0\tcrane, bird\n1\tpier\n2\t12"),
    ],
)
def test_names_are_read_in_the_order_of_their_ids(name: str, text: str) -> None:
    assert label_file.parse(text, Path(name)) == NAMES


def test_classes_that_are_named_by_digits_keep_these_names() -> None:
    assert label_file.parse('{"0": 0, "1": 1, "10": 2, "2": 3}', Path("a.json")) == ("0", "1", "10", "2")
    assert label_file.parse("id,name\n0,7\n1,8", Path("a.csv")) == ("7", "8")


def test_two_classes_may_have_the_same_name() -> None:
    assert label_file.parse('{"0": "crane", "1": "crane"}', Path("a.json")) == ("crane", "crane")


@pytest.mark.parametrize("text", ["1 day\n2 days", "0 days\n2 days", "0 days", "0 days\n1 day\nmore"])
def test_names_that_begin_with_other_numbers_than_their_ids_keep_them(text: str) -> None:
    assert label_file.parse(text, Path("labels.txt")) == tuple(text.split("\n"))


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("l.json", '{"a": 0, "b": 2}', "id 1 has no name, and the highest id is 2"),
        ("l.json", '{"a": 1, "b": 2}', "ids run from 1 to 2, but the outputs of a network count from 0"),
        ("l.json", '{"a": 0, "b": 0}', "id 0 has two names, 'a' and 'b'"),
        ("l.json", '{"a": -1, "b": 0}', "id -1 is less than 0"),
        ("l.json", '{"0": "a", "00": "b"}', "id 0 has two names, 'a' and 'b'"),
        ("l.json", '{"a": 0, "a": 1}', "it names 'a' twice"),
        ("l.json", '{"a": 0, "b": true}', "it must hold a list of names, names with their ids"),
        ("l.json", '{"a": 0, "b": "c"}', "of 'a' it holds '0'"),
        ("l.json", '{"0": "a", "1": 3}', "of '1' it holds '3'"),
        ("l.json", '{"architecture": "vit"}', "of 'architecture' it holds 'vit'"),
        ("l.json", '{"id2label": {}}', "it is empty"),
        ("l.json", "{}", "it is empty"),
        ("l.json", '{"0": ""}', "number 1 is '', which is no name"),
        ("l.json", '"a"', "must hold a list of names"),
        ("l.csv", "", "number 1 is '', which is no name"),
        ("l.csv", "a\n\nb", "number 2 is '', which is no name"),
        ("l.csv", "id,name", "it is empty"),
        ("l.csv", "id,name\n0,crane, bird", "line 2 has 3 columns, the first has 2: a name that holds ','"),
        ("l.csv", "id,name\n0,a\nx,b", "line 3 has the id 'x', which is no number from 0 up"),
        ("l.csv", "id,name\n1,a\n2,b", "ids run from 1 to 2"),
        ("l.csv", "id,name\n0,a\n0,b", "id 0 has two names"),
        ("l.csv", "a,b\nc,d", "its header is 'a,b': it must name one column id and one column name"),
        ("l.csv", "0,1\n1,0", "it has no header: it must name one column id and one column name"),
        ("l.csv", "id,name,label\n0,a,b", "its header is 'id,name,label': it must name one column id"),
        ("l.csv", '"a', "it is no CSV"),
    ],
)
def test_what_cannot_be_read_for_certain_is_refused(name: str, text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        label_file.parse(text, Path(name))


@pytest.mark.parametrize(
    "labels",
    [
        ["crane, bird", "pier", "12"],
        {"pier": 1, "crane, bird": 0, "12": 2},
        {1: "pier", 0: "crane, bird", 2: "12"},
        {np.int64(1): "pier", np.int64(0): "crane, bird", np.int64(2): "12"},
        {"pier": np.int64(1), "crane, bird": np.int64(0), "12": np.int64(2)},
        np.array(NAMES),
        dict.fromkeys(NAMES).keys(),
        CONFIG,
        "{folder}/labels.txt",
    ],
)
def test_in_python_they_are_a_list_a_mapping_or_a_path(labels: Any, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\ufeff" + "\n".join(NAMES))
    if isinstance(labels, str):
        labels = Path(labels.format(folder=tmp_path))
        assert label_file.given(str(labels)) == NAMES
    assert label_file.given(labels) == NAMES


def test_in_python_imagenet_stands_for_its_classes() -> None:
    assert label_file.given("imagenet") is None
    assert label_file.given(()) == ()


@pytest.mark.parametrize("labels", [{"a": 1, "b": 2}, Path("none.txt"), ["a", ""], {"a", "b"}])
def test_in_python_what_cannot_be_read_is_a_typed_error(labels: Any) -> None:
    with pytest.raises(
        NetworkIncompatible, match=r"The labels cannot be used: (ids run|none.txt: No such|num|a set has no)"
    ):
        label_file.given(labels)

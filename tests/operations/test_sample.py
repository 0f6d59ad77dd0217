"""Photos with labels: folders that are named by class, and CSV."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from gradcam_worker.errors import InvalidInput
from gradcam_worker.gradcam.classes import ClassIndex, imagenet
from gradcam_worker.gradcam.network_inputs import NetworkInput
from gradcam_worker.operations import sample
from gradcam_worker.operations.sample import Photo
from gradcam_worker.testing import TinyNetwork


class Named:
    """A network of which only name, classes and further inputs count."""

    def __init__(
        self, labels: ClassIndex, name: str = "birds", inputs: tuple[NetworkInput, ...] = ()
    ) -> None:
        self.labels = labels
        self.facts = replace(TinyNetwork.facts, name=name, inputs=inputs)


BIRDS = Named(ClassIndex.of(["Crane, bird", "pier", "sand-bar"]))


def write(folder: Path, *names: str) -> Path:
    """Write empty files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def write_table(folder: Path, text: str) -> Path:
    (folder / "sample.csv").write_text(text)
    return folder / "sample.csv"


def refusal(source: Path, network: Named = BIRDS) -> str:
    with pytest.raises(InvalidInput) as refused:
        sample.read(source, network)
    return str(refused.value)


class TestFolders:
    def test_each_is_a_class_by_name_or_id(self, tmp_path: Path) -> None:
        names = ("crane,_bird/b.JPG", "crane,_bird/a.png", "1/c.webp", "Sand Bar/2024/d.jpeg")
        photos = sample.read(write(tmp_path, *names), BIRDS).photos
        found = {(photo.path.relative_to(tmp_path).as_posix(), photo.class_id) for photo in photos}
        assert found == set(zip(names, (0, 0, 1, 2), strict=True))

    def test_classes_of_imagenet_have_wordnet_ids_too(self, tmp_path: Path) -> None:
        photos = sample.read(write(tmp_path, "n02012849/a.jpg", "517/b.jpg"), Named(imagenet())).photos
        assert [photo.class_id for photo in photos] == [517, 134]

    def test_files_that_are_no_photos_and_hidden_ones_are_left_out(self, tmp_path: Path) -> None:
        write(tmp_path, "pier/a.jpg", "pier/notes.txt", "pier/.b.jpg", "__MACOSX/pier/a.jpg", ".git/a.jpg")
        photos = sample.read(write(tmp_path, "read.me", "Thumbs.db"), BIRDS).photos
        assert photos == (Photo(tmp_path / "pier" / "a.jpg", 1),)

    def test_one_that_is_no_class_is_refused_with_the_classes(self, tmp_path: Path) -> None:
        message = refusal(write(tmp_path, "pier/a.jpg", "train/b.jpg", "test/c.jpg"))
        assert message.startswith(
            "The folders 'test', 'train' name no class of birds: it has 'Crane, bird', "
        )
        message = refusal(write(tmp_path / "other", "peer/a.jpg"))
        assert message.startswith("The folder 'peer' names no class of birds")

    def test_one_that_two_classes_could_be_is_refused(self, tmp_path: Path) -> None:
        assert "'crane' is the name of 2 classes" in refusal(
            write(tmp_path, "crane/a.jpg"), Named(imagenet())
        )

    def test_labels_are_proposed_where_a_network_has_none(self, tmp_path: Path) -> None:
        write(tmp_path, "dogs/a.jpg", "cats/a.jpg")
        message = refusal(tmp_path, Named(ClassIndex.numbered(2)))
        assert 'in alphabetical order, as Keras reads them, add labels = ["cats", "dogs"]' in message
        assert "its 3 classes have no names, only ids from 0" in refusal(
            tmp_path, Named(ClassIndex.numbered(3))
        )

    @pytest.mark.parametrize(
        ("names", "why"),
        [
            ((), "has no folders: put the photos of each class into a folder"),
            (("a.jpg",), "has no folders: put the photos of each class into a folder"),
            (("pier/a.txt",), "holds no photos"),
        ],
    )
    def test_without_photos_in_folders_there_is_no_sample(
        self, names: tuple[str, ...], why: str, tmp_path: Path
    ) -> None:
        assert why in refusal(write(tmp_path, *names))


class TestTables:
    def test_paths_are_relative_to_the_table_and_labels_are_classes(self, tmp_path: Path) -> None:
        table = write_table(tmp_path, f'\ufeffpath, label\na.jpg,"crane, bird"\n{tmp_path}/x/b.jpg,2\n\n')
        photos = sample.read(table, BIRDS).photos
        assert photos == (Photo(tmp_path / "a.jpg", 0), Photo(tmp_path / "x" / "b.jpg", 2))

    def test_columns_that_name_classes_hold_the_owners_probabilities(self, tmp_path: Path) -> None:
        text = 'pier,label,age,file,"crane, bird"\n0.25,pier,61,a.jpg,1e-3\n,0,7,b.jpg,1'
        read = sample.read(write_table(tmp_path, text), BIRDS)
        assert [photo.probabilities for photo in read.photos] == [{0: 0.001, 1: 0.25}, {0: 1.0}]
        assert read.unused_columns == ("age",)
        assert read.has_probabilities

    def test_of_two_classes_the_probability_is_that_of_the_second(self, tmp_path: Path) -> None:
        table = write_table(tmp_path, "path,label,probability\na.jpg,cat,0.25")
        read = sample.read(table, Named(ClassIndex.of(["cat", "dog"])))
        assert read.photos == (Photo(tmp_path / "a.jpg", 0, {1: 0.25}),)
        assert sample.read(write_table(tmp_path, "path,label,probability\na.jpg,0,.1"), BIRDS) == (
            sample.Sample((Photo(tmp_path / "a.jpg", 0),), ("probability",))
        )

    def test_columns_that_name_further_inputs_hold_their_values(self, tmp_path: Path) -> None:
        inputs = (NetworkInput("age"), NetworkInput("site", default=3.0, constant=True))
        table = write_table(tmp_path, "path,label,Age,site\na.jpg,pier,61,4\nb.jpg,pier,,4")
        read = sample.read(table, Named(BIRDS.labels, inputs=inputs))
        assert [photo.inputs for photo in read.photos] == [{"age": "61"}, {}]
        assert read.unused_columns == ("site",)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "must begin with a header that names the columns path and label; it begins with nothing"),
            (
                "a.jpg,pier",
                "must begin with a header that names the columns path and label; it begins with 'a",
            ),
            ("path,label", "holds no photos"),
            (
                "path,label\na.jpg,pear\nb.jpg,pear\nc.jpg,apple",
                "is called 'pear' (row 2), 'apple' (row 4): it",
            ),
            ("path,label\na.jpg,crane, bird", "row 2: it has 3 columns, the header 2; what holds a comma"),
            ("path,label,pier\na.jpg,0,87.5", "row 2: '87.5' is no probability from 0 to 1"),
            ("path,label,pier\na.jpg,0,nan", "row 2: 'nan' is no probability from 0 to 1"),
            ("path,label,pier\na.jpg,0,x", "row 2: 'x' is no probability from 0 to 1"),
            ("path,label,pier,1\na.jpg,0,.1,.1", "two columns name the class 1 (pier)"),
            ('path,label\n"a', "is neither a folder nor a CSV in UTF-8"),
        ],
    )
    def test_one_that_cannot_be_used_is_refused_with_the_row(
        self, text: str, why: str, tmp_path: Path
    ) -> None:
        assert why in refusal(write_table(tmp_path, text))

    def test_a_photo_is_no_table(self, tmp_path: Path, photos: Path) -> None:
        assert re.search("coffee.jpg is neither a folder nor a CSV", refusal(photos / "coffee.jpg"))


def test_a_choice_takes_from_all_classes_as_evenly_as_possible_and_is_always_the_same() -> None:
    photos = tuple(Photo(Path(f"{index}.jpg"), int(index >= 90)) for index in range(100))
    chosen = sample.Sample(photos, ("age",)).choose(30)
    assert Counter(photo.class_id for photo in chosen.photos) == {0: 20, 1: 10}
    assert chosen == sample.Sample(photos, ("age",)).choose(30)
    assert [*chosen.photos] == sorted(chosen.photos, key=photos.index)
    assert chosen.photos[:20] != photos[:20], "a folder may hold the frames of films, one after the other"
    assert sample.Sample(photos).choose(1000).photos == photos

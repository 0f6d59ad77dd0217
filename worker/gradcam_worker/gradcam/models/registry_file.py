"""What may stand in the registry's TOML file, and what is wrong with it, said so that it can be put right."""

import re
import tomllib
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from gradcam_worker.gradcam.catalog import (
    CATALOG,
    PREPROCESSING,
    Channels,
    Head,
    HeadKind,
    NetworkRow,
    Preprocessing,
)
from gradcam_worker.gradcam.models import model_file
from gradcam_worker.text.similar_names import nearest
from gradcam_worker.text.urls import has_credentials, without_user

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
IMAGENET, IMAGENET_CLASSES = "imagenet", 1000
ARCHITECTURES = {
    name: row for name, row in CATALOG.items() if (row.builder or "").startswith("keras.applications:")
}
ORDERS, MAX_CHANNELS = ("rgb", "bgr", "grey"), 4096
BY_NAME, BY_NUMBERS = "<name>", "<numbers>"  # marks of ours that are taken out of what is shown


def parse_toml(text: str) -> dict[str, Any]:
    """Raises ValueError, naming line and column."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = f"it is not TOML: {error}"
        raise ValueError(message) from error


class Table(BaseModel):
    """What every table has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _sized(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


PerChannel = Annotated[tuple[float, ...], BeforeValidator(_sized), Field(min_length=1)]


def _channels(value: Any) -> Any:
    if value not in ORDERS and not (type(value) is int and 1 <= value <= MAX_CHANNELS):
        message = f"must be {', '.join(ORDERS)}, or a number of channels from 1 to {MAX_CHANNELS}"
        raise ValueError(message)
    return value


class Scaling(Table):
    """`input = pixel * scale + offset`, a number for all channels or a list with one for each.

    `channels` is the order of colours, `grey`, or how many channels a picture has that is no photo.
    """

    scale: PerChannel = (1.0,)
    offset: PerChannel = (0.0,)
    channels: Annotated[Channels, BeforeValidator(_channels)] = "rgb"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        width = _width(self.channels)
        for name, values in (("scale", self.scale), ("offset", self.offset)):
            if len(values) not in {1, width}:
                message = f"{name} has {len(values)} numbers for {width} channels: give one for each, or one"
                raise ValueError(message)
        if 0 in self.scale:
            message = "scale must not be 0: all pixels would be the same"
            raise ValueError(message)
        return self

    def preprocessing(self) -> Preprocessing:
        """The same as `(pixel - mean) / std`."""
        count = max(len(self.scale), len(self.offset))
        scale, offset = (one * (count // len(one)) for one in (self.scale, self.offset))
        channels = f"{self.channels} channels" if isinstance(self.channels, int) else self.channels
        told = ", ".join(
            f"{name} {' '.join(f'{one:.6g}' for one in values)}"
            for name, values in (("scale", self.scale), ("offset", self.offset))
        )
        return Preprocessing(
            name=f"{told}, {channels}",
            mean=tuple(0 - shift / factor for factor, shift in zip(scale, offset, strict=True)),
            std=tuple(1 / factor for factor in scale),
            channels=self.channels,
        )


def _width(channels: Channels) -> int:
    return Preprocessing("", channels=channels).input_channels


def _preprocessing(name: str) -> str:
    if name not in PREPROCESSING:
        message = f"there is no preprocessing {name!r}; {_hint(name, PREPROCESSING)}"
        raise ValueError(message)
    return name


def _architecture(name: str) -> str:
    if name.casefold() not in ARCHITECTURES:
        message = f"there is no architecture {name!r} in keras.applications; {_hint(name, ARCHITECTURES)}"
        raise ValueError(message)
    return name.casefold()


def _hint(name: str, known: Any) -> str:
    near = nearest(name, known)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known)}"


def _name(name: str) -> str:
    if not re.fullmatch(NAME, name):
        message = (
            "a network's name is made of letters, digits and _ - . and starts with a letter or a digit "
            "(64 of them at most; with a dot in it, it stands in quotes)"
        )
        raise ValueError(message)
    if name.casefold() in CATALOG:
        message = "this is the name of a network of the catalog: choose another one"
        raise ValueError(message)
    return name


def _without_user(uri: str) -> str:
    if has_credentials(uri):
        message = (
            f"{without_user(uri)!r} must hold no user and no password: GRADCAM_S3_... name the credentials"
        )
        raise ValueError(message)
    return uri


def _address(uri: str) -> str:
    scheme, slashes, rest = uri.partition("://")
    if slashes and scheme not in {"s3", "file"}:
        message = f"{scheme}:// cannot be read: use s3://bucket/key, file:///path or a path"
        raise ValueError(message)
    whole = rest.startswith("/") if scheme == "file" else all(rest.partition("/")[::2])
    if not uri.isprintable() or (slashes and (not whole or {"?", "#"} & set(rest))):
        message = f"{uri!r} is not a whole address: it must look like s3://bucket/key or file:///path"
        raise ValueError(message)
    return uri


def _model(uri: str) -> str:
    if not uri.endswith(".keras"):
        message = f"{uri!r} {model_file.by_ending(uri)}"
        raise ValueError(message)
    return _address(uri)


def _weights(uri: str) -> str:
    if uri.endswith(".keras"):
        message = f"{uri!r} is a whole model: name it with model, without architecture"
        raise ValueError(message)
    if not uri.endswith(".weights.h5"):
        message = f"{uri!r} must end in .weights.h5: save it with model.save_weights('NAME.weights.h5')"
        raise ValueError(message)
    return _address(uri)


def _checksum(value: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", value):
        message = "must be the 64 hexadecimal digits that `sha256sum FILE` prints"
        raise ValueError(message)
    return value.lower()


class HeadTable(Table):
    """How a network's output is to be read, where its graph does not say."""

    kind: HeadKind | None = None
    output: str | None = None


Text = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Side = Annotated[StrictInt, Field(ge=8, le=8192)]  # pixels
Given = Annotated[
    Annotated[str, AfterValidator(_preprocessing), Tag(BY_NAME)] | Annotated[Scaling, Tag(BY_NUMBERS)],
    Discriminator(lambda value: BY_NAME if isinstance(value, str) else BY_NUMBERS),
]
Labels = Annotated[
    Annotated[Text, Tag(BY_NAME)] | Annotated[tuple[Text, ...], Tag(BY_NUMBERS)],
    Discriminator(lambda value: BY_NAME if isinstance(value, str) else BY_NUMBERS),
]


class OwnNetwork(Table):
    """`[networks.NAME]`: a whole model in a file, or an architecture and its weights."""

    model: Annotated[Text, AfterValidator(_without_user), AfterValidator(_model)] | None = None
    architecture: Annotated[Text, AfterValidator(_architecture)] | None = None
    weights: Annotated[Text, AfterValidator(_without_user), AfterValidator(_weights)] | None = None
    sha256: Annotated[str, AfterValidator(_checksum)]
    labels: Labels = ()
    classes: Annotated[StrictInt, Field(ge=2, le=100_000)] | None = None
    pretrained: StrictBool | None = None  # whether the architecture was built with weights="imagenet"
    preprocessing: Given | None = None
    input_size: tuple[Side, Side] | None = None
    target_layer: Text | None = None
    head: HeadTable = HeadTable()

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        built = self.architecture is not None
        for wrong, message in (
            (bool(self.model) == built, "give either model, or architecture and weights"),
            (built != bool(self.weights), "architecture and weights belong together"),
            (not built and not self.input_size, "input_size = [height, width] is needed beside model"),
            (not built and not self.preprocessing, "preprocessing is needed beside model"),
            (
                built and self.head.kind == "probabilities",
                "head.kind probabilities belongs to model: an architecture ends in a softmax or a sigmoid",
            ),
            (not built and self.classes, "classes belongs to architecture: a model knows its own"),
            (
                not built and self.pretrained is not None,
                "pretrained belongs to architecture: a model is built as its file says",
            ),
            (built and not self.classes and not self.labels, "classes is needed where there are no labels"),
        ):
            if wrong:
                raise ValueError(message)
        return self

    @property
    def like(self) -> NetworkRow | None:
        """The catalog's row of the architecture."""
        return ARCHITECTURES[self.architecture] if self.architecture else None

    def how(self) -> Preprocessing | None:
        """The preprocessing that is given, if one is."""
        if isinstance(self.preprocessing, Scaling):
            return self.preprocessing.preprocessing()
        return PREPROCESSING[self.preprocessing] if self.preprocessing else None

    def read_as(self) -> Head:
        """The head, as a row has it."""
        return Head(self.head.kind, self.head.output)


class RegistryFile(Table):
    """The whole file."""

    networks: dict[Annotated[str, AfterValidator(_name)], OwnNetwork]


REWORDED = {"model_type": "must be a name or a table", "tuple_type": "must be a list"}
INNER_TABLES: dict[str, type[Table]] = {"head": HeadTable, "preprocessing": Scaling}


def findings(error: ValidationError) -> list[str]:
    """Each thing that is wrong, as `networks.tumours.sha256: ...`."""
    told = []
    for found in error.errors(include_url=False, include_input=False):
        steps = [str(step) for step in found["loc"] if step not in {BY_NAME, BY_NUMBERS, "[key]"}]
        what = found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            tables: dict[int, type[Table]] = {1: RegistryFile, 3: OwnNetwork}
            table = tables.get(len(steps)) or INNER_TABLES[steps[2]]
            what = f"there is no such key; {_hint(steps[-1], table.model_fields)}"
        elif found["type"] == "missing":
            what = "is missing" + (": `sha256sum FILE` prints it" if steps[-1] == "sha256" else "")
        elif found["type"] in REWORDED:
            what = REWORDED[found["type"]]
        told.append(f"{'.'.join(steps)}: {what}")
    return told

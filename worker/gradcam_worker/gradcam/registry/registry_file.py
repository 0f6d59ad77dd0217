"""The schema of the registry's TOML file, and the description of errors in it."""

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)

from gradcam_worker.errors import InvalidNetworkInput, InvalidSettings
from gradcam_worker.gradcam.catalog import (
    CATALOG,
    GREYS,
    PREPROCESSING,
    Channels,
    Head,
    HeadKind,
    Layout,
    NetworkRow,
    Preprocessing,
)
from gradcam_worker.gradcam.files import model_file
from gradcam_worker.gradcam.network_inputs import Encoding, InputKind, InputValue, NetworkInput
from gradcam_worker.gradcam.sizing import MAX_LEVEL, Fit, Grey, Resize, Sizing, find_sizing
from gradcam_worker.text.similar_names import nearest
from gradcam_worker.text.urls import has_credentials, without_user

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
ARCHITECTURES = {
    name: row for name, row in CATALOG.items() if (row.builder or "").startswith("keras.applications:")
}
SCORE_FILES = (".onnx", ".tflite")  # models that only give scores
CHANNEL_ORDERS, MAX_CHANNELS = ("rgb", "bgr", *GREYS), 4096
MAX_INPUTS, MAX_INPUT_WIDTH = 64, 65_536  # beside an image: inputs, and numbers that one becomes
NAME_TAG, VALUES_TAG = "<name>", "<values>"  # pydantic adds them to the path of an error


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Args:
        text: The file.

    Returns:
        Its tables.

    Raises:
        ValueError: It is not TOML; the message gives line and column.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = f"it is not TOML: {error}"
        raise ValueError(message) from error


class Table(BaseModel):
    """The options of all tables."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Level = Annotated[StrictInt, Field(ge=0, le=MAX_LEVEL)]
SCALE_KEYS = ("scale", "offset")
PerChannel = Annotated[tuple[float, ...], BeforeValidator(_as_list), Field(min_length=1)]


def _channels(value: Any) -> Any:
    if value not in CHANNEL_ORDERS and not (type(value) is int and 1 <= value <= MAX_CHANNELS):
        message = f"must be {', '.join(CHANNEL_ORDERS)}, or a number of channels from 1 to {MAX_CHANNELS}"
        raise ValueError(message)
    return value


class Scaling(Table):
    """`input = pixel * scale + offset`, or `(pixel - mean) / std` with pixels in `range`.

    Each is a number for all channels, or a list of one for each. `channels` is the order of the colours,
    `grey` or `grey_mean`, or, for images that are no photos, the number of channels.
    """

    scale: PerChannel | None = None
    offset: PerChannel | None = None
    range: tuple[float, float] | None = None
    mean: PerChannel | None = None
    std: PerChannel | None = None
    channels: Annotated[Channels, BeforeValidator(_channels)] = "rgb"

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        width = _width(self.channels)
        for name, values in self._given("scale", "offset", "mean", "std"):
            if len(values) not in {1, width}:
                message = f"{name} has {len(values)} numbers for {width} channels: give one for each, or one"
                raise ValueError(message)
        for name, values in self._given("scale", "std"):
            if 0 in values:
                message = f"{name} must not be 0: all pixels would be the same"
                raise ValueError(message)
        scales, means = (
            [name for name, _ in self._given(*names)] for names in (SCALE_KEYS, ("range", "mean", "std"))
        )
        if scales and means:
            message = (
                f"{', '.join(scales)} and {', '.join(means)} exclude each other: give scale and offset, or "
                "range, mean and std"
            )
            raise ValueError(message)
        if self.range and self.range[0] >= self.range[1]:
            message = f"range is {list(self.range)}: it must rise, as [0, 1] or [-1, 1]"
            raise ValueError(message)
        if (
            self.range is None
            and self.mean
            and any(self.mean)
            and max(map(abs, self.mean + (self.std or ()))) <= 1
        ):
            message = (
                "mean and std are of pixels from 0 to 255 here; these look like those of pixels from 0 to 1: "
                "add range = [0, 1]"
            )
            raise ValueError(message)
        return self

    def _given(self, *names: str) -> list[tuple[str, tuple[float, ...]]]:
        return [(name, values) for name in names if (values := getattr(self, name)) is not None]

    def preprocessing(self) -> Preprocessing:
        """Convert it to `(pixel - mean) / std`, with pixels from 0 to 255."""
        if self._given("range", "mean", "std"):
            low, high = self.range or (0.0, 255.0)
            mean, std = self.mean or (0.0,), self.std or (1.0,)
            name = self._describe(("range", (low, high)), ("mean", mean), ("std", std))
            count, step = max(len(mean), len(std)), (high - low) / 255
            mean, std = (numbers * (count // len(numbers)) for numbers in (mean, std))
            return Preprocessing(
                name=name,
                mean=tuple((number - low) / step for number in mean),
                std=tuple(number / step for number in std),
                channels=self.channels,
            )
        scale, offset = self.scale or (1.0,), self.offset or (0.0,)
        name = self._describe(("scale", scale), ("offset", offset))
        count = max(len(scale), len(offset))
        scale, offset = (numbers * (count // len(numbers)) for numbers in (scale, offset))
        return Preprocessing(
            name=name,
            mean=tuple(0 - shift / factor for factor, shift in zip(scale, offset, strict=True)),
            std=tuple(1 / factor for factor in scale),
            channels=self.channels,
        )

    def _describe(self, *values: tuple[str, tuple[float, ...]]) -> str:
        channels = f"{self.channels} channels" if isinstance(self.channels, int) else self.channels
        descriptions = (
            f"{name} {' '.join(f'{number:.6g}' for number in numbers)}" for name, numbers in values
        )
        return ", ".join((*descriptions, channels))


class SizingTable(Table):
    """`sizing` of a network: how images are brought to its input size; see `gradcam.sizing.Sizing`."""

    resize: Resize = "area"
    fit: Fit = "squash"
    short_side: StrictInt | None = None
    crop_fraction: float | None = None
    color: Annotated[tuple[Level, ...], BeforeValidator(_as_list), Field(min_length=1)] = (0,)
    size: tuple[StrictInt, StrictInt] | None = None
    grey: StrictBool | Grey = False
    fast_jpeg: StrictBool = False
    recompress: StrictInt | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        with _as_value_error():
            self.sizing()
        return self

    def sizing(self) -> Sizing:
        """Convert it to a `Sizing`. Raises InvalidSettings."""
        return Sizing(**{field.name: getattr(self, field.name) for field in fields(Sizing)})


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Raise what is wrong as pydantic expects it."""
    try:
        yield
    except InvalidSettings as error:
        raise ValueError(str(error)) from error


def _sizing(name: str) -> str:
    with _as_value_error():
        find_sizing(name)
    return name


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


def _hint(name: str, names: Any) -> str:
    similar = nearest(name, names)
    return f"did you mean {' or '.join(map(repr, similar))}?" if similar else f"there are {', '.join(names)}"


def _name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
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
    is_complete = rest.startswith("/") if scheme == "file" else all(rest.partition("/")[::2])
    if not uri.isprintable() or (slashes and (not is_complete or {"?", "#"} & set(rest))):
        message = f"{uri!r} is not a whole address: it must look like s3://bucket/key or file:///path"
        raise ValueError(message)
    return uri


def _model(uri: str) -> str:
    if not uri.endswith((".keras", *SCORE_FILES)):
        message = f"{uri!r} {model_file.refusal_by_ending(uri)}"
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


def _module(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*([.][A-Za-z_]\w*)*", name, re.ASCII):
        message = (
            f"{name[:100]!r} is no name of a module: name one that is installed, as in my_package.layers, "
            "not its path"
        )
        raise ValueError(message)
    return name


def _checksum(value: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", value):
        message = "must be the 64 hexadecimal digits that `sha256sum FILE` prints"
        raise ValueError(message)
    return value.lower()


class HeadTable(Table):
    """How to read the outputs of a network, if its graph does not show it."""

    kind: HeadKind | None = None
    output: str | None = None


def _input_name(name: str) -> str:
    if not re.fullmatch(NAME_PATTERN, name):
        message = "an input's name is made of letters, digits and _ - . and starts with a letter or a digit"
        raise ValueError(message)
    return name


def _category(value: Any) -> Any:
    return str(value) if type(value) is int else value


ShortText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
GivenValue = StrictInt | StrictFloat | ShortText | tuple[StrictInt | StrictFloat, ...]


class InputTable(Table):
    """`[networks.NAME.inputs.INPUT]`: an input beside the image, which jobs give by this name."""

    type: InputKind = "number"
    input: ShortText | None = None  # of the model
    shape: Annotated[
        tuple[Annotated[StrictInt, Field(ge=1, le=MAX_INPUT_WIDTH)], ...], Field(max_length=8)
    ] = ()
    default: GivenValue | None = None
    constant: GivenValue | None = None
    minimum: float | None = None
    maximum: float | None = None
    values: Annotated[
        tuple[Annotated[ShortText, BeforeValidator(_category)], ...], Field(max_length=MAX_INPUT_WIDTH)
    ] = ()
    encoding: Encoding = "one_hot"
    scale: float = 1.0
    offset: float = 0.0

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        is_category, given = self.type == "category", self.model_fields_set
        numeric = [name for name in ("shape", "minimum", "maximum", "scale", "offset") if name in given]
        low, high = self.minimum, self.maximum
        for is_wrong, message in (
            (
                is_category and not self.values,
                "values is needed: the categories, in the order of their encoding",
            ),
            (is_category and numeric, f"{', '.join(numeric)} is not for a category"),
            (not is_category and self.values, 'values is for type = "category"'),
            (not is_category and "encoding" in given, 'encoding is for type = "category"'),
            (len({*self.values}) < len(self.values), "values has one category twice"),
            (self.default is not None and self.constant is not None, "give either default or constant"),
            (low is not None and high is not None and low > high, "minimum is larger than maximum"),
            (self.scale == 0, "scale must not be 0: all values would be the same"),
        ):
            if is_wrong:
                raise ValueError(message)
        self.to_input("it")
        return self

    def to_input(self, name: str) -> NetworkInput:
        """Return the input for a row. Raises ValueError if its default is not allowed."""
        given = self.default if self.constant is None else self.constant
        values: dict[str, Any] = self.model_dump(exclude={"type", "default", "constant"})
        one = NetworkInput(name, self.type, constant=self.constant is not None, **values)
        if one.width > MAX_INPUT_WIDTH:
            message = f"it has {one.width:,} numbers; at most {MAX_INPUT_WIDTH:,} are allowed"
            raise ValueError(message)
        try:
            checked: InputValue = one.check(one.sample if given is None else given)
        except InvalidNetworkInput as error:
            what = "no value is possible" if given is None else "default"
            message = f"{what if self.constant is None else 'constant'}: {error}"
            raise ValueError(message) from error
        return one if given is None else replace(one, default=checked)


Side = Annotated[StrictInt, Field(ge=8, le=8192)]  # pixels
PreprocessingField = Annotated[
    Annotated[str, AfterValidator(_preprocessing), Tag(NAME_TAG)] | Annotated[Scaling, Tag(VALUES_TAG)],
    Discriminator(lambda value: NAME_TAG if isinstance(value, str) else VALUES_TAG),
]
SizingField = Annotated[
    Annotated[str, AfterValidator(_sizing), Tag(NAME_TAG)] | Annotated[SizingTable, Tag(VALUES_TAG)],
    Discriminator(lambda value: NAME_TAG if isinstance(value, str) else VALUES_TAG),
]
Labels = Annotated[
    Annotated[ShortText, Tag(NAME_TAG)] | Annotated[tuple[ShortText, ...], Tag(VALUES_TAG)],
    Discriminator(lambda value: NAME_TAG if isinstance(value, str) else VALUES_TAG),
]


class OperatorNetwork(Table):
    """`[networks.NAME]`: a model file, or an architecture and its weights."""

    model: Annotated[ShortText, AfterValidator(_without_user), AfterValidator(_model)] | None = None
    architecture: Annotated[ShortText, AfterValidator(_architecture)] | None = None
    weights: Annotated[ShortText, AfterValidator(_without_user), AfterValidator(_weights)] | None = None
    sha256: Annotated[str, AfterValidator(_checksum)]
    labels: Labels = ()
    classes: Annotated[StrictInt, Field(ge=2, le=100_000)] | None = None
    pretrained: StrictBool | None = None  # built with weights="imagenet"
    preprocessing: PreprocessingField | None = None
    sizing: SizingField = "area"
    input_size: tuple[Side, Side] | None = None
    target_layer: ShortText | None = None
    head: HeadTable = HeadTable()
    scores_only: StrictBool | None = None  # a Keras model that is not taken apart
    layout: Layout | None = None  # of an ONNX or TFLite file, where its input does not show it
    imports: Annotated[tuple[Annotated[ShortText, AfterValidator(_module)], ...], Field(max_length=16)] = ()
    image_input: ShortText | None = None
    inputs: Annotated[
        dict[Annotated[str, AfterValidator(_input_name)], InputTable], Field(max_length=MAX_INPUTS)
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        built = self.architecture is not None
        for is_wrong, message in (
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
            (
                self._is_score_file and self.scores_only is False,
                f"scores_only cannot be false: an {' or '.join(SCORE_FILES)} file has no gradients",
            ),
            (
                self.only_gives_scores and self.target_layer is not None,
                "target_layer belongs to a network with gradients: this one only gives scores",
            ),
            (
                self.layout is not None and not self._is_score_file,
                f"layout belongs to an {' or '.join(SCORE_FILES)} file",
            ),
            (
                built and self.imports,
                "imports belongs to model: an architecture has no layers but those of Keras",
            ),
            (
                built and (self.inputs or self.image_input),
                "inputs and image_input belong to model: an architecture takes an image alone",
            ),
            (
                self._is_score_file and self.imports,
                f"imports belongs to a Keras model, not to an {' or '.join(SCORE_FILES)} file",
            ),
            (
                self.only_gives_scores and (self.inputs or self.image_input),
                "inputs and image_input belong to a Keras model with gradients: this one only gives scores",
            ),
        ):
            if is_wrong:
                raise ValueError(message)
        preprocessing = self.to_preprocessing() or (
            self.architecture_row and self.architecture_row.preprocessing
        )
        if preprocessing:
            with _as_value_error():
                self.to_sizing().check_channels(preprocessing.pixel_channels)
        return self

    @property
    def _is_score_file(self) -> bool:
        return bool(self.model and self.model.endswith(SCORE_FILES))

    @property
    def only_gives_scores(self) -> bool:
        """Whether the network is not taken apart: RISE and occlusion alone explain it."""
        return bool(self.scores_only) or self._is_score_file

    @property
    def architecture_row(self) -> NetworkRow | None:
        """The row of the architecture in the catalog."""
        return ARCHITECTURES[self.architecture] if self.architecture else None

    def to_preprocessing(self) -> Preprocessing | None:
        """The preprocessing, if it is given."""
        if isinstance(self.preprocessing, Scaling):
            return self.preprocessing.preprocessing()
        return PREPROCESSING[self.preprocessing] if self.preprocessing else None

    def to_sizing(self) -> Sizing:
        """How images are brought to the input size."""
        return find_sizing(self.sizing) if isinstance(self.sizing, str) else self.sizing.sizing()

    def to_inputs(self) -> tuple[NetworkInput, ...]:
        """The further inputs for a row."""
        return tuple(table.to_input(name) for name, table in self.inputs.items())

    def to_head(self) -> Head:
        """The head for a row."""
        return Head(self.head.kind, self.head.output)


class RegistryFile(Table):
    """The whole file."""

    networks: dict[Annotated[str, AfterValidator(_name)], OperatorNetwork]


SIZE_ERRORS = {"tuple_type", "too_long", "missing"}  # of a list of two
NAME_OR_TABLE = {"preprocessing", "sizing"}
INNER_TABLES: dict[str, type[Table]] = {
    "head": HeadTable,
    "preprocessing": Scaling,
    "sizing": SizingTable,
    "inputs": InputTable,
}


def describe_errors(error: ValidationError) -> list[str]:
    """Describe the errors in a registry.

    Args:
        error: From the validation of `RegistryFile`.

    Returns:
        Each error with its key, as `networks.tumours.sha256: ...`.
    """
    descriptions = []
    for detail in error.errors(include_url=False, include_input=False):
        steps = [str(step) for step in detail["loc"] if step not in {NAME_TAG, VALUES_TAG, "[key]"}]
        reason = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            tables: dict[int, type[Table]] = {1: RegistryFile, 3: OperatorNetwork}
            table = tables.get(len(steps)) or INNER_TABLES[steps[2]]
            reason = f"there is no such key; {_hint(steps[-1], table.model_fields)}"
        elif "input_size" in steps[2:3] and detail["type"] in SIZE_ERRORS:
            steps, reason = steps[:3], "must be [height, width], as in [224, 224]"
        elif detail["type"] == "missing":
            reason = "is missing" + (": `sha256sum FILE` prints it" if steps[-1] == "sha256" else "")
        elif detail["type"] == "tuple_type":
            reason = "must be a list"
        elif detail["type"] == "model_type":
            reason = "must be a name or a table" if steps[-1] in NAME_OR_TABLE else "must be a table"
            reason += ', as in { kind = "softmax" }' if steps[-1] == "head" else ""
        descriptions.append(f"{'.'.join(steps)}: {reason}")
    return descriptions

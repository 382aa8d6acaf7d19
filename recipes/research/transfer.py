"""Fine-tuned on one data set, measured on others: a comparison as a YAML file says it.

`read_config` reads such a file, `photos.yaml` for one, and `Config.table` gives one of its tables: what is trained and
measured with which settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from benchmarks import fingerprint
from compare_methods import TRAINERS, Method
from compare_run import Budget, Measuring
from transfer_data import DataSet, Transfer, Unseen

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.results import eps_text
from hf_robust_vision.training.config import Radius


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table: a method with its options, and what is chosen for it on validation photos.

    Args:
        key: Its name in the file and on the command line.
        label: For tables.
        method: Of `TRAINERS`; None is the original.
        options: Arguments of its trainer.
        learning_rates: To choose from; default: those of all rows.
        weights: Shares of the hardened weights to choose from; what is left is the original's.
        ours: Of the rows that are ours, the one that was chosen is tested.
        on_request: Left out where it is not named.
    """

    key: str
    label: str
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] | None = None
    weights: tuple[float, ...] = (1.0,)
    ours: bool = False
    on_request: bool = False

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in TRAINERS:
            raise ValueError(f"methods: {self.key}: no method {self.method!r}; there are {', '.join(TRAINERS)}.")
        if not all(0 < weight <= 1 for weight in self.weights) or 1.0 not in self.weights:
            raise ValueError(f"methods: {self.key}: weights must lie above 0, up to 1.0 among them.")

    def make(self) -> Method:
        """As `compare_run` takes it."""
        return Method(self.label, TRAINERS[self.method] if self.method else None, dict(self.options))


@dataclass(frozen=True)
class Training:
    """The fine-tuning of every row."""

    passes: float
    batch_size: int
    attack_eps: float
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """How learning rates and weights are chosen; with `unseen`, those of ours on classes held out of fine-tuning."""

    learning_rates: tuple[float, ...]
    passes: float
    protocol: str
    steps: int
    eps: tuple[float, ...]
    images: int
    unseen: Unseen | None = None

    def measuring(self) -> Measuring:
        """On validation photos."""
        return Measuring(self.protocol, self.steps, self.images, self.eps, "validation")


@dataclass(frozen=True)
class Test:
    """What the rows are measured with at last."""

    __test__ = False  # of pytest

    protocol: str
    steps: int
    eps: tuple[float, ...]
    images: int
    seeds: tuple[int, ...]

    def measuring(self) -> Measuring:
        """On test photos."""
        return Measuring(self.protocol, self.steps, self.images, self.eps, "test")


@dataclass(frozen=True)
class Sanity:
    """The checks of each hardened model."""

    samples: int
    protocol: str
    steps: int
    queries: int


@dataclass(frozen=True)
class CrossCheck:
    """What an independent implementation attacks, too: photos of a set at a radius, by rows of a table.

    Args:
        set: Name of a measured data set.
        eps: Radius.
        images: At most so many photos.
        methods: Keys of rows; "ours" is the one of ours that was chosen.
    """

    set: str
    eps: float
    images: int
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """One table: everything that decides its numbers."""

    name: str
    title: str
    about: str
    benchmark: Transfer
    training: Training
    choice: Choice
    test: Test
    sanity: Sanity
    rows: tuple[Row, ...]
    compete: bool  # of the rows that are ours, the one that was chosen stands for all
    cross_check: CrossCheck | None = None

    @property
    def choices(self) -> tuple[str, str]:
        """Names of what is chosen: on validation photos, and of ours on classes held out."""
        name = eps_text(self.training.attack_eps, "linf")
        return name, f"{name}, unseen classes"

    def chosen_as(self, row: Row) -> str:
        """Of `choices`, the one that says what was chosen for a row."""
        return self.choices[row.ours and self.choice.unseen is not None]

    def settings(self) -> dict[str, Any]:
        """What was asked for, in plain values."""
        asked = [row.key for row in self.rows]
        return {"asked": asked, "training": dataclasses.asdict(self.training), "test": dataclasses.asdict(self.test)}

    def budget(self, steps: int, learning_rate: float) -> Budget:
        """Of one row."""
        options = tuple(sorted(self.training.options.items()))
        return Budget(steps, self.training.batch_size, learning_rate, options)


OVERRIDES = ("methods", "attack_eps", "passes", "steps", "images", "seeds")


@dataclass(frozen=True)
class Config:
    """A file, checked."""

    name: str
    model: str
    templates: str
    train: DataSet
    validation_share: float
    measured: tuple[DataSet, ...]
    training: Training
    choice: Choice
    measuring: Test
    sanity: Sanity
    methods: tuple[Row, ...]
    tables: Mapping[str, Mapping[str, Any]]
    title: str = ""
    about: str = ""
    cross_check: CrossCheck | None = None

    def table(self, name: str | None, changes: Mapping[str, Any], data: Path | None, model: str | None) -> Table:
        """One of the tables, with changes of a command line.

        Raises:
            ValueError: If there is none of that name, or a change makes no sense.
        """
        name = name or next(iter(self.tables))
        if name not in self.tables:
            raise ValueError(f"no table {name!r}; there are {', '.join(self.tables)}.")
        said = dict(self.tables[name]) | {key: value for key, value in changes.items() if value is not None}
        rows = {row.key: row for row in self.methods}
        usual = [key for key, row in rows.items() if not (row.ours or row.on_request)]
        named = list(said.pop("methods", None) or [*usual, "ours"])
        if stray := [key for key in named if key not in (*rows, "ours")]:
            raise ValueError(f"no method {stray[0]!r}; there are {', '.join(rows)}, and ours for the one chosen.")
        chosen = [key for key in rows if key in named or ("ours" in named and rows[key].ours)]
        training, choice, test = self.training, self.choice, self.measuring
        if "attack_eps" in said:
            training = replace(training, attack_eps=float(Radius(said.pop("attack_eps"))))
        if "passes" in said:
            choice = replace(choice, passes=said["passes"])
            training = replace(training, passes=said.pop("passes"))
        test = replace(test, **{key: tuple(value) if key == "seeds" else value for key, value in said.items()})
        if stray := [eps for eps in choice.eps if eps not in test.eps]:
            raise ValueError(
                f"choice: eps {stray[0] * 255:g}/255 is not measured on test photos; add it to measuring."
            )
        checkpoint, train = model or self.model, self.train.below(data)
        sets = tuple(each.below(data) for each in self.measured)
        benchmark = Transfer(
            checkpoint,
            self.templates,
            training.attack_eps,
            train,
            self.validation_share,
            sets,
            _marks(checkpoint, data),
        )
        return Table(
            name,
            self.title,
            self.about,
            benchmark,
            training,
            choice,
            test,
            self.sanity,
            tuple(rows[key] for key in chosen),
            compete="ours" in named,
            cross_check=self.cross_check,
        )


def _marks(checkpoint: str, data: Path | None) -> tuple[str, ...]:
    """Hashes of the model's weights and of the data, where they are files here."""
    weights = Path(checkpoint) / "model.safetensors"
    if Path(checkpoint).is_dir() and not weights.is_file():
        raise ValueError(f"{checkpoint} has no model.safetensors; wanted the folder of a CLIP, or a name of the Hub.")
    files = sorted(data.rglob("*.parquet")) if data else []
    if data and not files:
        raise ValueError(f"{data} holds no Parquet files; wanted the folder that holds the data sets.")
    return fingerprint(weights) if weights.is_file() else checkpoint, fingerprint(*files) if files else ""


def read_config(file: Path) -> Config:
    """Read a YAML file.

    Raises:
        ValueError: One line that names the entry, if something is missing, unknown, or makes no sense.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from error
    try:
        return _config(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _config(values: Any) -> Config:
    values = dict(_mapping(values, "the file"))
    read: dict[str, Any] = {
        "train": lambda v: _take(DataSet, v, "train"),
        "measured": lambda v: tuple(_take(DataSet, each, "measured") for each in v),
        "training": lambda v: _take(Training, v, "training"),
        "choice": _choice,
        "measuring": lambda v: _take(Test, v, "measuring"),
        "sanity": lambda v: _take(Sanity, v, "sanity"),
        "cross_check": lambda v: _take(CrossCheck, v, "cross_check"),
        "methods": lambda v: tuple(_take(Row, {"key": key} | each, f"methods: {key}") for key, each in v.items()),
    }
    values |= {key: make(values[key]) for key, make in read.items() if key in values}
    config: Config = _take(Config, values, "the file")
    get_templates(config.templates)
    for name, table in config.tables.items():
        if stray := set(table) - set(OVERRIDES):
            raise ValueError(f"tables: {name}: unknown {sorted(stray)[0]!r}; a table may set {', '.join(OVERRIDES)}.")
    if not 0 < config.validation_share < 1:
        raise ValueError(f"validation_share must lie between 0 and 1, got {config.validation_share}.")
    beside = config.choice.unseen.beside if config.choice.unseen else ()
    if stray := set(beside) - {row.key for row in config.methods if not row.ours}:
        raise ValueError(f"choice: unseen: beside: {sorted(stray)[0]!r} is no method that is not ours.")
    for each in (config.choice, config.measuring, config.sanity):
        get_protocol(each.protocol, steps=each.steps)
    if len(names := [each.name for each in config.measured]) > len(set(names)):
        raise ValueError(f"measured: a name stands twice among {', '.join(names)}.")
    if (twice := config.cross_check) and twice.set not in names:
        raise ValueError(f"cross_check: no set {twice.set!r} is measured; there are {', '.join(names)}.")
    if twice and (stray := set(twice.methods) - {"ours", *(row.key for row in config.methods)}):
        raise ValueError(f"cross_check: no method {sorted(stray)[0]!r}; there are those of methods, and ours.")
    return config


def _choice(values: Any) -> Choice:
    values = dict(_mapping(values, "choice"))
    if "unseen" in values:
        values["unseen"] = _take(Unseen, values["unseen"], "choice: unseen")
    return _take(Choice, values, "choice")


def _take(cls: type[T], values: Any, where: str) -> T:
    """A dataclass of a mapping; radii may be fractions, lists become tuples."""
    values = dict(_mapping(values, where))
    known = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if stray := [key for key in values if key not in known]:
        raise ValueError(f"{where}: unknown {stray[0]!r}; there are {', '.join(known)}.")
    needed = [key for key, item in known.items() if item.default is item.default_factory is dataclasses.MISSING]
    if missing := [key for key in needed if key not in values]:
        raise ValueError(f"{where}: {missing[0]} is missing.")
    for key, value in values.items():
        if key in ("eps", "attack_eps"):
            radii = value if isinstance(value, list) else [value]
            found = tuple(float(Radius(each)) for each in radii)
            values[key] = found if isinstance(value, list) else found[0]
        elif isinstance(value, list):
            values[key] = tuple(value)
        if key in ("passes", "batch_size", "steps", "images", "samples", "queries") and not _counts(values[key]):
            raise ValueError(f"{where}: {key} must be a number of at least 1, got {value!r}.")
    return cls(**values)


def _mapping(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: wanted entries NAME: VALUE, got {values!r}.")
    return values


def _counts(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1

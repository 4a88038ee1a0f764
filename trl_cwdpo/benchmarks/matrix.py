"""The YAML file of a benchmark: what is compared on what, checked before anything runs.

A cell is one training run: a method in a regime with one learning rate, one β and one seed. The cells of the selection
seeds cover the whole grid and are measured on validation rows; from them each method gets its own best setting, which
then runs with the other seeds and is measured on test rows.
"""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from trl_cwdpo.benchmarks.checks import MatrixError, above_zero, at_least, nearest, no_twins, one_of
from trl_cwdpo.benchmarks.methods import METHODS

GRADES = ("hard", "medium", "easy")
# The rival that is the model which stage 2 starts from
START = "start"
STAGE1_FORMS = ("smoothed", "hinge", "band", "none", "skip")


@dataclass(frozen=True)
class Base:
    """
    The pretrained model that everything starts from.

    Args:
        steps (`int`, *optional*, defaults to `800`):
            Steps of pretraining. Fewer make an imperfect base.
        scenes (`int`, *optional*, defaults to `20000`):
            Pictures of pretraining.
        seed (`int`, *optional*, defaults to `0`):
            Its seed.
    """

    steps: int = 800
    scenes: int = 20000
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, scenes=self.scenes)


@dataclass(frozen=True)
class Data:
    """
    The rows.

    Args:
        stage1_pairs (`int`, *optional*, defaults to `1500`):
            Pairs of stage 1.
        stage2_pairs (`int`, *optional*, defaults to `500`):
            Pairs of stage 2, others than those.
        validation (`int`, *optional*, defaults to `200`):
            Rows on which settings are chosen.
        test (`int`, *optional*, defaults to `300`):
            Rows on which the chosen settings are compared.
        grade_mix (`dict[str, float]`, *optional*):
            Shares of hard, medium and easy rejected responses in training; thirds by default.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Share of the pairs of stage 2 whose responses are swapped.
    """

    stage1_pairs: int = 1500
    stage2_pairs: int = 500
    validation: int = 200
    test: int = 300
    grade_mix: dict[str, float] = field(default_factory=dict)
    label_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("stage1_pairs", "stage2_pairs", "validation", "test"):
            at_least(1, **{name: getattr(self, name)})
        if not 0.0 <= self.label_noise <= 1.0:
            raise MatrixError(f"`label_noise` is a share in [0, 1], got {self.label_noise}.")
        for grade, share in self.grade_mix.items():
            one_of("a grade of `grade_mix`", grade, GRADES)
            at_least(0, **{f"grade_mix.{grade}": share})
        if self.grade_mix and not any(self.grade_mix.values()):
            raise MatrixError("`grade_mix` has no share above 0. Give one a share, or leave it out for thirds.")


@dataclass(frozen=True)
class Stage1:
    """
    Stage 1.

    Args:
        steps (`int`, *optional*, defaults to `60`):
            Optimizer steps.
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Peak learning rate.
        batch_size (`int`, *optional*, defaults to `16`):
            Pairs a step.
        options (`dict[str, Any]`, *optional*):
            Further options of [`~trl_cwdpo.GentleNegativeSFTConfig`].
    """

    steps: int = 60
    learning_rate: float = 1e-4
    batch_size: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, batch_size=self.batch_size)
        above_zero("learning_rate", self.learning_rate)


@dataclass(frozen=True)
class Stage2:
    """
    Stage 2, the same for all methods.

    Args:
        steps (`int`, *optional*, defaults to `60`):
            Optimizer steps.
        batch_size (`int`, *optional*, defaults to `16`):
            Pairs a step.
        options (`dict[str, Any]`, *optional*):
            Further options of [`~trl_cwdpo.CWDPOConfig`], for all methods that train on pairs.
        reward (`bool`, *optional*, defaults to `False`):
            Whether the task's oracle scores sampled negatives.
    """

    steps: int = 60
    batch_size: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    reward: bool = False

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, batch_size=self.batch_size)


@dataclass(frozen=True)
class Entry:
    """
    A row of the tables.

    Args:
        method (`str`):
            One of `METHODS`.
        stage1 (`str`, *optional*, defaults to `"smoothed"`):
            What it starts from: stage 1 with this `negative_loss_type`, or `"skip"` for the pretrained model.
        options (`dict[str, Any]`, *optional*):
            Options of its configuration on top of the method's.
    """

    method: str
    stage1: str = "smoothed"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Regime:
    """
    Changes to the data, the base and stage 2 that all methods are run under.

    Args:
        data (`dict[str, Any]`, *optional*):
            Keys of [`Data`] that differ.
        base (`dict[str, Any]`, *optional*):
            Keys of [`Base`] that differ.
        stage2 (`dict[str, Any]`, *optional*):
            Keys of [`Stage2`] that differ.
    """

    data: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    stage2: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """
    Settings that each method is tried with.

    Args:
        learning_rate (`list[float]`):
            Peak learning rates.
        beta (`list[float]`, *optional*):
            β; methods without β run once a learning rate.
    """

    learning_rate: list[float]
    beta: list[float] = field(default_factory=lambda: [0.1])

    def __post_init__(self) -> None:
        if not self.learning_rate or not self.beta:
            raise MatrixError("`grid` needs at least one learning_rate and one beta.")
        for name in ("learning_rate", "beta"):
            for value in getattr(self, name):
                above_zero(name, value)
            no_twins(name, getattr(self, name))


@dataclass(frozen=True)
class Matrix:
    """
    A whole benchmark.

    Args:
        grid ([`Grid`]):
            Settings to choose from.
        methods (`dict[str, Entry]`):
            By the name that the tables show.
        task (`str`, *optional*, defaults to `"shapes-captions"`):
            The task.
        selection_seeds (`list[int]`, *optional*):
            Seeds of the grid; may be empty where the grid has one setting, which then needs no choice.
        seeds (`list[int]`, *optional*):
            Seeds of the comparison, none of them among those; empty runs the grid alone.
        regimes (`dict[str, Regime]`, *optional*):
            By name; one without changes by default.
        base ([`Base`], *optional*), data ([`Data`], *optional*), stage1 ([`Stage1`], *optional*), \
        stage2 ([`Stage2`], *optional*):
            See there.
        lora (`dict[str, Any]`, *optional*):
            Arguments of [`~peft.LoraConfig`], for both stages; empty trains all weights. The adapter of stage 1 is
            merged before stage 2.
        curve_points (`int`, *optional*, defaults to `4`):
            How often a run of the comparison is measured on the way, for learning curves.
        curve_rows (`int`, *optional*, defaults to `100`):
            Validation rows of these measurements.
        tolerance (`float`, *optional*, defaults to `0.02`):
            A setting counts as good that stays this close to the best one of its method.
        target_gain (`float`, *optional*, defaults to `0.01`):
            How far above its start a run must get to have reached the target.
    """

    grid: Grid
    methods: dict[str, Entry]
    task: str = "shapes-captions"
    selection_seeds: list[int] = field(default_factory=lambda: [0])
    seeds: list[int] = field(default_factory=lambda: [10, 11, 12, 13, 14])
    regimes: dict[str, Regime] = field(default_factory=lambda: {"default": Regime()})
    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    stage1: Stage1 = field(default_factory=Stage1)
    stage2: Stage2 = field(default_factory=Stage2)
    lora: dict[str, Any] = field(default_factory=dict)
    curve_points: int = 4
    curve_rows: int = 100
    tolerance: float = 0.02
    target_gain: float = 0.01

    def __post_init__(self) -> None:
        for name, entry in self.methods.items():
            one_of(f"methods.{name}.method", entry.method, METHODS)
            one_of(f"methods.{name}.stage1", entry.stage1, STAGE1_FORMS)
        at_least(0, curve_points=self.curve_points, tolerance=self.tolerance)
        at_least(1, curve_rows=self.curve_rows)
        for name in ("seeds", "selection_seeds"):
            no_twins(name, getattr(self, name))
        if not self.selection_seeds and not self.seeds:
            raise MatrixError("`seeds` and `selection_seeds` are empty: there is nothing to run. Name a seed.")
        if not self.selection_seeds and (len(self.grid.learning_rate) > 1 or len(self.grid.beta) > 1):
            raise MatrixError(
                "`selection_seeds` is empty, but `grid` has several settings to choose from. Name a seed, or leave "
                "one learning_rate and one beta."
            )
        for name in ("methods", "regimes"):
            if not getattr(self, name):
                raise MatrixError(f"`{name}` is empty: there is nothing to run. Name at least one.")
        shared = sorted(set(self.seeds) & set(self.selection_seeds))
        if shared:
            raise MatrixError(
                f"`seeds` and `selection_seeds` share {shared}: a setting would be confirmed on the runs that it was "
                "chosen by. Use others."
            )
        self._check_names()

    def _check_names(self) -> None:
        for kind in ("methods", "regimes"):
            for name in getattr(self, kind):
                if not name.strip(".") or set(name) & set("/\\"):
                    raise MatrixError(f"`{kind}` has the name {name!r}, which cannot be a folder's. Rename it.")
        if START in self.methods:
            raise MatrixError(f"`methods` has the name {START!r}, which tables have for the start. Rename it.")

    def data_of(self, regime: str) -> Data:
        """The rows in a regime."""
        return _changed(self.data, self.regimes[regime].data, f"regimes.{regime}.data")

    def base_of(self, regime: str) -> Base:
        """The pretrained model in a regime."""
        return _changed(self.base, self.regimes[regime].base, f"regimes.{regime}.base")

    def stage2_of(self, regime: str) -> Stage2:
        """Stage 2 in a regime; options are joined."""
        changes = dict(self.regimes[regime].stage2)
        if "options" in changes:
            changes["options"] = {**self.stage2.options, **changes["options"]}
        return _changed(self.stage2, changes, f"regimes.{regime}.stage2")

    def settings(self, entry: Entry) -> list[tuple[float, float]]:
        """Learning rates and β that a method is tried with."""
        betas = self.grid.beta if METHODS[entry.method].uses_beta else self.grid.beta[:1]
        return [(learning_rate, beta) for learning_rate in self.grid.learning_rate for beta in betas]

    def grid_cells(self) -> "Iterator[Cell]":
        """The cells by which settings are chosen, cheap comparisons first: all methods of a seed."""
        for seed in self.selection_seeds:
            for regime in self.regimes:
                for name, entry in self.methods.items():
                    for learning_rate, beta in self.settings(entry):
                        yield Cell(regime, name, learning_rate, beta, seed)

    def only_settings(self) -> dict[tuple[str, str], tuple[float, float]]:
        """The setting of each regime and method where the grid has one."""
        setting = (self.grid.learning_rate[0], self.grid.beta[0])
        return {(regime, name): setting for regime in self.regimes for name in self.methods}

    def final_cells(self, chosen: Mapping[tuple[str, str], tuple[float, float]]) -> "Iterator[Cell]":
        """The cells of the comparison, given the chosen setting of each regime and method."""
        for seed in self.seeds:
            for (regime, name), (learning_rate, beta) in chosen.items():
                yield Cell(regime, name, learning_rate, beta, seed)

    def splits(self, seed: int) -> tuple[str, ...]:
        """What a run is measured on: those by which settings are chosen never touch the test rows."""
        return ("validation", "test") if seed in self.seeds else ("validation",)

    def start_settings(self, regime: str, stage1: str, seed: int) -> dict[str, Any]:
        """All that the model which stage 2 starts from depends on."""
        if stage1 == "skip":
            form: dict[str, Any] = {"stage1": "skip"}
        else:
            form = {"stage1": {"negative_loss_type": stage1, **asdict(self.stage1)}, "seed": seed, **self._lora()}
        data = asdict(self.data_of(regime))
        return {
            "task": self.task,
            "base": asdict(self.base_of(regime)),
            # Label noise is stage 2's
            "data": {name: value for name, value in data.items() if name != "label_noise"},
            "splits": self.splits(seed),
            **form,
        }

    def _lora(self) -> dict[str, Any]:
        # Left out where there is none, so that results of before there was the key stay valid
        return {"lora": self.lora} if self.lora else {}

    def cell_settings(self, cell: "Cell") -> dict[str, Any]:
        """All that the outcome of a cell depends on."""
        entry = self.methods[cell.method]
        return {
            "start": self.start_settings(cell.regime, entry.stage1, cell.seed),
            "data": asdict(self.data_of(cell.regime)),
            "stage2": asdict(self.stage2_of(cell.regime)),
            "entry": asdict(entry),
            "method": asdict(METHODS[entry.method]),
            "learning_rate": cell.learning_rate,
            "beta": cell.beta,
            "seed": cell.seed,
            "curve": [self.curve_points, self.curve_rows] if cell.seed in self.seeds else None,
            **self._lora(),
        }


@dataclass(frozen=True)
class Cell:
    """
    One training run.

    Args:
        regime (`str`):
            Name of the regime.
        method (`str`):
            Name of the entry.
        learning_rate (`float`):
            Peak learning rate.
        beta (`float`):
            β.
        seed (`int`):
            Seed of data and training.
    """

    regime: str
    method: str
    learning_rate: float
    beta: float
    seed: int

    @property
    def name(self) -> str:
        """Path of its results, without ending."""
        return f"{self.regime}/{self.method}/lr{self.learning_rate:g}-beta{self.beta:g}-seed{self.seed}"


def digest(settings: Mapping[str, Any]) -> str:
    """Tells settings apart, in 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def parse_matrix(values: Any) -> Matrix:  # noqa: ANN401 (whatever YAML holds)
    """
    Read a matrix.

    Args:
        values (`dict`):
            The content of its YAML file.

    Returns:
        [`Matrix`].

    Raises:
        MatrixError: Naming the key, the value and what would be right.
    """
    if isinstance(values, Mapping) and isinstance(values.get("methods"), Mapping):
        # An entry without a method is the method of its name
        methods = {
            name: {"method": str(name), **(entry or {})} if isinstance(entry or {}, Mapping) else entry
            for name, entry in values["methods"].items()
        }
        values = {**values, "methods": methods}
    matrix = _build(Matrix, values, "the file")
    for regime in matrix.regimes:
        # Unknown keys are found before anything runs
        matrix.data_of(regime), matrix.base_of(regime), matrix.stage2_of(regime)
    return matrix


def _changed(origin: Any, changes: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401 (one of the dataclasses)
    return _build(type(origin), {**asdict(origin), **changes}, where)


def _build(kind: Any, values: Any, where: str) -> Any:  # noqa: ANN401 (one of the dataclasses)
    if not isinstance(values, Mapping):
        raise MatrixError(f"{where} must map keys to values, got {values!r}.")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise MatrixError(f"unknown key {name!r} in {where}{nearest(str(name), hints)}")
    missing = [
        entry.name
        for entry in fields(kind)
        if entry.name not in values and entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing:
        raise MatrixError(f"{where} lacks the key {missing[0]!r}.")
    checked = {name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return kind(**checked)
    except MatrixError as error:
        raise error if kind is Matrix else MatrixError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:  # noqa: ANN401
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if hint is float:
        return _number(value, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, where)
    if origin is list and isinstance(value, Sequence) and not isinstance(value, str):
        return [_value(arguments[0], item, where) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    # A boolean is an int for Python, but not for whoever wrote the file
    if type(value) is hint:
        return value
    wanted = {"dict": "a mapping of keys to values", "list": "a list, such as [1, 2]"}
    name = getattr(hint, "__name__", str(hint))
    raise MatrixError(f"{where} must be {wanted.get(name, name)}, got {value!r}.")


def _number(value: Any, where: str) -> float:  # noqa: ANN401
    try:
        # YAML 1.1 reads 1e-4 as a string
        return float(value)
    except (TypeError, ValueError):
        raise MatrixError(f"{where} must be a number, got {value!r}.") from None

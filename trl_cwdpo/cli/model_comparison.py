"""Models against one of them on held-out pairs: what is measured, its table, and where further measures are added.

`trl-cwdpo evaluate` and the last step of `trl-cwdpo run` are the same measurement with other options.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_cwdpo.cli.table import MISSING, format_table, number, percent
from trl_cwdpo.evaluation.comparison import compare
from trl_cwdpo.probe_records import ProbeRecord
from trl_cwdpo.probe_rows import ProbeRows, choose_rows
from trl_cwdpo.probe_summary import PairLoss
from trl_cwdpo.row_errors import naming_pictures, naming_rows
from trl_cwdpo.upstream.models import load_processor

SCENE = "scene"
# What only a preference loss defines: header, field of the record, how the number is written
LOSS_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("mean\nw", "weight", lambda value: number(value, 2)),
    ("easy\nw < 0.1", "easy_fraction", percent),
    ("loser\nshare", "loser_share", lambda value: number(value, 2)),
)


MakeCollector = Callable[[ProbeRows, Any], Callable[[str, Any], None]]


@dataclass(frozen=True)
class Settings:
    """
    How models are compared.

    Args:
        size (`int`, *optional*, defaults to `256`):
            Pairs to measure on, drawn by seed.
        batch_size (`int`, *optional*, defaults to `8`):
            Pairs a forward pass.
        max_length (`int`, *optional*, defaults to `1024`):
            Longest prompt plus response in tokens, as in training; `None` cuts nothing off.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Which end is kept.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the models may run.
        pair_loss ([`~trl_cwdpo.probe_summary.PairLoss`], *optional*):
            The preference loss, for cooling weights and the loser share.
    """

    size: int = 256
    batch_size: int = 8
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"
    seed: int = 42
    trust_remote_code: bool = False
    pair_loss: PairLoss | None = None


@dataclass(frozen=True)
class Measure:
    """
    A measure beside the probes.

    Args:
        of_model (`Callable`):
            Takes a loaded model and returns numbers by name, plain JSON values.
        columns (`tuple[tuple[str, str, Callable], ...]`):
            What the table shows of them: header, name, and how the number is written.
    """

    of_model: Callable[[Any], dict[str, Any]]
    columns: tuple[tuple[str, str, Callable[[float], str]], ...]


def _shape_captions(pairs: Any, processor: Any, settings: Settings) -> Measure | None:  # noqa: ANN401
    """Captions of drawn shapes, which an oracle can judge."""
    if SCENE not in pairs.column_names:
        return None

    def of_model(model: Any) -> dict[str, Any]:  # noqa: ANN401 (either kind of model)
        from trl_cwdpo.shapes.evaluation import evaluate

        return evaluate(model, processor, pairs).to_dict()

    return Measure(
        of_model, (("attributes", "attribute_accuracy", percent), ("exact\ncaptions", "exact_rate", percent))
    )


# Each is asked with the pairs, the processor and the settings, and answers with a measure, or None where the data have
# nothing for it. Another one is added here; the table, the JSON and the page show it.
MEASURES: tuple[Callable[[Any, Any, Settings], Measure | None], ...] = (_shape_captions,)


@dataclass(frozen=True)
class Comparison:
    """
    What was found.

    Args:
        reference (`str`):
            The model that changes and distances refer to.
        rows ([`~trl_cwdpo.probe_rows.ProbeRows`]):
            The pairs.
        records (`dict[str, ProbeRecord]`):
            The measurement of each model.
        further (`dict[str, dict]`):
            The numbers of further measures, by model.
        columns (`tuple`):
            The columns of further measures.
    """

    reference: str
    rows: ProbeRows
    records: dict[str, ProbeRecord]
    further: dict[str, dict[str, Any]]
    columns: tuple[tuple[str, str, Callable[[float], str]], ...]

    def to_dict(self) -> dict[str, Any]:
        """`reference`, `num_pairs` and, under `models`, the numbers of each; plain JSON values."""
        numbers = {name: {**numbers_of(record), **self.further[name]} for name, record in self.records.items()}
        return {"reference": self.reference, "num_pairs": len(self.rows), "models": numbers}

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headers and rows of a table; lines within a header are parted by line breaks."""
        of_loss = [
            column
            for column in LOSS_COLUMNS
            if any(getattr(record, column[1]) is not None for record in self.records.values())
        ]
        headers = ["", "pairs\nwon", "margin\nnats", "chosen\nΔ/token", "rejected\nΔ/token", "ECE", "Brier", "TV"]
        headers += [header for header, *_ in of_loss]
        lines = []
        for name, record in self.records.items():
            won = record.accuracy if name != self.reference else None
            deltas = (record.delta0(side) for side in ("chosen", "rejected"))
            lines.append(
                [
                    name,
                    MISSING if won is None else percent(won),
                    number(record.margin.mean, 2),
                    *(number(None if delta is None else delta.mean, 3) for delta in deltas),
                    *(number(value, 3) for value in (record.ece, record.brier, record.total_variation)),
                    *(written(getattr(record, name)) for _, name, written in of_loss),
                    *(written(self.further[name][key]) for _, key, written in self.columns),
                ]
            )
        return [*headers, *(header for header, *_ in self.columns)], lines

    def explanation(self) -> str:
        """What the table refers to."""
        return f"{len(self.rows)} held-out pairs; changes and distances from {self.reference}"

    def table(self) -> str:
        """The numbers laid out, and a line that explains them."""
        return f"{format_table(*self.cells())}\n  {self.explanation()}"


def compare_models(
    models: Mapping[str, str],
    reference: str,
    pairs: Any,  # noqa: ANN401 (map-style)
    settings: Settings,
    make_collector: MakeCollector | None = None,
) -> Comparison:
    """
    Measure models on held-out pairs.

    Args:
        models (`Mapping[str, str]`):
            Folder or hub name of each, by name.
        reference (`str`):
            Which of them changes and distances refer to.
        pairs ([`~datasets.Dataset`]):
            The pairs.
        settings ([`Settings`]):
            How.
        make_collector (`Callable`, *optional*):
            Takes the rows and the processor, and returns a function that is called with name and model of each while
            it is loaded.

    Returns:
        [`Comparison`].
    """
    processor = load_processor(models[reference], trust_remote_code=settings.trust_remote_code)
    with naming_pictures(None, pairs), naming_rows(pairs, processor, "held-out"):
        rows = choose_rows(
            pairs,
            processor,
            settings.size,
            max_length=settings.max_length,
            truncation_mode=settings.truncation_mode,
            seed=settings.seed,
        )
    chosen = pairs.select([row.index for row in rows.rows])
    measures = [measure for ask in MEASURES if (measure := ask(chosen, processor, settings)) is not None]
    further: dict[str, dict[str, Any]] = {name: {} for name in models}
    collect = None if make_collector is None else make_collector(rows, processor)

    def measure_further(name: str, model: Any) -> None:  # noqa: ANN401 (either kind of model)
        for measure in measures:
            further[name] |= measure.of_model(model)
        if collect is not None:
            collect(name, model)

    records = compare(
        models,
        reference,
        rows,
        batch_size=settings.batch_size,
        trust_remote_code=settings.trust_remote_code,
        pair_loss=settings.pair_loss,
        with_model=measure_further,
    )
    return Comparison(reference, rows, records, further, tuple(c for measure in measures for c in measure.columns))


def numbers_of(record: ProbeRecord) -> dict[str, Any]:
    """
    What a comparison keeps of a measurement.

    Args:
        record ([`~trl_cwdpo.probe_records.ProbeRecord`]):
            The measurement.

    Returns:
        `dict[str, Any]`: Plain JSON values.
    """
    plain = record.to_dict()
    kept = (
        *("accuracy", "margin", "ece", "smooth_ece", "brier", "entropy", "top1_mass"),
        *("weight", "easy_fraction", "saturated_fraction", "loser_share"),
    )
    families = {
        name: {"avg_logp": family["avg_logp"], "delta0": family["delta0"]}
        for name, family in plain["families"].items()
    }
    distances = {"tv": plain["total_variation"], "js": plain["jensen_shannon"], "kl": plain["kullback_leibler"]}
    return {**{name: plain[name] for name in kept}, **distances, "families": families}

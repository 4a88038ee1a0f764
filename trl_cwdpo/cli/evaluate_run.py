"""The work of `trl-cwdpo evaluate`: data and models by their names, the comparison, and its three forms."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from datasets.exceptions import DatasetsError

from trl_cwdpo import report
from trl_cwdpo.cli.env import versions
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.evaluate_responses import GeneratedResponses
from trl_cwdpo.cli.model_comparison import Comparison, Settings, compare_models
from trl_cwdpo.cli.report import write_json
from trl_cwdpo.cli.terminal import quiet
from trl_cwdpo.loading import load_preference_dataset, select_rows
from trl_cwdpo.probe_summary import PairLoss
from trl_cwdpo.upstream.models import load_processor, require_model

DEFAULT_BETA = 0.1
LOADING_ERRORS = (OSError, ValueError, DatasetsError)


def run(arguments: argparse.Namespace) -> int:
    """
    Compare models and say what was found.

    Args:
        arguments (`argparse.Namespace`):
            What `evaluate.py` has parsed.

    Returns:
        `int`: The exit code.

    Raises:
        CommandError: If data or models cannot be loaded, or do not fit together.
    """
    _check_outputs(arguments)
    disable_progress_bars()
    with quiet(bars=False):
        pairs = load_pairs(arguments)
        models = named_models(arguments.reference, arguments.models)
        reference = next(iter(models))
        settings = Settings(
            size=arguments.size,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length or None,
            truncation_mode=arguments.truncation_mode,
            seed=arguments.seed,
            trust_remote_code=arguments.trust_remote_code,
            pair_loss=_pair_loss(arguments),
        )
        check_models(models, trust_remote_code=settings.trust_remote_code)
        check_tokens(models, reference, trust_remote_code=settings.trust_remote_code)
        responses = GeneratedResponses(arguments, pairs, batch_size=arguments.batch_size)
        try:
            found = compare_models(models, reference, pairs, settings, responses.collector)
            found = with_responses(found, responses, task=Path(arguments.dataset_name).stem or "data")
        except (OSError, ValueError) as error:
            raise CommandError(str(error)) from error
    _write(arguments, found, models, responses.notes)
    for note in responses.notes:
        print(f"  {note}", file=sys.stderr if arguments.json == "-" else sys.stdout)
    if responses.failure is not None:
        raise CommandError(f"{responses.failure} There are no win-rates; all other numbers are complete.")
    return 0


def _pair_loss(arguments: argparse.Namespace) -> PairLoss | None:
    if not arguments.has_loss:
        return None
    options = {
        "floor": arguments.cooling_floor,
        "temperature": arguments.cooling_temperature,
        "constant": arguments.cooling_constant,
        "min_weight": arguments.cooling_min_weight,
    }
    beta = DEFAULT_BETA if arguments.beta is None else arguments.beta
    return PairLoss(
        beta, arguments.cooling_mode, **{name: value for name, value in options.items() if value is not None}
    )


def with_responses(found: Comparison, responses: GeneratedResponses, *, task: str) -> Comparison:
    """
    Add what was measured with generated responses.

    Args:
        found ([`Comparison`]):
            The measurement so far.
        responses ([`GeneratedResponses`]):
            The responses of all its models.
        task (`str`):
            Name of the dataset in exports.

    Returns:
        [`Comparison`].
    """
    measured = responses.results(found.reference, task=task)
    further = {name: {**numbers, **measured.get(name, {})} for name, numbers in found.further.items()}
    return replace(found, further=further, columns=(*found.columns, *responses.columns))


def _check_outputs(arguments: argparse.Namespace) -> None:
    """What would go wrong at the end is said before the work."""
    missing = report.missing_packages() if arguments.html is not None else []
    if missing:
        raise CommandError(f"--html needs {', '.join(missing)}. Install what is missing: {report.INSTALL}")
    for option, file in (("--html", arguments.html), ("--json", arguments.json)):
        if file is None or str(file) == "-":
            continue
        if Path(file).is_dir() or not Path(file).absolute().parent.is_dir():
            raise CommandError(f"{option} {file} cannot be written: name a file in a folder that exists.")


def load_pairs(arguments: argparse.Namespace) -> Dataset:
    """
    The pairs that a command line names.

    Args:
        arguments (`argparse.Namespace`):
            With `dataset_name`, `dataset_config`, `columns`, `image_folder`, `split` and `eval_rows`.

    Returns:
        [`~datasets.Dataset`].

    Raises:
        CommandError: If they cannot be loaded.
    """
    try:
        splits = load_preference_dataset(
            arguments.dataset_name,
            arguments.dataset_config,
            columns=arguments.columns,
            image_folder=arguments.image_folder,
        )
        name = arguments.split or _default_split(list(splits), rows_given=arguments.eval_rows is not None)
        if name not in splits:
            raise ValueError(f"there is no split {name!r}; choose one of {', '.join(map(repr, splits))} with --split.")
        pairs = splits[name]
        return pairs if arguments.eval_rows is None else select_rows(pairs, arguments.eval_rows, "eval_rows")
    except LOADING_ERRORS as error:
        raise CommandError(f"{arguments.dataset_name}: {error}") from error


def _default_split(names: Sequence[str], *, rows_given: bool) -> str:
    if len(names) == 1:
        return names[0]
    return "train" if rows_given else "test"


def named_models(reference: str, models: Sequence[str]) -> dict[str, str]:
    """
    Models by the shortest names that tell them apart.

    Args:
        reference (`str`):
            The reference; it comes first.
        models (`Sequence[str]`):
            The others; the reference may be among them.

    Returns:
        `dict[str, str]`.
    """
    paths = list(dict.fromkeys([reference, *models]))
    return dict(zip(report.distinct_names([Path(path) for path in paths]), paths, strict=True))


def check_models(models: dict[str, str], *, trust_remote_code: bool = False) -> None:
    """
    Make sure that all models are there before the first is measured.

    Args:
        models (`dict[str, str]`):
            Folder or hub name of each, by name.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the models may run.

    Raises:
        CommandError: If one is not.
    """
    for path in models.values():
        try:
            require_model(path, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise CommandError(str(error)) from error


def check_tokens(models: dict[str, str], reference: str, *, trust_remote_code: bool = False) -> None:
    """
    Make sure that log-probabilities per token can be compared.

    Args:
        models (`dict[str, str]`):
            Folder or hub name of each, by name.
        reference (`str`):
            The name of the reference.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that comes with the models may run.

    Raises:
        CommandError: If a model's tokens are not those of the reference, or the reference has no tokenizer.
    """
    try:
        expected = _vocabulary(load_processor(models[reference], trust_remote_code=trust_remote_code))
    except (OSError, ValueError) as error:
        raise CommandError(
            f"The tokenizer of the reference {models[reference]!r} cannot be loaded: {error}"
        ) from error
    for path in models.values():
        try:
            vocabulary = _vocabulary(load_processor(path, trust_remote_code=trust_remote_code))
        except (OSError, ValueError):
            continue  # saved without a tokenizer
        if vocabulary != expected:
            raise CommandError(
                f"{path} and the reference {models[reference]} have different tokens, so that their log-probabilities "
                "per token cannot be compared. Take as --reference a model of the same family."
            )


def _vocabulary(processor: Any) -> dict[str, int]:  # noqa: ANN401 (a processor or a tokenizer)
    return dict(getattr(processor, "tokenizer", processor).get_vocab())


def _write(arguments: argparse.Namespace, found: Comparison, models: dict[str, str], notes: Sequence[str]) -> None:
    about = {
        "dataset": arguments.dataset_name,
        "paths": models,
        "notes": list(notes),
        "versions": versions(),
        "records": {name: record.to_dict() for name, record in found.records.items()},
    }
    if arguments.json == "-":
        write_json({**found.to_dict(), **about}, "-")
    else:
        print(found.table())
    if arguments.html is not None:
        headers, cells = found.cells()
        text = report.render_comparison(
            found.records,
            found.reference,
            ([header.replace("\n", " ") for header in headers], cells),
            "; ".join([found.explanation(), *notes]),
            found.rows.examples,
        )
        report.write_text(arguments.html, text)
        print(f"\nPage: {arguments.html}", file=sys.stderr if arguments.json == "-" else sys.stdout)
    if arguments.json not in (None, "-"):
        write_json({**found.to_dict(), **about}, arguments.json)
        print(f"Numbers: {arguments.json}")

"""`trl-cwdpo generate-negatives`: a new preference dataset whose rejected responses were sampled or edited.

This module stays light, so that `--help` answers at once; the engines are in `generate_policy.py` and
`generate_endpoint.py`.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.formats import LAYOUTS, parse_columns
from trl_cwdpo.negative_options import SELECTIONS


def main(argv: Sequence[str]) -> int:
    """
    Generate negatives.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: 0.
    """
    arguments = _parse(argv)
    if arguments.show_prompt:
        print((files("trl_cwdpo") / "prompts" / "gentle_negative.txt").read_text(encoding="utf-8"), end="")
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    summary = _generate(arguments)
    if summary is None:
        return 0
    counts = ", ".join(f"{count} {source}" for source, count in sorted(summary["sources"].items()))
    cost = f"; cost {summary['cost']:.4f}" if "cost" in summary else ""
    print(f"{summary['rows']} pairs in {arguments.output}: {counts}{cost}")
    return 0


def _generate(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """What came of it; `None` where another process says so."""
    from trl_cwdpo.cli.generation_journal import Journal  # takes seconds: torch, transformers, TRL

    dataset, has_rejected = _load(arguments)
    data = {"data": arguments.data, "split": arguments.split, "rows": len(dataset), "engine": arguments.engine}
    if arguments.engine == "policy":
        from trl_cwdpo.cli.generate_policy import PolicySettings, process_number, sample_dataset

        settings = PolicySettings(**_options(arguments, POLICY), model=arguments.model)
        process, _ = process_number()
        journal = Journal(Path(arguments.output), {**data, **_plain(asdict(settings))}, process)
        sample_dataset(dataset, settings, journal, bar=not arguments.quiet)
        return journal.finish(dataset, has_rejected=has_rejected) if process == 0 else None
    from trl_cwdpo.cli.generate_endpoint import EndpointSettings, edit_dataset, make_client, read_template

    endpoint = EndpointSettings(**_options(arguments, ENDPOINT), model=arguments.model)
    client = make_client(endpoint)
    # Pace and price may change when a generation is continued
    content = ("model", "max_distance", "attempts", "temperature", "max_completion_length", "with_images")
    what = {
        **data,
        **{name: getattr(endpoint, name) for name in content},
        "prompt": read_template(endpoint.prompt_file),
    }
    journal = Journal(Path(arguments.output), what)
    budget = edit_dataset(dataset, endpoint, journal, client, bar=not arguments.quiet)
    return {**journal.finish(dataset, has_rejected=has_rejected), "cost": budget.cost}


def _load(arguments: argparse.Namespace) -> tuple[Any, bool]:
    """The usable rows, and whether they have rejected responses of their own."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    from trl_cwdpo.cli.generation_journal import with_placeholders
    from trl_cwdpo.data import drop_unusable_pairs
    from trl_cwdpo.loading import load_preference_dataset

    where = {"config": arguments.dataset_config, "image_folder": arguments.image_folder}
    try:
        columns = arguments.columns
        if columns == "auto" and _has_chosen_only(load_preference_dataset(arguments.data, **where, check_files=False)):
            columns = None
        splits = load_preference_dataset(arguments.data, **where, columns=columns)
        if arguments.split not in splits:
            raise CommandError(
                f"{arguments.data} has no split {arguments.split!r}, but {sorted(splits)}: name one with --split."
            )
        rows: Any = splits[arguments.split]
        if not isinstance(rows, Dataset):
            raise CommandError(f"{arguments.data} is a stream: download it first.")
        has_rejected = "rejected" in rows.column_names
        rows, _ = drop_unusable_pairs(rows if has_rejected else with_placeholders(rows), arguments.split)
    except (OSError, ValueError, DatasetsError) as error:
        raise CommandError(f"{arguments.data}: {error}") from error
    rows = rows if arguments.limit is None else rows.select(range(min(arguments.limit, len(rows))))
    return rows, has_rejected


def _has_chosen_only(splits: Any) -> bool:  # noqa: ANN401 (datasets, imported late)
    """Whether the data are prompts and good responses, in TRL's layout, without rejected ones."""
    columns = {name for rows in splits.values() for name in rows.column_names}
    return {"prompt", "chosen"} <= columns and not any("rejected" in name for name in columns)


POLICY = (
    "num_generations",
    "selection",
    "reward_funcs",
    "on_policy_chosen",
    "discard_truncated",
    "max_completion_length",
    "temperature",
    "top_p",
    "batch_size",
    "seed",
    "dtype",
    "trust_remote_code",
)
ENDPOINT = (
    "base_url",
    "api_key_variable",
    "prompt_file",
    "max_distance",
    "attempts",
    "max_completion_length",
    "temperature",
    "workers",
    "requests_per_minute",
    "max_retries",
    "timeout",
    "max_cost",
    "price_per_million",
    "with_images",
)


def _options(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.show_prompt:
        return arguments
    for name in ("data", "output", "model"):
        if getattr(arguments, name) is None:
            parser.error("no DATA given: name a file, a folder, or a dataset on the hub" if name == "data" else
                         f"--{name} is needed")  # fmt: skip
    try:
        arguments.columns = parse_columns(arguments.columns)
    except ValueError as error:
        parser.error(str(error))
    for name in ("num_generations", "max_completion_length", "batch_size", "attempts", "workers", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be 1 or more, got {value}")
    needs_rewards = arguments.selection == "lowest_reward" or arguments.on_policy_chosen
    if arguments.engine == "policy" and needs_rewards and not arguments.reward_funcs:
        parser.error("--selection lowest_reward and --on_policy_chosen need --reward_funcs")
    if arguments.max_cost is not None and arguments.price_per_million is None:
        parser.error("--max_cost needs --price_per_million, the prices of a million prompt and completion tokens")
    if not 0.0 < arguments.max_distance <= 1.0:
        parser.error(f"--max_distance must lie in (0, 1], got {arguments.max_distance}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-cwdpo generate-negatives",
        description=(
            "Write a preference dataset with new rejected responses: sampled from a model (--engine policy), or "
            "chosen responses that a language model changed a little (--engine endpoint). The output has the columns "
            "source, avg_logp, distance and samples beside the data's own; where no response is one, the data's "
            "is kept. Prompts with good responses (the columns prompt and chosen) will do; then rows without a "
            "negative are left out. The same command continues a generation that was stopped. With --engine policy, "
            "several processes share the rows: accelerate launch --multi_gpu -m trl_cwdpo.cli generate-negatives …"
        ),
    )
    parser.add_argument("data", metavar="DATA", nargs="?", help="a file, a folder, or a dataset on the hub")
    parser.add_argument("--output", metavar="DIR", help="folder of the new dataset")
    parser.add_argument("--engine", choices=("policy", "endpoint"), default="policy", help="(default: %(default)s)")
    parser.add_argument("--model", help="folder or name of the model; its name at the endpoint")
    parser.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    parser.add_argument("--dataset_config", metavar="NAME", help="configuration of a dataset on the hub")
    layouts = ", ".join(LAYOUTS)
    parser.add_argument(
        "--columns", default="auto", help=f"layout of the data: auto, {layouts}, or a mapping as JSON (default: auto)"
    )
    parser.add_argument("--image_folder", metavar="DIR", help="folder of the pictures (default: that of the data)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N usable pairs only")
    parser.add_argument("--max_completion_length", type=int, default=256, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_policy(parser.add_argument_group("policy"))
    _add_endpoint(parser.add_argument_group("endpoint"))
    return parser


def _add_policy(group: Any) -> None:  # noqa: ANN401 (argparse names no public class)
    add = group.add_argument
    add("--num_generations", type=int, default=1, metavar="K", help="responses per prompt (default: %(default)s)")
    add("--selection", choices=SELECTIONS, default="random", help="which becomes the negative (default: %(default)s)")
    add("--reward_funcs", nargs="+", default=[], metavar="NAME", help="module:function, or a reward model")
    add("--on_policy_chosen", action="store_true", help="the best-scored sample may replace the chosen response")
    add("--discard_truncated", action="store_true", help="truncated samples are no negatives")
    add("--top_p", type=float, default=1.0, help="(default: %(default)s)")
    add("--batch_size", type=int, default=8, help="prompts at a time (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--dtype", default="float32", help="data type of the weights (default: %(default)s)")
    add("--trust_remote_code", action="store_true", help="let a model's own code run")


def _add_endpoint(group: Any) -> None:  # noqa: ANN401 (argparse names no public class)
    add = group.add_argument
    add("--base_url", metavar="URL", help="an OpenAI-compatible endpoint (default: that of OpenAI)")
    add("--api_key_variable", default="OPENAI_API_KEY", metavar="NAME", help="variable with the key (%(default)s)")
    add("--prompt_file", metavar="FILE", help="template of the request, with {prompt}, {chosen} and {pictures}")
    add("--show_prompt", action="store_true", help="print the template that comes along, and end")
    add("--max_distance", type=float, default=0.5, help="largest share of changed words (default: %(default)s)")
    add("--attempts", type=int, default=2, help="requests per pair (default: %(default)s)")
    add("--workers", type=int, default=4, help="calls at a time (default: %(default)s)")
    add("--requests_per_minute", type=float, metavar="N", help="most calls a minute")
    add("--max_retries", type=int, default=5, help="retries of a failing call (default: %(default)s)")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="(default: %(default)s)")
    add("--max_cost", type=float, help="most to spend, in the unit of the prices")
    add("--price_per_million", type=float, nargs=2, metavar=("IN", "OUT"), help="prices of a million tokens")
    add("--without_images", dest="with_images", action="store_false", help="send no pictures")

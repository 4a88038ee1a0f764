"""What `trl-cwdpo evaluate` measures with generated responses: win-rates by a judge, caption scores, exports.

[`add_arguments`] stays light; everything that needs torch is imported when it is used.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.table import MISSING, number, percent

ORACLE, REWARD, ENDPOINT = "oracle", "reward:", "endpoint:"
EXPORTS = ("lmms-eval", "vlmevalkit")
SCENE = "scene"
# Header, name of the number, and how it is written
Column = tuple[str, str, Callable[[Any], str]]
# Columns that may hold several references of a row
REFERENCE_COLUMNS = ("references", "captions")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Add the options of generated responses to a command.

    Args:
        parser (`argparse.ArgumentParser`):
            Its parser.
    """
    group = parser.add_argument_group("generated responses", "without one of these, nothing is generated")
    group.add_argument(
        "--judge",
        metavar="JUDGE",
        help="win-rates against the reference, by `oracle` (rows of drawn shapes), `reward:MODEL` (a sequence "
        "classifier with one label), `endpoint:MODEL` (OpenAI-compatible) or MODULE:FUNCTION, see docs/benchmarks.md",
    )
    group.add_argument("--judge_url", metavar="URL", help="endpoint of the judge (default: OpenAI's)")
    group.add_argument(
        "--judge_key_variable",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="environment variable with the endpoint's key (default: %(default)s)",
    )
    group.add_argument("--judge_max_cost", type=float, metavar="COST", help="stop before the judge costs more")
    group.add_argument(
        "--judge_prices",
        type=float,
        nargs=2,
        metavar=("PROMPT", "COMPLETION"),
        help="price of a million tokens of the judge's; needed by --judge_max_cost",
    )
    group.add_argument(
        "--captions",
        action="store_true",
        help="CIDEr, BLEU, ROUGE-L and METEOR against the chosen response, or the column `references`",
    )
    group.add_argument("--export", choices=EXPORTS, action="append", default=[], help="also write responses for ...")
    group.add_argument(
        "--responses_dir",
        type=Path,
        default=Path("outputs/evaluate"),
        metavar="DIR",
        help="folder of exports and of the judge's answers (default: %(default)s)",
    )
    group.add_argument(
        "--max_new_tokens", type=int, default=256, metavar="N", help="longest response (default: %(default)s)"
    )


class GeneratedResponses:
    """
    Collects the responses of models while each is loaded, and compares them afterwards.

    Args:
        arguments (`argparse.Namespace`):
            With the options of [`add_arguments`].
        dataset ([`~datasets.Dataset`]):
            The dataset that the rows are drawn from.
        batch_size (`int`, *optional*, defaults to `8`):
            Rows a batch.

    Raises:
        CommandError: If the judge cannot be had.
    """

    def __init__(self, arguments: argparse.Namespace, dataset: Any, batch_size: int = 8) -> None:  # noqa: ANN401
        self.arguments, self.dataset, self.batch_size = arguments, dataset, batch_size
        self.wanted = bool(arguments.judge or arguments.captions or arguments.export)
        # Before models are loaded, which takes long
        self.judge = self._make_judge() if arguments.judge else None
        self.indices: list[int] = []
        self.data: list[dict[str, Any]] = []
        self.responses: dict[str, list[str]] = {}
        self.columns: tuple[Column, ...] = ()
        self.notes: list[str] = []

    def collector(self, rows: Any, processor: Any) -> Callable[[str, Any], None]:  # noqa: ANN401
        """
        A function to be called with name and model of each while it is loaded.

        Args:
            rows ([`~trl_cwdpo.probe_rows.ProbeRows`]):
                The rows to respond to.
            processor ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
                Processor or tokenizer.

        Returns:
            `Callable`.
        """
        if self.wanted:
            self.indices = [row.index for row in rows.rows]
            self.data = [self.dataset[index] for index in self.indices]
        tokenizer = getattr(processor, "tokenizer", processor)

        def collect(name: str, model: Any) -> None:  # noqa: ANN401 (either kind of model)
            from trl_cwdpo.evaluation.responses import generate_responses

            if self.wanted:
                self.responses[name] = generate_responses(
                    model, tokenizer, rows, max_new_tokens=self.arguments.max_new_tokens, batch_size=self.batch_size
                )

        return collect

    def results(self, reference: str, *, task: str) -> dict[str, dict[str, Any]]:
        """
        Compare what was collected, and write the exports. Afterwards `columns` says what a table shows of it, and
        `notes` what a reader should know.

        Args:
            reference (`str`):
                The model that win-rates are against.
            task (`str`):
                Name of the dataset in the exports.

        Returns:
            `dict[str, dict[str, Any]]`: By model, `responses` and, as asked for, `win_rate` and the caption scores by
            their names.
        """
        from trl_cwdpo.evaluation.responses import score_captions, win_rates

        found: dict[str, dict[str, Any]] = {name: {"responses": texts} for name, texts in self.responses.items()}
        columns: list[Column] = []
        if self.judge is not None:
            rates = win_rates(self.responses, self.data, reference, self.judge)
            for name in found:
                found[name]["win_rate"] = rates.get(name)
            columns.append(("win-rate\n95 %", "win_rate", _win_rate))
            self.notes.append(f"win-rates against {reference} by {self.arguments.judge}, ties one half")
        if self.arguments.captions:
            try:
                scored = score_captions(self.responses, [references_of(row) for row in self.data])
            except ModuleNotFoundError as error:
                raise CommandError(str(error)) from error
            for name, scores in scored.items():
                found[name] |= scores["scores"]
            columns += [(name, name, _score) for name in scored[reference]["scores"]]
            self.notes += scored[reference]["notes"]
        for name in found:
            self._export(name, task)
        self.columns = tuple(columns)
        return found

    def _make_judge(self) -> Any:  # noqa: ANN401 (a function of comparisons)
        arguments = self.arguments
        try:
            if arguments.judge == ORACLE:
                return self._oracle()
            if arguments.judge.startswith(ENDPOINT):
                from trl_cwdpo.evaluation.endpoint import EndpointJudge

                return EndpointJudge(
                    arguments.judge.removeprefix(ENDPOINT),
                    cache_dir=arguments.responses_dir / "judge-cache",
                    base_url=arguments.judge_url,
                    api_key_variable=arguments.judge_key_variable,
                    max_cost=arguments.judge_max_cost,
                    price_per_million=tuple(arguments.judge_prices) if arguments.judge_prices else None,
                )
            from trl_cwdpo.evaluation.judges import load_function, reward_model_judge

            if arguments.judge.startswith(REWARD):
                return reward_model_judge(arguments.judge.removeprefix(REWARD), None)
            return load_function(arguments.judge)
        except (ModuleNotFoundError, OSError, ValueError) as error:
            raise CommandError(f"--judge {arguments.judge} cannot be used: {error}") from error

    def _oracle(self) -> Any:  # noqa: ANN401 (a function of comparisons)
        from trl_cwdpo.evaluation.win_rate import score_judge
        from trl_cwdpo.shapes.oracle import attribute_reward

        if SCENE not in self.dataset.column_names:
            raise ValueError(f"the dataset has no column `{SCENE}`, so there is no oracle. Name another judge")
        return score_judge(
            lambda pairs: attribute_reward([pair.first for pair in pairs], [pair.row[SCENE] for pair in pairs])
        )

    def _export(self, name: str, task: str) -> None:
        from trl_cwdpo.evaluation.export import Response, write_lmms_eval, write_vlmevalkit

        folder = self.arguments.responses_dir
        if not self.arguments.export:
            return
        rows = [
            Response(index, prompt_text(data["prompt"]), text, references_of(data)[0], images_of(data))
            for index, data, text in zip(self.indices, self.data, self.responses[name], strict=True)
        ]
        if "lmms-eval" in self.arguments.export:
            write_lmms_eval(rows, folder / "lmms-eval", model=name, task=task)
        if "vlmevalkit" in self.arguments.export:
            one_picture_each = all(len(row.images) == 1 for row in rows)
            write_vlmevalkit(rows, folder / "vlmevalkit", model=name, dataset=task, with_dataset=one_picture_each)


def _win_rate(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return MISSING
    interval = rate["win_rate"]
    return f"{percent(interval['mean'])} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _score(value: float) -> str:
    return number(value, 3)


def references_of(row: Mapping[str, Any]) -> list[str]:
    """The references of a row: those of its column for them, or its chosen response."""
    from trl_cwdpo.data import response_text

    for column in REFERENCE_COLUMNS:
        if row.get(column):
            return list(row[column])
    return [response_text(row["chosen"])]


def prompt_text(prompt: Any) -> str:  # noqa: ANN401 (text or messages)
    """A prompt as text, without its pictures."""
    from trl_cwdpo.evaluation.judges import as_messages

    return "\n".join(message["content"] for message in as_messages(prompt)).strip()


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """The pictures of a row."""
    if row.get("images"):
        return list(row["images"])
    return [] if row.get("image") is None else [row["image"]]

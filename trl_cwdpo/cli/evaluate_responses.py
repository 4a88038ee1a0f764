"""What `trl-cwdpo evaluate` measures with generated responses: win-rates by a judge, caption scores, exports.

[`add_arguments`] stays light; everything that needs torch is imported when it is used.
"""

import argparse
import importlib.util
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.table import MISSING, number, percent
from trl_cwdpo.endpoints import CostCapError, EndpointError

ORACLE, REWARD, ENDPOINT = "oracle", "reward:", "endpoint:"
EXPORTS = ("lmms-eval", "vlmevalkit")
SCENE, ANSWER = "scene", "answer"
KEY_VARIABLE = "OPENAI_API_KEY"
LEFT_OUT = "none"
YES_NO_COLUMNS = (
    ("right\nyes/no", "accuracy"),
    ("F1\nof yes", "f1"),
    ("says\nyes", "yes_ratio"),
    ("says\nneither", "unreadable"),
)
# Options that only a judge behind an endpoint reads
OF_ENDPOINTS = ("judge_url", "judge_key_variable", "judge_max_cost", "judge_prices", "judge_temperature")
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
        help=f"environment variable with the endpoint's key (default: {KEY_VARIABLE})",
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
        "--judge_temperature",
        type=_temperature,
        metavar="T",
        help="of the endpoint's answers; `none` leaves it out, for models that take only their own (default: 0)",
    )
    group.add_argument(
        "--captions",
        action="store_true",
        help="CIDEr, BLEU, ROUGE-L and METEOR against the chosen response, or the column `references`",
    )
    group.add_argument(
        "--answers",
        action="store_true",
        help="accuracy, F1 and share of yes, as POPE counts them, of responses to yes-no questions; the column "
        f"`{ANSWER}` has the truth",
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


def _temperature(text: str) -> float | str:
    return LEFT_OUT if text == LEFT_OUT else float(text)


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """
    End the program with a message if options of [`add_arguments`] cannot be or would be ignored.

    Args:
        parser (`argparse.ArgumentParser`):
            The parser.
        arguments (`argparse.Namespace`):
            What it has parsed.
    """
    given = [name for name in OF_ENDPOINTS if getattr(arguments, name) is not None]
    if given and not (arguments.judge or "").startswith(ENDPOINT):
        parser.error(f"--{given[0]} means nothing without --judge {ENDPOINT}MODEL")
    if arguments.judge_max_cost is not None and not 0.0 < arguments.judge_max_cost < math.inf:
        parser.error(f"--judge_max_cost must be above 0, got {arguments.judge_max_cost}")
    if arguments.judge_max_cost is not None and arguments.judge_prices is None:
        parser.error("--judge_prices is missing: --judge_max_cost needs the prices of a million tokens")
    if not all(0.0 <= price < math.inf for price in arguments.judge_prices or ()):
        parser.error(f"--judge_prices must be 0 or more, got {arguments.judge_prices}")
    if arguments.judge_max_cost is not None and not any(arguments.judge_prices):
        parser.error("--judge_max_cost can never be reached with --judge_prices 0 0: leave it out")


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
        self.wanted = bool(arguments.judge or arguments.captions or arguments.answers or arguments.export)
        # Before models are loaded, which takes long
        self._check()
        self.judge = self._make_judge() if arguments.judge else None
        self.failure: str | None = None
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
        Write the exports and compare what was collected. Afterwards `columns` says what a table shows of it, `notes`
        what a reader should know, and `failure` what went wrong with the judge.

        Args:
            reference (`str`):
                The model that win-rates are against.
            task (`str`):
                Name of the dataset in the exports.

        Returns:
            `dict[str, dict[str, Any]]`: By model, `responses` and, as asked for, `win_rate`, `yes_no` and the caption
            scores by their names.
        """
        found: dict[str, dict[str, Any]] = {name: {"responses": texts} for name, texts in self.responses.items()}
        # First: what comes next may fail, and the responses took long
        for name in found:
            self._export(name, task)
        columns: list[Column] = []
        if self.judge is not None:
            columns += self._compare(found, reference, self.judge)
        if self.arguments.captions:
            columns += self._score_captions(found, reference)
        if self.arguments.answers:
            columns += self._score_answers(found)
        self.columns = tuple(columns)
        return found

    def _compare(self, found: dict[str, dict[str, Any]], reference: str, judge: Any) -> list[Column]:  # noqa: ANN401
        from trl_cwdpo.evaluation.responses import win_rates

        try:
            rates = win_rates(self.responses, self.data, reference, judge)
        except Exception as error:  # noqa: BLE001 (a function of the user's may raise anything)
            self.failure = f"--judge {self.arguments.judge} failed: {_told(error)}"
            return []
        for name in found:
            found[name]["win_rate"] = rates.get(name)
        self.notes.append(f"win-rates against {reference} by {self.arguments.judge}, ties one half")
        changed = [f"{name} {percent(rate['inconsistent'])}" for name, rate in rates.items() if rate["inconsistent"]]
        if changed:
            self.notes.append(f"the judge changed its mind with the order, which is a tie: {', '.join(changed)}")
        summary = getattr(judge, "summary", None)
        if summary is not None:
            self.notes.append(f"judge: {summary()}")
        return [("win-rate\n95 %", "win_rate", _win_rate)]

    def _score_captions(self, found: dict[str, dict[str, Any]], reference: str) -> list[Column]:
        from trl_cwdpo.evaluation.responses import score_captions

        scored = score_captions(self.responses, [references_of(row) for row in self.data])
        for name, scores in scored.items():
            found[name] |= scores["scores"]
        self.notes += scored[reference]["notes"]
        return [(name, name, _score) for name in scored[reference]["scores"]]

    def _score_answers(self, found: dict[str, dict[str, Any]]) -> list[Column]:
        from trl_cwdpo.evaluation.answers import read_yes_no, yes_no_accuracy

        truths = [str(read_yes_no(row[ANSWER])) for row in self.data]
        for name, texts in self.responses.items():
            found[name]["yes_no"] = yes_no_accuracy(texts, truths).to_dict()
        return [(head, "yes_no", partial(_share, key)) for head, key in YES_NO_COLUMNS]

    def _check(self) -> None:
        from trl_cwdpo.evaluation.answers import read_yes_no

        arguments = self.arguments
        if arguments.captions and importlib.util.find_spec("pycocoevalcap") is None:
            raise CommandError("--captions needs pycocoevalcap: pip install 'trl-cwdpo[eval]'.")
        if arguments.answers:
            if ANSWER not in self.dataset.column_names:
                raise CommandError(f"--answers needs a column `{ANSWER}` with 'yes' or 'no'; the dataset has none.")
            for index, truth in enumerate(self.dataset[ANSWER]):
                if not isinstance(truth, str) or read_yes_no(truth) is None:
                    raise CommandError(
                        f"--answers: row {index}, column `{ANSWER}` is {truth!r}, neither 'yes' nor 'no'."
                    )
        if arguments.export or (arguments.judge or "").startswith(ENDPOINT):
            try:
                arguments.responses_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CommandError(f"--responses_dir cannot be used: {error}. Name another folder.") from error

    def _make_judge(self) -> Any:  # noqa: ANN401 (a function of comparisons)
        arguments = self.arguments
        try:
            if arguments.judge == ORACLE:
                return self._oracle()
            if arguments.judge.startswith(ENDPOINT):
                from trl_cwdpo.evaluation.endpoint import EndpointJudge

                temperature = 0.0 if arguments.judge_temperature is None else arguments.judge_temperature
                judge = EndpointJudge(
                    arguments.judge.removeprefix(ENDPOINT),
                    cache_dir=arguments.responses_dir / "judge-cache",
                    base_url=arguments.judge_url,
                    api_key_variable=arguments.judge_key_variable or KEY_VARIABLE,
                    max_cost=arguments.judge_max_cost,
                    price_per_million=tuple(arguments.judge_prices) if arguments.judge_prices else None,
                    temperature=None if temperature == LEFT_OUT else temperature,
                )
                judge.budget.option = "--judge_max_cost"
                return judge
            from trl_cwdpo.evaluation.judges import load_function, reward_model_judge

            if arguments.judge.startswith(REWARD):
                return reward_model_judge(arguments.judge.removeprefix(REWARD), None)
            return load_function(arguments.judge)
        except (ModuleNotFoundError, OSError, ValueError) as error:
            reason = str(error).replace("`base_url`", "--judge_url")
            raise CommandError(f"--judge {arguments.judge} cannot be used: {reason}") from error

    def _oracle(self) -> Any:  # noqa: ANN401 (a function of comparisons)
        from trl_cwdpo.evaluation.win_rate import score_judge
        from trl_cwdpo.shapes.oracle import attribute_reward

        if SCENE not in self.dataset.column_names:
            raise ValueError(f"the dataset has no column `{SCENE}`, so there is no oracle. Name another judge.")
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
            note = "vlmevalkit: responses alone; its datasets have one picture a line, and not all rows here have one"
            if not one_picture_each and note not in self.notes:
                self.notes.append(note)
            write_vlmevalkit(rows, folder / "vlmevalkit", model=name, dataset=task, with_dataset=one_picture_each)


def _told(error: Exception) -> str:
    """An error, with the place in other people's code that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    text = str(error).rstrip(".")
    if isinstance(error, (CostCapError, EndpointError)) or Path(__file__).parent.parent in _folders(frames[-1]):
        return f"{text}."
    return f"{type(error).__name__} in {Path(frames[-1].filename).name}, line {frames[-1].lineno}: {text}."


def _folders(frame: traceback.FrameSummary) -> Sequence[Path]:
    return Path(frame.filename).parents


def _win_rate(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return MISSING
    interval = rate["win_rate"]
    return f"{percent(interval['mean'])} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _share(key: str, scores: Mapping[str, float]) -> str:
    return percent(scores[key])


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

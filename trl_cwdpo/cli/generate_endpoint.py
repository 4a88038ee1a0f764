"""The endpoint engine of `trl-cwdpo generate-negatives`: a language model edits chosen responses a little.

Any OpenAI-compatible chat endpoint will do. Calls run side by side, at most so many a minute; the client retries those
that fail for now; the cost is capped; and what comes back is a negative only if it differs from the chosen response
and stays near it, by the edit distance of their words.
"""

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from accelerate.utils import tqdm
from datasets import Dataset

from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.generation_journal import Journal
from trl_cwdpo.data import response_text, with_image_list
from trl_cwdpo.endpoints import Budget, CostCapError, EndpointError, Pace, content_of
from trl_cwdpo.endpoints import ask as ask_endpoint
from trl_cwdpo.endpoints import make_client as make_endpoint_client
from trl_cwdpo.negatives.selection import normalise

PLACEHOLDERS = ("{prompt}", "{chosen}")


@dataclass(frozen=True)
class EndpointSettings:
    """
    How to ask an endpoint.

    Args:
        model (`str`): Name of the model there.
        base_url (`str`, *optional*): The endpoint; OpenAI's by default.
        api_key_variable (`str`): Environment variable with the key.
        prompt_file (`str`, *optional*): Template of the request; the one that comes along by default.
        max_distance (`float`): Largest edit distance of the words, as a share of the longer response.
        attempts (`int`): Requests per row, until the answer is a negative.
        temperature (`float`): Temperature.
        max_completion_length (`int`): Most tokens of an answer.
        workers (`int`): Calls at a time.
        requests_per_minute (`float`, *optional*): Most calls a minute.
        max_retries (`int`): Retries of a call that failed for now, with growing pauses.
        timeout (`float`): Seconds to wait for an answer.
        max_cost (`float`, *optional*): Most to spend, in the unit of the prices.
        price_per_million (`tuple[float, float]`, *optional*): Prices of a million prompt and completion tokens.
        with_images (`bool`): Whether pictures are sent along.
    """

    model: str
    base_url: str | None = None
    api_key_variable: str = "OPENAI_API_KEY"
    prompt_file: str | None = None
    max_distance: float = 0.5
    attempts: int = 2
    temperature: float = 1.0
    max_completion_length: int = 512
    workers: int = 4
    requests_per_minute: float | None = None
    max_retries: int = 5
    timeout: float = 120.0
    max_cost: float | None = None
    price_per_million: tuple[float, float] | None = None
    with_images: bool = True


def edit_distance(chosen: str, edited: str) -> float:
    """
    How many words differ, as a share of the longer text.

    Args:
        chosen (`str`):
            The chosen response.
        edited (`str`):
            The edited one.

    Returns:
        `float` in [0, 1].
    """
    from rapidfuzz.distance import Levenshtein  # an optional dependency, checked by `make_client`

    return Levenshtein.normalized_distance(normalise(chosen).split(), normalise(edited).split())


def problem_of(chosen: str, edited: str, max_distance: float) -> tuple[str | None, float]:
    """
    Why an edited response is no gentle negative.

    Args:
        chosen (`str`):
            The chosen response.
        edited (`str`):
            The edited one.
        max_distance (`float`):
            Largest edit distance.

    Returns:
        `tuple`: `"empty"`, `"unchanged"`, `"too far"` or `None`, and the distance.
    """
    if not normalise(edited):
        return "empty", 1.0
    distance = edit_distance(chosen, edited)
    if distance == 0.0:
        return "unchanged", distance
    return ("too far" if distance > max_distance else None), distance


def read_template(path: str | None) -> str:
    """
    The template of the request.

    Args:
        path (`str`, *optional*):
            A file with `{prompt}`, `{chosen}` and perhaps `{pictures}`; the one that comes along by default.

    Returns:
        `str`.

    Raises:
        CommandError: If the file cannot be read, or lacks a placeholder.
    """
    try:
        source = files("trl_cwdpo") / "prompts" / "gentle_negative.txt" if path is None else Path(path)
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--prompt_file {path} cannot be read: {error}.") from error
    missing = [name for name in PLACEHOLDERS if name not in text]
    if missing:
        raise CommandError(f"--prompt_file {path} lacks {' and '.join(missing)}: without, every request is the same.")
    return text


def make_client(settings: EndpointSettings) -> Any:  # noqa: ANN401 (a class of a package that may be missing)
    """
    A client of the endpoint. The key comes from the environment and goes nowhere else.

    Args:
        settings ([`EndpointSettings`]):
            Which endpoint.

    Returns:
        `openai.OpenAI`.

    Raises:
        CommandError: Without the packages or the key.
    """
    try:
        import rapidfuzz  # noqa: F401

        return make_endpoint_client(
            settings.base_url,
            settings.api_key_variable,
            max_retries=settings.max_retries,
            timeout=settings.timeout,
            extra="endpoint",
        )
    except ModuleNotFoundError as error:
        raise CommandError(
            f"--engine endpoint needs packages that are not installed ({error}): pip install 'trl-cwdpo[endpoint]'."
        ) from error
    except ValueError as error:
        raise CommandError(str(error)) from error


def edit_dataset(
    dataset: Dataset,
    settings: EndpointSettings,
    journal: Journal,
    client: Any,  # noqa: ANN401 (see `make_client`)
    *,
    bar: bool = True,
) -> Budget:
    """
    Have negatives written for the rows that have none yet.

    Args:
        dataset ([`~datasets.Dataset`]):
            Usable pairs.
        settings ([`EndpointSettings`]):
            How.
        journal ([`Journal`]):
            Where the results go, as each comes.
        client (`openai.OpenAI`):
            Client.
        bar (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`Budget`]: what it cost.

    Raises:
        CommandError: If the cap is reached or a call fails for good; results so far are kept.
    """
    template, pace = read_template(settings.prompt_file), Pace(settings.requests_per_minute)
    budget = Budget(settings.max_cost, settings.price_per_million, "--max_cost")
    lock, missing = threading.Lock(), journal.missing(len(dataset))
    progress = tqdm(total=len(missing), desc="Writing negatives", disable=not bar)

    def ask(messages: list[dict[str, Any]]) -> str:
        pace.wait()
        request = {"model": settings.model, "messages": messages, "temperature": settings.temperature}
        return ask_endpoint(client, budget, {**request, "max_tokens": settings.max_completion_length})

    def work(row: int) -> None:
        entry = edit_row(dataset[row], template, settings, ask)
        with lock:
            journal.add([{"row": row, **entry}])
            progress.update(1)

    _in_parallel(work, missing, settings)
    return budget


def _in_parallel(work: Callable[[int], None], rows: list[int], settings: EndpointSettings) -> None:
    pool = ThreadPoolExecutor(settings.workers)
    try:
        futures: list[Future[None]] = [pool.submit(work, row) for row in rows]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except CostCapError as error:
        raise CommandError(str(error)) from error
    except EndpointError as error:
        raise CommandError(f"{error} What there is is kept: the same command continues.") from error
    finally:
        # Calls that have not begun are not begun
        pool.shutdown(cancel_futures=True)


def edit_row(
    row: dict[str, Any],
    template: str,
    settings: EndpointSettings,
    ask: Callable[[list[dict[str, Any]]], str],
) -> dict[str, Any]:
    """
    A gentle negative for one pair.

    Args:
        row (`dict`):
            The pair.
        template (`str`):
            Of the request.
        settings ([`EndpointSettings`]):
            How often to ask, and how near the answer must be.
        ask (`Callable`):
            Sends messages, returns the answer.

    Returns:
        `dict`: `source`, `rejected`, `distance`, and `reason` where no answer was a negative.
    """
    images = with_image_list(row).get("images") or [] if settings.with_images else []
    chosen = response_text(row["chosen"])
    text = (
        template.replace("{pictures}", " of the picture" if images else "")
        .replace("{prompt}", _prompt_text(row.get("prompt")))
        .replace("{chosen}", chosen)
    )
    content = content_of(text, images)
    reason, distance = "empty", 1.0
    for _ in range(settings.attempts):
        answer = ask([{"role": "user", "content": content}]).strip()
        problem, distance = problem_of(chosen, answer, settings.max_distance)
        if problem is None:
            return {"source": "endpoint", "rejected": answer, "distance": distance}
        reason = problem
    return {"source": "dataset", "reason": reason, "distance": distance}


def _prompt_text(prompt: Any) -> str:  # noqa: ANN401 (a string, messages, or nothing)
    if not prompt or isinstance(prompt, str):
        return prompt or ""
    return "\n\n".join(response_text([message]) for message in prompt)

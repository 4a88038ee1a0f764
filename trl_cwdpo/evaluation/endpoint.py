"""A judge behind any OpenAI-compatible endpoint: answers are cached on disk, calls retried, and the cost is capped."""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trl_cwdpo.endpoints import Budget, ask, content_of, make_client
from trl_cwdpo.evaluation.judges import as_messages
from trl_cwdpo.evaluation.win_rate import LOSS, TIE, WIN, Comparison

logger = logging.getLogger(__name__)

VERDICT = re.compile(r"\[\[\s*(A|B|tie)\s*\]\]", re.IGNORECASE)
VERDICTS = {"a": WIN, "b": LOSS, "tie": TIE}
INSTRUCTION = (
    "You compare two responses to the same request{pictures}. Judge which one is more correct and more helpful; what "
    "a response claims must be true{of_pictures}. Neither the order nor the length of the responses counts. Think "
    "briefly, then end with [[A]] if response A is better, [[B]] if response B is better, or [[tie]]."
)


class EndpointJudge:
    """
    Asks a language model which of two responses is better. To be called with comparisons, as every judge.

    Args:
        model (`str`):
            Name of the model at the endpoint.
        cache_dir (`Path`):
            Folder of answers: the same question is never paid for twice.
        base_url (`str`, *optional*):
            The endpoint; that of OpenAI by default.
        api_key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key. An endpoint of one's own may need none. The key is neither logged
            nor stored.
        max_cost (`float`, *optional*):
            Stop before more has been spent than this, in the unit of the prices.
        price_per_million (`tuple[float, float]`, *optional*):
            Price of a million prompt tokens and of a million completion tokens; needed by `max_cost`.
        max_retries (`int`, *optional*, defaults to `5`):
            Retries of a call that failed for now, with growing pauses.
        workers (`int`, *optional*, defaults to `4`):
            Calls at a time.
        with_images (`bool`, *optional*, defaults to `True`):
            Whether pictures of the rows (`images` or `image`) are sent along.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature of the answers; `None` leaves it to the endpoint, for models that take no other than their own.
        client (`openai.OpenAI`, *optional*):
            A client to use instead of making one.

    Raises:
        ModuleNotFoundError: Without the package openai, which the extra `eval` brings.
        ValueError: If there is no key, or a cost cap without prices.
    """

    def __init__(
        self,
        model: str,
        *,
        cache_dir: Path,
        base_url: str | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        max_cost: float | None = None,
        price_per_million: tuple[float, float] | None = None,
        max_retries: int = 5,
        workers: int = 4,
        with_images: bool = True,
        temperature: float | None = 0.0,
        client: Any = None,  # noqa: ANN401 (a class of a package that may be missing)
    ) -> None:
        if max_cost is not None and price_per_million is None:
            raise ValueError(
                f"`max_cost`={max_cost} needs `price_per_million`, the prices of a million prompt and completion "
                "tokens."
            )
        self.model, self.base_url, self.cache_dir = model, base_url, Path(cache_dir)
        self.budget = Budget(max_cost, price_per_million)
        self.workers, self.with_images, self.temperature = workers, with_images, temperature
        self.client = client or make_client(base_url, api_key_variable, max_retries=max_retries, extra="eval")
        self.calls = self.cached = self.unreadable = 0
        self._lock = threading.Lock()

    @property
    def cost(self) -> float:
        """What has been spent, in the unit of the prices."""
        return self.budget.cost

    def summary(self) -> str:
        """What was asked, in a line for the user."""
        parts = [f"{self.calls} calls", f"{self.cached} answers from the cache"]
        if self.unreadable:
            parts.append(f"{self.unreadable} answers without a verdict, counted as ties")
        if self.budget.is_priced:
            parts.append(f"cost {self.cost:.4f}")
        return ", ".join(parts)

    def __call__(self, comparisons: Sequence[Comparison]) -> list[float]:
        """
        Judge.

        Args:
            comparisons (`Sequence[Comparison]`):
                N comparisons.

        Returns:
            `list[float]`: N verdicts; an answer without a verdict is a tie, and counted in `unreadable`.

        Raises:
            CostCapError: If the next call could exceed `max_cost`.
            EndpointError: If a call fails for good. Answers so far are in the cache.
        """
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(self.workers)
        try:
            answers = list(pool.map(self._answer, comparisons))
        finally:
            # After a failure, calls that have not begun are not begun
            pool.shutdown(cancel_futures=True)
        return [self._read(answer) for answer in answers]

    def _read(self, answer: str) -> float:
        found = VERDICT.findall(answer)
        if not found:
            self.unreadable += 1
            logger.warning("The judge gave no verdict: %s", answer[:200])
            return TIE
        return VERDICTS[found[-1].lower()]

    def _answer(self, pair: Comparison) -> str:
        request: dict[str, Any] = {"model": self.model, "messages": self._messages(pair)}
        if self.temperature is not None:
            request["temperature"] = self.temperature
        digest = hashlib.sha256(json.dumps([self.base_url, request], sort_keys=True).encode()).hexdigest()
        file = self.cache_dir / f"{digest}.json"
        known = _read_cache(file)
        if known is not None:
            with self._lock:
                self.cached += 1
            return known
        with self._lock:
            self.calls += 1
        return ask(self.client, self.budget, request, lambda answer: _write_cache(file, answer))

    def _messages(self, pair: Comparison) -> list[dict[str, Any]]:
        images = _images(pair.row) if self.with_images else []
        instruction = INSTRUCTION.format(
            pictures=" about the picture" if images else "", of_pictures=" of the picture" if images else ""
        )
        request = "\n\n".join(message["content"] for message in as_messages(pair.prompt))
        text = f"Request:\n{request}\n\nResponse A:\n{pair.first}\n\nResponse B:\n{pair.second}"
        return [
            {"role": "system", "content": instruction},
            {"role": "user", "content": content_of(text, images)},
        ]


def _read_cache(file: Path) -> str | None:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    answer = known.get("answer") if isinstance(known, dict) else None
    # A damaged file is one that is not there
    return answer if isinstance(answer, str) else None


def _write_cache(file: Path, answer: str) -> None:
    aside = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    aside.write_text(json.dumps({"answer": answer}), encoding="utf-8")
    aside.replace(file)


def _images(row: dict[str, Any]) -> list[Any]:
    images = row.get("images")
    return list(images) if images else [row["image"]] if row.get("image") is not None else []

"""What calls of an OpenAI-compatible endpoint share: the client, the pace, the cost, and how pictures are sent."""

import base64
import io
import os
import threading
import time
from collections.abc import Callable
from typing import Any


class CostCapError(RuntimeError):
    """The next call could cost more than is allowed."""


class EndpointError(RuntimeError):
    """A call failed for good, or what came back is no answer."""


class Pace:
    """
    Lets callers pass one after the other, evenly spaced.

    Args:
        per_minute (`float`, *optional*):
            Most callers a minute; `None`: all at once.
    """

    def __init__(self, per_minute: float | None) -> None:
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait for one's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + self.interval
        time.sleep(turn - now)


class Budget:
    """
    Keeps the cost of calls, whose size is known afterwards, below a cap.

    Args:
        max_cost (`float`, *optional*):
            The cap, in the unit of the prices; `None`: none.
        prices (`tuple[float, float]`, *optional*):
            Of a million prompt and completion tokens.
        option (`str`, *optional*, defaults to "`max_cost`"):
            What the cap is called where it was set.
    """

    def __init__(self, max_cost: float | None, prices: tuple[float, float] | None, option: str = "`max_cost`") -> None:
        self.max_cost, self.prices, self.option = max_cost, prices or (0.0, 0.0), option
        self.is_priced = prices is not None
        self.cost = 0.0
        self._dearest: float | None = None
        self._open = 0
        self._changed = threading.Condition()

    def reserve(self) -> None:
        """
        Before a call: room for it and for those on their way, each as dear as the dearest so far.

        With a cap, calls wait for the first one, since nobody knows yet what one costs.

        Raises:
            CostCapError: If there is none.
        """
        with self._changed:
            if self.max_cost is None:
                self._open += 1
                return
            self._changed.wait_for(lambda: self._dearest is not None or self._open == 0)
            expected = self.cost + (self._open + 1) * (self._dearest or 0.0)
            if expected > self.max_cost or self.cost >= self.max_cost:
                on_their_way = f", {self._open} calls are on their way," if self._open else ""
                raise CostCapError(
                    f"{self.cost:.4f} has been spent{on_their_way} and the next calls could exceed {self.option}="
                    f"{self.max_cost}. What there is is kept: raise {self.option} to continue from there."
                )
            self._open += 1

    def cancel(self) -> None:
        """After a call that failed, which is not charged."""
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def settle(self, usage: Any) -> None:  # noqa: ANN401 (the client's class)
        """
        After a call.

        Args:
            usage (`openai.types.CompletionUsage`, *optional*):
                The tokens that it took, if the endpoint says so.

        Raises:
            CostCapError: If it does not, and there is a cap.
        """
        with self._changed:
            self._open -= 1
            if usage is not None:
                price = (usage.prompt_tokens * self.prices[0] + usage.completion_tokens * self.prices[1]) / 1e6
                self.cost += price
                self._dearest = max(self._dearest or 0.0, price)
            self._changed.notify_all()
        if usage is None and self.max_cost is not None:
            raise CostCapError(
                f"The endpoint does not say how many tokens a call took, so {self.option} cannot be kept: leave it "
                "out."
            )


def make_client(
    base_url: str | None, key_variable: str, *, max_retries: int, timeout: float | None = None, extra: str
) -> Any:  # noqa: ANN401 (a class of a package that may be missing)
    """
    A client that repeats calls that failed for now, with growing pauses. The key comes from the environment and goes
    nowhere else.

    Args:
        base_url (`str`, *optional*):
            The endpoint; that of OpenAI by default.
        key_variable (`str`):
            Environment variable that holds the key; an endpoint of one's own may need none.
        max_retries (`int`):
            Retries of a call.
        timeout (`float`, *optional*):
            Seconds to wait for an answer; the client's own by default.
        extra (`str`):
            The extra of this package that brings the client.

    Returns:
        `openai.OpenAI`.

    Raises:
        ModuleNotFoundError: Without the package openai.
        ValueError: If there is no key.
    """
    try:
        from openai import OpenAI
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"An endpoint needs openai: pip install 'trl-cwdpo[{extra}]'.") from error
    key = os.environ.get(key_variable)
    if not key and base_url is None:
        raise ValueError(
            f"There is no key: set the environment variable {key_variable}, or name an endpoint of your own with "
            "`base_url`."
        )
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    return OpenAI(api_key=key or "none", base_url=base_url, max_retries=max_retries, **options)


def ask(
    client: Any,  # noqa: ANN401 (a class of a package that may be missing)
    budget: Budget,
    request: dict[str, Any],
    keep: Callable[[str], None] = lambda answer: None,
) -> str:
    """
    One call within a budget.

    Args:
        client (`openai.OpenAI`):
            The client.
        budget ([`Budget`]):
            The budget; afterwards the call is settled, whatever happened.
        request (`dict[str, Any]`):
            Arguments of a chat completion.
        keep (`Callable`, *optional*):
            Called with the answer before it is settled: what was paid for is not lost where the cap cannot be kept.

    Returns:
        `str`: The answer, perhaps empty.

    Raises:
        CostCapError: If the call could exceed the budget, or its cost is not known.
        EndpointError: If it fails for good, or what comes back is no chat completion.
    """
    budget.reserve()
    try:
        reply = client.chat.completions.create(**request)
        answer = _answer_of(reply)
    except Exception as error:
        budget.cancel()
        kind = type(error)
        # The client passes on what a JSON parser says, a ValueError
        if kind.__module__.startswith("openai") or isinstance(error, ValueError):
            raise EndpointError(f"The endpoint failed, retries included: {kind.__name__}: {error}.") from error
        raise
    try:
        keep(answer)
    finally:
        budget.settle(reply.usage)
    return answer


def _answer_of(reply: Any) -> str:  # noqa: ANN401 (the client's class, or whatever a page was read as)
    choices = getattr(reply, "choices", None)
    if not choices:
        raise EndpointError(
            f"What the endpoint answered is no chat completion but {str(reply)[:200]!r}. Check its address, which "
            "usually ends in /v1."
        )
    return choices[0].message.content or ""


def content_of(text: str, images: list[Any]) -> Any:  # noqa: ANN401 (what the client takes)
    """
    The content of a message, with pictures before its text.

    Args:
        text (`str`):
            The text.
        images (`list[PIL.Image.Image]`):
            Pictures, perhaps none.

    Returns:
        `str` or `list[dict]`.
    """
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [*parts, {"type": "text", "text": text}] if parts else text


def data_url(image: Any) -> str:  # noqa: ANN401 (a PIL image)
    """A picture as an address that holds it, as PNG."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"

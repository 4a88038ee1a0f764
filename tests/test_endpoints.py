"""Calls of an endpoint keep their pace and their budget, whoever makes them."""

import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from trl_cwdpo.endpoints import Budget, CostCapError, EndpointError, Pace, ask, content_of

CALL = SimpleNamespace(prompt_tokens=100, completion_tokens=50)
PRICES = (1.0, 4.0)  # a call costs 300 millionths


def test_callers_pass_evenly_spaced(monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", slept.append)
    pace = Pace(per_minute=30)
    for _ in range(3):
        pace.wait()
    now[0] = 200.0
    pace.wait()
    assert slept == [0.0, 2.0, 4.0, 0.0]
    free = Pace(None)
    for _ in range(3):
        free.wait()
    assert slept[4:] == [0.0, 0.0, 0.0]


def test_a_budget_leaves_room_for_calls_on_their_way():
    budget = Budget(0.001, PRICES)
    budget.reserve()
    budget.settle(CALL)
    assert budget.cost == pytest.approx(0.0003)
    budget.reserve()
    budget.reserve()
    # Two are on their way: a fourth could make it 0.0012
    with pytest.raises(
        CostCapError,
        match=r"0\.0003 has been spent, 2 calls are on their way, and the next calls could exceed `max_cost`=0\.001",
    ):
        budget.reserve()
    budget.cancel()
    budget.reserve()


def test_with_a_cap_calls_wait_for_the_first_whose_price_nobody_knows():
    budget, passed = Budget(0.0004, PRICES), []

    def call():
        try:
            budget.reserve()
            passed.append(True)
        except CostCapError:
            passed.append(False)

    budget.reserve()
    others = [threading.Thread(target=call) for _ in range(3)]
    for other in others:
        other.start()
    time.sleep(0.1)
    assert passed == []
    budget.settle(CALL)
    for other in others:
        other.join(timeout=10)
    assert passed == [False] * 3


def test_a_first_call_that_failed_lets_the_next_one_try():
    budget = Budget(1.0, PRICES)
    budget.reserve()
    budget.cancel()
    budget.reserve()
    assert budget.cost == 0.0


def test_without_a_cap_nothing_waits_and_without_usage_no_cap_can_be_kept():
    free = Budget(None, None)
    free.reserve()
    free.reserve()
    free.settle(None)
    free.settle(CALL)
    assert free.cost == 0.0
    capped = Budget(1.0, PRICES, "--max_cost")
    capped.reserve()
    with pytest.raises(CostCapError, match=r"does not say .* --max_cost cannot be kept"):
        capped.settle(None)


def test_pictures_stand_before_the_text():
    assert content_of("what?", []) == "what?"
    picture, text = content_of("what?", [Image.new("RGBA", (2, 2))])
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text == {"type": "text", "text": "what?"}


def client_that_replies(reply):
    def create(**request):
        if isinstance(reply, Exception):
            raise reply
        return reply

    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


def reply_with(*texts, usage=CALL):
    return SimpleNamespace(
        choices=[SimpleNamespace(message=SimpleNamespace(content=text)) for text in texts], usage=usage
    )


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("<html>log in</html>", "no chat completion but '<html>log in</html>'"),
        (reply_with(), "no chat completion"),
        (SimpleNamespace(choices=None), "no chat completion"),
        (ValueError("Expecting value"), "retries included: ValueError: Expecting value"),
    ],
)
def test_what_is_no_answer_lets_the_next_call_try(reply, message):
    budget = Budget(1.0, PRICES)
    with pytest.raises(EndpointError, match=message):
        ask(client_that_replies(reply), budget, {})
    # With a cap, calls wait for the first one, which must be over
    waiting = threading.Thread(target=budget.reserve, daemon=True)
    waiting.start()
    waiting.join(timeout=10)
    assert not waiting.is_alive()


def test_an_answer_is_kept_before_its_cost_turns_out_unknown():
    kept = []
    with pytest.raises(CostCapError, match="does not say how many tokens"):
        ask(client_that_replies(reply_with("yes", usage=None)), Budget(1.0, PRICES), {}, kept.append)
    assert kept == ["yes"]
    budget = Budget(1.0, PRICES)
    assert ask(client_that_replies(reply_with(None)), budget, {}, kept.append) == ""
    assert budget.cost == pytest.approx(0.0003)

    def full(answer):
        raise OSError("No space left on device")

    budget = Budget(1.0, PRICES)
    with pytest.raises(OSError, match="No space"):
        ask(client_that_replies(reply_with("yes")), budget, {}, full)
    assert budget.cost == pytest.approx(0.0003)

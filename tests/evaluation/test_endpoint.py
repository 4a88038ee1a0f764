"""The endpoint judge against a server in this process: verdicts, cache, retries, cost cap, and a key nobody sees."""

import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from trl_cwdpo.endpoints import CostCapError
from trl_cwdpo.evaluation.endpoint import EndpointJudge
from trl_cwdpo.evaluation.win_rate import Comparison, compare_responses

pytest.importorskip("openai")

KEY = "sk-do-not-show-me"


class Server(HTTPServer):
    """Prefers the longer response. Keeps the requests, and answers the first `failures` of them with an error."""

    def __init__(self, failures=0, answer=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.failures, self.answer = [], failures, answer
        self.headers_seen = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.headers_seen.append(dict(self.headers))
        if self.server.failures:
            self.server.failures -= 1
            self.send_response(500)
            self.end_headers()
            return
        self.server.requests.append(request)
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": self.server.answer or verdict(request)},
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def verdict(request):
    content = request["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    first, second = text.split("Response A:\n")[1].split("\n\nResponse B:\n")
    if len(first) == len(second):
        return "They are alike. [[tie]]"
    return f"At first I thought [[tie]], but: [[{'A' if len(first) > len(second) else 'B'}]]"


@pytest.fixture
def server(request):
    server = Server(**getattr(request, "param", {}))
    yield server
    server.shutdown()
    server.server_close()


def judge_at(server, tmp_path, monkeypatch, **options):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    options = {"workers": 1, **options}
    return EndpointJudge(
        "m", cache_dir=tmp_path / "cache", base_url=server.url, api_key_variable="JUDGE_KEY", **options
    )


PAIRS = [Comparison("which?", "long one", "short"), Comparison("which?", "a", "longer"), Comparison("x", "ab", "cd")]


def test_verdicts_and_cache(server, tmp_path, monkeypatch):
    judge = judge_at(server, tmp_path, monkeypatch, workers=3)
    assert judge(PAIRS) == [1.0, 0.0, 0.5]
    assert (judge.calls, judge.cached) == (3, 0)
    again = judge_at(server, tmp_path, monkeypatch)
    assert again(PAIRS) == [1.0, 0.0, 0.5]
    assert (again.calls, again.cached, len(server.requests)) == (0, 3, 3)
    # Another model is another question
    EndpointJudge("other", cache_dir=tmp_path / "cache", base_url=server.url)(PAIRS[:1])
    assert len(server.requests) == 4


def test_in_a_win_rate(server, tmp_path, monkeypatch):
    rate = compare_responses(PAIRS, judge_at(server, tmp_path, monkeypatch))
    assert (rate.wins, rate.ties, rate.losses, rate.inconsistent) == (1 / 3, 1 / 3, 1 / 3, 0)


@pytest.mark.parametrize("server", [{"failures": 1}], indirect=True)
def test_a_call_that_failed_is_repeated(server, tmp_path, monkeypatch):
    assert judge_at(server, tmp_path, monkeypatch)(PAIRS[:1]) == [1.0]


def test_the_cost_is_capped_and_nothing_is_lost(server, tmp_path, monkeypatch):
    # 100 prompt tokens at 10 and 10 completion tokens at 100 a million: 0.002 a call
    prices = {"price_per_million": (10.0, 100.0)}
    judge = judge_at(server, tmp_path, monkeypatch, max_cost=0.0045, **prices)
    with pytest.raises(CostCapError, match="raise `max_cost` to"):
        judge(PAIRS)
    assert judge.cost == pytest.approx(0.004)
    assert len(server.requests) == 2
    judge = judge_at(server, tmp_path, monkeypatch, max_cost=0.0045, **prices)
    assert judge(PAIRS) == [1.0, 0.0, 0.5]
    assert len(server.requests) == 3


@pytest.mark.parametrize("server", [{"answer": "I cannot say."}], indirect=True)
def test_an_answer_without_verdict_is_a_tie(server, tmp_path, monkeypatch, caplog):
    judge = judge_at(server, tmp_path, monkeypatch)
    assert judge(PAIRS[:1]) == [0.5]
    assert judge.unreadable == 1
    assert "1 answers without a verdict, counted as ties" in judge.summary()
    assert "no verdict: I cannot say." in caplog.text


def test_a_damaged_file_of_the_cache_is_asked_again(server, tmp_path, monkeypatch):
    judge_at(server, tmp_path, monkeypatch)(PAIRS)
    files = sorted((tmp_path / "cache").iterdir())
    for file, text in zip(files, ('{"answer": "[[', "[]", '{"answer": 3}'), strict=True):
        file.write_text(text)
    again = judge_at(server, tmp_path, monkeypatch)
    assert again(PAIRS) == [1.0, 0.0, 0.5]
    assert (again.calls, again.cached) == (3, 0)


def test_the_summary_says_what_was_asked_and_paid(server, tmp_path, monkeypatch):
    judge = judge_at(server, tmp_path, monkeypatch, price_per_million=(10.0, 100.0))
    judge(PAIRS)
    judge(PAIRS[:1])
    assert judge.summary() == "3 calls, 1 answers from the cache, cost 0.0060"
    assert "cost" not in judge_at(server, tmp_path, monkeypatch).summary()


def test_temperature(server, tmp_path, monkeypatch):
    judge_at(server, tmp_path, monkeypatch)(PAIRS[:1])
    judge_at(server, tmp_path, monkeypatch, temperature=None)(PAIRS[:1])
    assert [request.get("temperature") for request in server.requests] == [0.0, None]
    assert "temperature" not in server.requests[1]


def test_pictures_go_along(server, tmp_path, monkeypatch):
    row = {"images": [Image.new("RGB", (4, 4), "red")]}
    pair = Comparison(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], "a", "b", row
    )
    judge_at(server, tmp_path, monkeypatch)([pair])
    content = server.requests[0]["messages"][-1]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "what?" in content[1]["text"]
    judge_at(server, tmp_path, monkeypatch, with_images=False)([pair])
    assert isinstance(server.requests[1]["messages"][-1]["content"], str)


def test_the_key_is_sent_and_nowhere_else(server, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    judge_at(server, tmp_path, monkeypatch)(PAIRS)
    assert f"Bearer {KEY}" in server.headers_seen[0].values()
    assert KEY not in caplog.text
    assert KEY not in "".join(capsys.readouterr())
    assert all(KEY not in file.read_text() for file in (tmp_path / "cache").iterdir())


def test_refusals(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        EndpointJudge("m", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="`price_per_million`"):
        EndpointJudge("m", cache_dir=tmp_path, base_url="http://x", max_cost=1.0)

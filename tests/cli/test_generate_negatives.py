"""`trl-cwdpo generate-negatives`: both engines, resumed, capped, and against servers that fail."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny
from datasets import Dataset, load_dataset

from trl_cwdpo.cli import main
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.generate_policy import process_number
from trl_cwdpo.cli.generation_journal import DATA, JOURNAL, SUMMARY, Journal
from trl_cwdpo.loading import load_preference_dataset

KEY = "sk-secret-4711"


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    tiny.pairs(10).to_json(folder / "pairs.jsonl")
    return str(folder)


def generate(*words):
    return main(["generate-negatives", *map(str, words), "--quiet"])


def rows_of(folder):
    """The new dataset as users load it, with this package's loader and with `datasets`."""
    rows = load_preference_dataset(str(folder), columns="auto")["train"]
    assert len(load_dataset(str(folder), split="train")) == len(rows)
    return rows


def policy(data, model, output, *words):
    return generate(
        data, "--model", model, "--output", output, "--max_completion_length", 6, "--batch_size", 4, *words
    )


def test_policy_writes_a_dataset_that_trains(data, text_model, tmp_path, capsys):
    output = tmp_path / "out"
    assert policy(data, text_model, output, "--num_generations", 3, "--selection", "hardest") == 0
    made, before = rows_of(output), tiny.pairs(10)
    assert made["prompt"] == before["prompt"]
    assert made["chosen"] == before["chosen"]
    for row, old in zip(made, before, strict=True):
        assert len(row["samples"]) == 3
        if row["source"] == "policy":
            texts = {sample["text"].strip(): sample["avg_logp"] for sample in row["samples"]}
            assert row["avg_logp"] == texts[row["rejected"][0]["content"]]
            assert row["avg_logp"] < 0
            assert row["rejected"] != old["rejected"]
        else:
            assert row["rejected"] == old["rejected"]
    assert set(made["source"]) <= {"policy", "dataset"}
    assert "10 pairs in" in capsys.readouterr().out
    from trl_cwdpo import CWDPOConfig, CWDPOTrainer

    trainer = CWDPOTrainer(
        text_model, args=CWDPOConfig(**tiny.training_options(tmp_path / "run", max_steps=1)), train_dataset=made
    )
    trainer.train()


def test_policy_goes_on_where_it_was_stopped_with_the_same_outcome(data, text_model, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    policy(data, text_model, whole)
    policy(data, text_model, part)
    journal = part / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    # Killed in the middle of a line
    journal.write_text("".join(lines[:6]) + lines[6][:9])
    (part / DATA).unlink()
    assert policy(data, text_model, part) == 0
    assert rows_of(part).to_list() == rows_of(whole).to_list()


def test_a_journal_outlives_line_ends_that_are_none(tmp_path):
    entries = [{"row": row, "source": "policy", "rejected": f"a{end}b"} for row, end in enumerate("\u2028\x85\n")]
    Journal(tmp_path, {"k": 1}).add(entries)
    journal = Journal(tmp_path, {"k": 1})
    assert list(journal.entries.values()) == entries
    assert journal.missing(4) == [3]


def test_processes_write_apart_and_read_each_other(tmp_path):
    first, second = Journal(tmp_path, {"k": 1}), Journal(tmp_path, {"k": 1}, process=1)
    first.add([{"row": 0}])
    second.add([{"row": 2}])
    with second.path.open("a") as file:
        file.write('{"row": 3')  # being written
    assert first.missing(4) == [1, 2, 3]
    first.read()
    assert first.missing(4) == [1, 3]
    assert Journal(tmp_path, {"k": 1}).missing(4) == [1, 3]
    assert second.path.read_text().endswith('{"row": 3')
    with pytest.raises(CommandError, match="k: 1, now 2"):
        Journal(tmp_path, {"k": 2}, process=2)


def test_a_cluster_that_counts_nodes_is_no_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process_number() == (0, 1)
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "3")):
        monkeypatch.setenv(name, value)
    assert process_number() == (3, 4)


@pytest.mark.distributed
def test_two_processes_write_what_one_does(data, text_model, tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    words = ("--num_generations", 2, "--selection", "hardest")
    policy(data, text_model, whole, *words)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    base = (data, "--model", text_model, "--output", shared, "--max_completion_length", 6, "--batch_size", 4)
    process = subprocess.run(
        [*launcher, "-m", "trl_cwdpo.cli", "generate-negatives", *map(str, (*base, *words)), "--quiet"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert process.returncode == 0, process.stderr[-5000:]
    assert process.stdout.count("10 pairs in") == 1
    made, expected = rows_of(shared).to_list(), rows_of(whole).to_list()
    for ours, theirs in zip(made, expected, strict=True):
        assert ours == theirs
    # Batches of four: rows 0-3 and 8-9 were the first process's, rows 4-7 the second's
    journals = [shared / JOURNAL, (shared / JOURNAL).with_name("journal-1.jsonl")]
    assert [len(journal.read_text().splitlines()) for journal in journals] == [1 + 6, 1 + 4]


@pytest.mark.parametrize("conversational", [True, False])
def test_prompts_and_good_responses_will_do(text_model, tmp_path, conversational, capsys):
    (tmp_path / "data").mkdir()
    before = tiny.pairs(10, conversational=conversational)
    before.remove_columns("rejected").to_json(tmp_path / "data" / "pairs.jsonl")
    assert policy(tmp_path / "data", text_model, tmp_path / "out") == 0
    made = rows_of(tmp_path / "out")
    assert set(made["source"]) == {"policy"}
    summary = json.loads((tmp_path / "out" / SUMMARY).read_text())
    assert summary["rows"] == len(made) == summary["sources"]["policy"]
    assert sum(summary["sources"].values()) == 10
    assert set(map(str, made["prompt"])) <= set(map(str, before["prompt"]))
    texts = [row["rejected"] if isinstance(row["rejected"], str) else row["rejected"][0]["content"] for row in made]
    assert "(none)" not in texts
    assert all(texts)


def test_rows_without_a_negative_are_left_out_where_the_data_have_none(text_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_scores.py").write_text(
        "def short(completions, **_):\n    return [-float(len(c[-1]['content'].split())) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "data").mkdir()
    tiny.pairs(10).remove_columns("rejected").to_json(tmp_path / "data" / "pairs.jsonl")
    words = ("--reward_funcs", "my_scores:short", "--selection", "lowest_reward")
    assert policy(tmp_path / "data", text_model, tmp_path / "out", *words) == 0
    made = rows_of(tmp_path / "out")
    assert 0 < len(made) < 10
    assert "left out" in capsys.readouterr().out
    for row in made:
        assert len(row["rejected"][0]["content"].split()) > len(row["chosen"][0]["content"].split())


def test_other_settings_are_refused_by_name(data, text_model, tmp_path, capsys):
    policy(data, text_model, tmp_path / "out")
    assert policy(data, text_model, tmp_path / "out", "--temperature", "0.5") == 1
    error = capsys.readouterr().err
    assert "temperature: 1.0, now 0.5" in error
    assert "Name another --output" in error


def test_rewards_of_a_function(data, text_model, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def words(completions, **_):\n    return [-float(len(c[-1]['content'].split())) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ("--num_generations", 2, "--selection", "lowest_reward", "--reward_funcs", "my_rewards:words")
    assert policy(data, text_model, tmp_path / "out", *words) == 0
    for row in rows_of(tmp_path / "out"):
        if row["source"] == "policy":
            assert len(row["rejected"][0]["content"].split()) > len(row["chosen"][0]["content"].split())


def test_pictures(vision_model, vision_pairs, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    vision_pairs["train"].select(range(5)).to_parquet(folder / "train-00000.parquet")
    assert policy(str(folder), vision_model, tmp_path / "out", "--num_generations", 2) == 0
    made = rows_of(tmp_path / "out")
    assert len(made) == 5
    assert made[0]["images"][0].size == vision_pairs["train"][0]["images"][0].size


def test_pictures_of_a_folder_come_along(vision_model, vision_pairs, tmp_path):
    folder, rows = tmp_path / "data", []
    (folder / "pictures").mkdir(parents=True)
    for index, row in enumerate(vision_pairs["train"].select(range(4))):
        row["images"][0].save(folder / "pictures" / f"{index}.png")
        responses = {name: row[name] for name in ("prompt", "chosen", "rejected")}
        rows.append(json.dumps({**responses, "images": [f"pictures/{index}.png"]}))
    (folder / "train.jsonl").write_text("\n".join(rows))
    assert policy(str(folder), vision_model, tmp_path / "out") == 0
    shutil.rmtree(folder)
    made = rows_of(tmp_path / "out")
    assert made[3]["images"][0].tobytes() == vision_pairs["train"][3]["images"][0].tobytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "x", "--model", "m"), "no DATA given"),
        (("data", "--model", "m"), "--output is needed"),
        (("data", "--output", "x", "--model", "m", "--selection", "lowest_reward"), "need --reward_funcs"),
        (("data", "--output", "x", "--model", "m", "--max_cost", "1"), "needs --price_per_million"),
        (("data", "--output", "x", "--model", "m", "--max_distance", "0"), "--max_distance must lie in"),
        (("data", "--output", "x", "--model", "m", "--num_generations", "0"), "must be 1 or more"),
    ],
)
def test_wrong_usage(words, message, capsys):
    assert generate(*words) == 2
    assert message in capsys.readouterr().err


def test_the_prompt_can_be_had_and_changed(capsys):
    assert main(["generate-negatives", "--show_prompt"]) == 0
    assert {"{prompt}", "{chosen}", "{pictures}"} <= {word.strip(".") for word in capsys.readouterr().out.split()} | {
        "{pictures}"
    }


# --- the endpoint engine, against a server of our own --------------------------------------------------------------


class Stub(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.headers.get("Authorization"), body, time.monotonic()))
            number = len(server.requests)
        if number in server.failing:
            self.answer(server.failing[number], {"error": {"message": "later"}})
            return
        text = server.reply(body["messages"][-1]["content"])
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        reply = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        self.answer(200, {**reply, "usage": usage})

    def answer(self, status, content):
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


def edited(content):
    """The chosen response with its last word changed, read off the request."""
    text = content if isinstance(content, str) else content[-1]["text"]
    words = text.split("Correct answer:\n")[1].split("\n")[0].split()
    return " ".join([*words[:-1], "purple"])


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    pytest.importorskip("rapidfuzz")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stub = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.lock, stub.requests, stub.failing, stub.reply = threading.Lock(), [], {}, edited
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield stub
    stub.shutdown()
    stub.server_close()


def endpoint(data, server, output, *words):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    base = ("--engine", "endpoint", "--model", "editor", "--base_url", url, "--output", output)
    return generate(data, *base, "--max_distance", 0.6, *words)


def test_endpoint_edits_chosen_responses_and_keeps_the_key_to_itself(data, server, tmp_path, capsys):
    output = tmp_path / "out"
    assert endpoint(data, server, output) == 0
    made = rows_of(output)
    assert set(made["source"]) == {"endpoint"}
    for row in made:
        words, chosen = row["rejected"][0]["content"].split(), row["chosen"][0]["content"].split()
        assert words[:-1] == chosen[:-1]
        assert words[-1] == "purple"
        assert row["distance"] == pytest.approx(1 / len(chosen))
    assert {authorization for authorization, _, _ in server.requests} == {f"Bearer {KEY}"}
    shown = capsys.readouterr()
    written = "".join(path.read_text(errors="replace") for path in output.rglob("*") if path.is_file())
    assert KEY not in shown.out + shown.err + written


def test_endpoint_retries_and_continues(data, server, tmp_path, capsys):
    server.failing = {2: 429, 3: 500}
    assert endpoint(data, server, tmp_path / "out") == 0
    assert len(server.requests) == 12
    # For good: after the retries, what there is is kept
    server.requests.clear()
    server.failing = dict.fromkeys(range(4, 100), 400)
    output = tmp_path / "second"
    assert endpoint(data, server, output, "--workers", 1) == 1
    assert "the same command continues" in capsys.readouterr().err
    assert len((output / JOURNAL).read_text().splitlines()) == 1 + 3
    server.requests.clear()
    server.failing = {}
    assert endpoint(data, server, output) == 0
    assert len(server.requests) == 7
    assert len(rows_of(output)) == 10


def test_endpoint_keeps_within_its_cost(data, server, tmp_path, capsys):
    # A call costs 100 · 1 + 50 · 4 = 300 millionths
    words = ("--price_per_million", 1, 4, "--max_cost", 0.001)
    output = tmp_path / "out"
    assert endpoint(data, server, output, *words) == 1
    assert "could exceed --max_cost=0.001" in capsys.readouterr().err
    assert len(server.requests) == 3
    words = ("--price_per_million", 1, 4, "--max_cost", 1)
    assert endpoint(data, server, output, *words) == 0
    assert len(server.requests) == 10
    assert "cost 0.0021" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda content: content.split("Correct answer:\n")[1].split("\n")[0].upper() + " ", "unchanged"),
        (lambda _: "something else entirely that nobody asked for here today", "too far"),
        (lambda _: " ", "empty"),
    ],
)
def test_what_is_no_gentle_negative_is_asked_for_again_and_then_left(data, server, tmp_path, reply, reason):
    server.reply = reply
    assert endpoint(data, server, tmp_path / "out", "--attempts", 3, "--limit", 2) == 0
    assert len(server.requests) == 6
    assert rows_of(tmp_path / "out")["rejected"] == tiny.pairs(10)["rejected"][:2]
    assert json.loads((tmp_path / "out" / SUMMARY).read_text())["sources"] == {f"dataset ({reason})": 2}


def test_endpoint_gets_pictures_and_a_prompt_of_ones_own(server, vision_pairs, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    vision_pairs["train"].select(range(2)).to_parquet(folder / "train-00000.parquet")
    (tmp_path / "prompt.txt").write_text("Mine: {prompt}\nCorrect answer:\n{chosen}\n")
    assert endpoint(str(folder), server, tmp_path / "out", "--prompt_file", tmp_path / "prompt.txt") == 0
    content = server.requests[0][1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert content[1]["text"].startswith("Mine: ")


def test_a_prompt_without_the_response_is_refused(data, server, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Mine: {prompt}")
    assert endpoint(data, server, tmp_path / "out", "--prompt_file", tmp_path / "prompt.txt") == 1
    assert "lacks {chosen}" in capsys.readouterr().err


def test_no_key_is_an_error_that_names_the_variable(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai")
    pytest.importorskip("rapidfuzz")
    monkeypatch.delenv("MY_KEY", raising=False)
    words = ("--engine", "endpoint", "--model", "m", "--output", tmp_path / "out", "--api_key_variable", "MY_KEY")
    assert generate(data, *words) == 1
    assert "set the environment variable MY_KEY" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_server(data, text_model, tmp_path):
    for name in ("openai", "rapidfuzz", "fastapi", "uvicorn"):
        pytest.importorskip(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        Path(sys.executable).parent / "transformers",
        "serve",
        text_model,
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, tmp_path / "server.log")
            words = ("--engine", "endpoint", "--model", text_model, "--base_url", f"http://127.0.0.1:{port}/v1")
            words += ("--output", tmp_path / "out", "--limit", 4, "--max_completion_length", 8, "--max_distance", 1)
            assert generate(data, *words) == 0, (tmp_path / "server.log").read_text()[-3000:]
        finally:
            process.terminate()
            process.wait(timeout=30)
    made = rows_of(tmp_path / "out")
    # An untrained model's answers are words all the same
    assert "endpoint" in made["source"]
    assert isinstance(made, Dataset)


def wait_for(url, process, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                if reply.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not come up: {log.read_text()[-3000:]}")

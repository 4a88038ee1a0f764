"""What a run survives: kill processes at random moments, on every engine and in both stages, and continue.

    python benchmarks/reliability.py kills --output kills.md
    python benchmarks/reliability.py parity --output parity.md

`kills` trains once without interruption, then again and again with SIGKILL for one process or all of them at a random
moment, half of the time while a checkpoint is being written, and continues each from what is left. `parity` compares
every engine with one process. Both run on two CPU processes and write a table in Markdown; DeepSpeed builds a small
operator on its first run.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]
STEPS, SAVE_STEPS = 8, 2
# What is trained: a run of the parity suite with further options
DROPOUT: dict[str, Any] = {"model_init_kwargs": {"attention_dropout": 0.1}}
SAMPLED = {
    "dataset_negative_fraction": 0.5,
    "negative_refresh_steps": 2,
    "negative_max_completion_length": 6,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "stage 1": ("smoothed", DROPOUT),
    "stage 2": ("cooled", {**DROPOUT, "disable_dropout": False}),
    "stage 1, pictures": ("smoothed, pictures", {}),
    "stage 2, pictures, LoRA": ("gated, pictures, adapter", {}),
    "stage 2, sampled negatives": ("cooled", {**DROPOUT, "disable_dropout": False, **SAMPLED}),
}
# Whatever decides the next step: dropout's random state, a schedule, moments, accumulation, shuffling, calibration
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "optim": "adamw_torch",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "no",
}


def train(kind: str, models: Path, output: Path, result: Path) -> None:
    """One process of a run: continue from what is in the output folder, and write down what became of it."""
    import engines
    import parity
    import torch

    torch.set_num_threads(1)
    name, options = KINDS[kind]
    trainer = parity.build(name, models, output, **OPTIONS, **options)
    trainer.train(resume_from_checkpoint="auto")
    # Collectives: every process
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    identity = engines.identity(trainer)
    # Without its adapter, a model is its own reference
    has_reference = parity.RUNS[name][0] is parity.STAGE2 and "lora" not in parity.RUNS[name][1]
    expected = engines.expected_identity(engines.this_engine(), reference=has_reference)
    assert identity == expected, (identity, expected)
    if trainer.is_world_process_zero():
        digest = hashlib.sha256()
        for weight, value in sorted(weights.items()):
            digest.update(weight.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        file = output / "probes.jsonl"
        probes = [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (file.read_text().splitlines() if file.exists() else [])
        ]
        ours = {"log": parity.log_of(trainer)[:-1], "weights": digest.hexdigest(), "probes": probes}
        result.write_text(json.dumps(ours))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start(rank: int, world: int, port: int, log: Path, *arguments: Any) -> int:
    """Fork one process of a run: everything is imported already, so that it starts at once."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if world > 1:
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            os.environ |= {name: str(value) for name, value in own.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train(*arguments)
        code = 0
    except BaseException:  # noqa: BLE001 (a forked process must not return into its parent's code)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(world: int, folder: Path, *arguments: Any) -> list[int]:
    """Start all processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(rank, world, port, folder / f"rank{rank}.log", *arguments) for rank in range(world)]


def ended(processes: list[int], timeout: float = 600) -> list[int]:
    """Exit codes; as under torchrun, the others are ended once one has failed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(processes):
        for process in set(processes) - set(codes):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > deadline:
            for process in set(processes) - set(codes):
                os.kill(process, signal.SIGKILL)
                codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0.01)
    return [codes[process] for process in processes]


def steps_logged(output: Path) -> int:
    """How many steps a run has got to, as far as its checkpoints tell."""
    return max((int(folder.name.split("-")[1]) for folder in output.glob("checkpoint-*")), default=0)


def kill(processes: list[int], output: Path, victims: list[int], moment: dict[str, Any], started: float) -> bool:
    """Wait for a moment and kill; whether there was still something to kill."""
    while True:
        if moment["kind"] == "saving":
            if steps_logged(output) >= moment["step"]:
                time.sleep(moment["delay"])
                break
        elif time.monotonic() - started >= moment["delay"]:
            break
        if any(os.waitpid(process, os.WNOHANG)[0] for process in processes):
            return False
        time.sleep(0.002)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    return True


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What differs between two results."""
    faults = [name for name in ("log", "probes", "weights") if ours[name] != theirs[name]]
    if not faults:
        return "bit for bit"
    numbers = [
        abs(mine[key] - value)
        for mine, other in zip(ours["log"], theirs["log"], strict=False)
        for key, value in other.items()
        if isinstance(value, float) and key in mine
    ]
    return f"DIFFERS in {', '.join(faults)}, by up to {max(numbers, default=0.0):.1e}"


def kills_on(engine_name: str, models: Path, rows: int, seed: int) -> list[dict[str, Any]]:
    """All kills on one engine, in this process, which has imported everything."""
    import engines

    engine = engines.ENGINES[engine_name]
    draw = random.Random(f"{seed}-{engine_name}")
    found = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            began = time.monotonic()
            whole = launch(engine.processes, folder, kind, models, folder / "whole", folder / "whole.json")
            codes = ended(whole)
            assert not any(codes), (codes, (folder / "rank0.log").read_text()[-4000:])
            duration = time.monotonic() - began
            theirs = json.loads((folder / "whole.json").read_text())
            for _ in range(rows):
                found.append(one_kill(engine, kind, models, folder, draw, duration, theirs))
                print(json.dumps(found[-1]), flush=True)
    return found


def one_kill(
    engine: Any,  # noqa: ANN401
    kind: str,
    models: Path,
    folder: Path,
    draw: random.Random,
    duration: float,
    theirs: dict[str, Any],
) -> dict[str, Any]:
    """Kill once, continue, compare."""
    output, result = folder / "killed", folder / "killed.json"
    while True:
        shutil.rmtree(output, ignore_errors=True)
        result.unlink(missing_ok=True)
        everyone = engine.processes == 1 or draw.random() < 0.4
        saving = draw.random() < 0.5
        moment: dict[str, Any] = (
            {
                "kind": "saving",
                "step": draw.choice(range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)),
                "delay": draw.random() / 8,
            }
            if saving
            else {"kind": "any", "delay": duration * draw.uniform(0.3, 0.95)}
        )
        processes = launch(engine.processes, folder, kind, models, output, result)
        victim = draw.randrange(engine.processes)
        victims = processes if everyone else [processes[victim]]
        if kill(processes, output, victims, moment, time.monotonic()):
            ended(processes)
            break
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
    left = left_behind(output, engine.processes)
    codes = ended(launch(engine.processes, folder, kind, models, output, result))
    outcome = (
        compare(json.loads(result.read_text()), theirs)
        if not any(codes)
        else f"DIED: {last_error(folder / 'rank0.log')}"
    )
    return {
        "engine": engine.name,
        "run": kind,
        "killed": "all" if everyone else f"process {victim}",
        "moment": f"writing checkpoint {moment['step']}" if saving else f"{moment['delay']:.2f} s of {duration:.2f} s",
        **left,
        "outcome": outcome,
    }


def last_error(log: Path) -> str:
    """The line of a log that says what a process died of."""
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no word")


def left_behind(output: Path, processes: int) -> dict[str, Any]:
    """What a killed run leaves: the checkpoint to continue from, and the broken ones after it."""
    from trl_cwdpo.checkpoints import broken_checkpoints, last_checkpoint

    last = last_checkpoint(str(output), processes)
    return {
        "continued_from": last.name if last else "the start",
        "passed_over": ", ".join(
            f"{folder.name} ({fault})" for folder, fault in broken_checkpoints(str(output), processes).items()
        ),
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows as a table in Markdown."""
    names = list(rows[0])
    head = [name.replace("_", " ") for name in names]
    lines = [head, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def build_models(folder: Path) -> None:
    """The tiny models of the tests."""
    import tiny

    from trl_cwdpo.shapes import build_model, build_processor

    tiny.save_text_model(folder / "text")
    processor = build_processor()
    build_model(processor).save_pretrained(folder / "pictures")
    processor.save_pretrained(folder / "pictures")


def run_engine(arguments: argparse.Namespace, engine_name: str, models: Path) -> list[dict[str, Any]]:
    """The kills of one engine, in a process of their own with that engine's environment."""
    import engines

    engine = engines.ENGINES[engine_name]
    environment = {**engines.environment(engine), **engines.launch_environment(engine, models)}
    words = [sys.executable, __file__, "kills-on", engine_name, str(models)]
    words += ["--kills", str(arguments.kills), "--seed", str(arguments.seed)]
    process = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    rows = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"engine"')]
    if process.returncode or len(rows) != arguments.kills * len(KINDS):
        raise SystemExit(f"{engine_name} ended with {process.returncode} after {len(rows)} kills")
    print(as_table(rows), flush=True)
    return rows


def parity_rows(models: Path, engine_names: list[str], names: list[str]) -> list[dict[str, Any]]:
    """Largest differences from one process, by run and engine."""
    import engines
    import parity

    names = names or list(parity.RUNS)
    results: dict[str, dict[str, Any]] = {}
    for engine_name in ("one", *engine_names):
        folder = models / engine_name
        folder.mkdir()
        process = engines.run(engines.ENGINES[engine_name], folder, parity.__file__, folder, models, *names)
        files = {name: folder / f"{name}-rank0.json" for name in names}
        missing = [name for name, file in files.items() if not file.exists()]
        if missing:
            raise SystemExit(f"{engine_name} did not finish {missing}:\n{process.stderr[-3000:]}")
        results[engine_name] = {name: json.loads(file.read_text()) for name, file in files.items()}
    rows = []
    for name in names:
        row: dict[str, Any] = {"run": name}
        for engine_name in engine_names:
            # Rows are shared out otherwise to one process, and each process samples with a seed of its own
            like_two = "uneven" in name or name.startswith("sampled")
            expected = results["ddp" if like_two else "one"][name]
            worst = max(parity.differences(name, results[engine_name][name], expected).values())
            row[engine_name] = f"{worst:.0e}"
        rows.append(row)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "kills-on", "parity"])
    parser.add_argument("words", nargs="*", help="with parity: runs of the suite, all by default")
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2", "zero1", "zero2", "zero3"])
    parser.add_argument("--kills", type=int, default=3, help="kills for each engine and kind of run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.what == "kills-on":
        import parity  # noqa: F401 (imported before the first fork)

        engine_name, models = arguments.words
        kills_on(engine_name, Path(models), arguments.kills, arguments.seed)
        return
    with tempfile.TemporaryDirectory() as name:
        models = Path(name)
        build_models(models)
        if arguments.what == "parity":
            rows = parity_rows(models, arguments.engines, arguments.words)
        else:
            rows = [row for engine in arguments.engines for row in run_engine(arguments, engine, models)]
    table = as_table(rows)
    if arguments.what == "parity":
        print(table)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

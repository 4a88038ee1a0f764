"""Do the probes name what was done to a run? Four provoked failures and a healthy run, on several seeds.

    python benchmarks/provoked_failures.py --output_dir outputs/provoked [--first_seed 0] [--seeds 5] [--only swapped]

Stage 2 on the shapes task, from the pretrained tiny model, 60 steps, by `trl-cwdpo cwdpo` as a
user would run it. Each run's folder stays, with its `probes.jsonl`; `provoked.json` has the verdicts. A run whose
`probes.jsonl` is complete is not repeated. The table, in Markdown, has the numbers that decided each verdict.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict, load_dataset

from trl_cwdpo.cli import main as command
from trl_cwdpo.cli.demo import default_cache_dir
from trl_cwdpo.probe_records import ProbeRecord, read_records
from trl_cwdpo.shapes import pretrain, write_dataset
from trl_cwdpo.signals import diagnose, raised_flags

STEPS = 60
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 16,
    "beta": 0.5,
    "learning_rate": 3e-5,
    "warmup_steps": 6,
    "max_length": "none",
    "use_cpu": "true",
    "bf16": "false",
    "gradient_checkpointing": "false",
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
}


class Scenario(NamedTuple):
    """What is done to a run, and what the probes should say: these names among the diagnosis and the flags."""

    data: str
    options: dict[str, float | str]
    expected: frozenset[str]


SCENARIOS = {
    # Default mode, calibrated floor and temperature
    "healthy": Scenario("plain", {"learning_rate": 1.5e-4}, frozenset({"healthy"})),
    # β·L·τ = 0.1 · 10 · 3 = 3, and a learning rate seven times as high
    "squeezing": Scenario(
        "plain",
        {"beta": 0.1, "cooling_floor": -6.0, "cooling_temperature": 3.0, "learning_rate": 1e-3},
        frozenset({"squeezing", "displacement"}),
    ),
    # Easy negatives only, under a floor for which they are easy, and β·L·τ = 0.5 · 5 · 1.5 = 3.75
    "easy": Scenario(
        "easy",
        {"cooling_floor": -7.0, "cooling_temperature": 1.5, "learning_rate": 1e-4},
        frozenset({"easy negatives dominate"}),
    ),
    # A floor above every log-probability there is
    "cooled": Scenario("plain", {"cooling_floor": 2.0, "cooling_temperature": 0.3}, frozenset({"cooled out"})),
    # Chosen and rejected exchanged in the training data
    "swapped": Scenario("swapped", {"learning_rate": 1e-4}, frozenset({"labels swapped or mask wrong"})),
}


def variant(data: DatasetDict, name: str) -> Dataset:
    """The training data of a scenario."""
    rows = data["train"]
    if name == "easy":
        return rows.filter(lambda row: row["grade"] == "easy")
    if name == "swapped":
        return rows.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    return rows


def write_variants(folder: Path) -> dict[str, Path]:
    """All training data beside the same held-out pairs, as folders of Parquet files."""
    cache = default_cache_dir()
    source = write_dataset(cache / "shapes-2000-500-seed0", num_test=500)
    data = load_dataset(str(source), cache_dir=str(cache / "arrow"))
    found = {}
    for name in {scenario.data for scenario in SCENARIOS.values()}:
        found[name] = folder / "data" / name
        found[name].mkdir(parents=True, exist_ok=True)
        variant(data, name).to_parquet(found[name] / "train.parquet")
        data["test"].to_parquet(found[name] / "test.parquet")
    return found


def verdict(records: list[ProbeRecord]) -> dict[str, Any]:
    """What the last probe says, and every flag on the way."""
    last = diagnose(records[-1])
    flags = [raised_flags(records[: end + 1]) for end in range(len(records))]
    return {
        "diagnosis": last.name,
        "reason": last.reason,
        "row": _row(records[-1]),
        "flags": sorted(flags[-1]),
        "ever_raised": sorted({name for raised in flags for name in raised}),
    }


def _row(record: ProbeRecord) -> list[str]:
    """What the diagnosis reads, as a table shows it."""
    deltas = [record.delta0(family) for family in ("chosen", "rejected_hard", "rejected_easy", "argmax")]
    cells = ["–" if delta is None else f"{delta.mean:+.3f} [{delta.low:+.3f}, {delta.high:+.3f}]" for delta in deltas]
    weight = "–" if record.mean_weight is None else f"{record.mean_weight:.3f}"
    return [*cells, weight, f"{record.top1_mass:.3f}"]


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All verdicts, in Markdown."""
    headers = ["run", "seed", "Δ0 chosen", "hard", "easy", "greedy", "mean w", "top-1 mass", "diagnosis", "flags", ""]
    lines = [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    for name, seeds in results.items():
        for seed, found in seeds.items():
            flags = ", ".join(flag.replace("_", " ") for flag in found["ever_raised"]) or "none"
            cells = [name, seed, *found["row"], found["diagnosis"], flags, "right" if found["right"] else "WRONG"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_right(name: str, found: dict[str, Any]) -> bool:
    """Whether the verdict names what was done; of a healthy run, whether no flag was ever raised as well."""
    if name == "healthy":
        return found["diagnosis"] == "healthy" and not found["ever_raised"]
    return bool({found["diagnosis"], *found["ever_raised"]} & SCENARIOS[name].expected)


def train(name: str, seed: int, model: str, data: Path, output: Path, **probes: int) -> list[ProbeRecord]:
    """The probes of one run."""
    if (output / "probes.jsonl").exists():
        records = read_records(output)
        if records[-1].step == STEPS:
            return records
    options = {
        **COMMON,
        **SCENARIOS[name].options,
        **probes,
        "model_name_or_path": model,
        "dataset_name": str(data),
        "output_dir": str(output),
        "seed": seed,
    }
    code = command(["cwdpo", *(word for key, value in options.items() for word in (f"--{key}", str(value)))])
    if code:
        sys.exit(f"{output} ended with exit code {code}")
    return read_records(output)


def main() -> None:
    """Run what is missing, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    # More than the default of 64, since a third of them are hard and a third easy, and one family decides
    parser.add_argument("--probe_dataset_size", type=int, default=192, help="rows probed (default: %(default)s)")
    parser.add_argument("--probe_steps", type=int, default=20, help="steps between two probes (default: %(default)s)")
    parser.add_argument("--only", choices=list(SCENARIOS), nargs="+", default=list(SCENARIOS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = str(pretrain(default_cache_dir() / "tiny-vlm-800-20000-seed0").path)
    data = write_variants(arguments.output_dir)
    probes = {"probe_dataset_size": arguments.probe_dataset_size, "probe_steps": arguments.probe_steps}
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in arguments.only}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in arguments.only:
            output = arguments.output_dir / f"{name}-{seed}"
            found = verdict(train(name, seed, model, data[SCENARIOS[name].data], output, **probes))
            results[name][str(seed)] = {**found, "right": is_right(name, found)}
            print(f"{name} seed {seed}: {found['diagnosis']}; flags {found['ever_raised']}", flush=True)
    (arguments.output_dir / "provoked.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    print(table(results))
    for name, seeds in results.items():
        right = sum(bool(found["right"]) for found in seeds.values())
        said = sorted({str(found["diagnosis"]) for found in seeds.values()})
        print(f"{name:10} {right} of {len(seeds)} right; diagnosis {', '.join(said)}")


if __name__ == "__main__":
    main()

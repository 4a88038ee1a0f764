"""Peak memory of an optimizer step: TRL's `DPOTrainer` and ours, each in a process of its own.

Every process builds its trainer as `step_time.py` does, makes a step so that the optimizer has its state, resets the
kernel's record of its largest size, and makes another. Reported is that size, less what it was without a model.
Linux only. With `MALLOC_MMAP_THRESHOLD_` memory that is freed goes back at once, so that nothing but the step counts.

    MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1 python benchmarks/peak_memory.py
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import torch
from step_time import VARIANTS, Contestant, batch_of, build

STATUS = Path("/proc/self/status")
MEBIBYTE = 2**20
# (model, tuning, prompt or patches in height and width, completion)
CELLS = [
    ("text", "full", 1024, 64),
    ("text", "lora", 1024, 64),
    ("text", "full", 64, 512),
    ("qwen2.5-vl", "full", 32, 32),
    ("qwen2.5-vl", "lora", 32, 32),
]


def status(entry: str) -> float:
    """An entry of the process's status, in MiB."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{entry}:")]
    return int(line.split()[1]) * 1024 / MEBIBYTE


def measure(name: str, cell: tuple[str, str, int, int], folder: str) -> float:
    """Peak of a step of one variant in this process, in MiB above what it takes without a model."""
    family, tuning, size, completion = cell
    _, batch = batch_of(family, size, completion, "cpu")
    before = status("VmRSS")
    contestant = Contestant(name, folder, tuning, "cpu")
    if contestant.stored:
        batch |= {"ref_chosen_logps": torch.zeros(1), "ref_rejected_logps": torch.zeros(1)}
    contestant.step(batch)
    Path("/proc/self/clear_refs").write_text("5")
    contestant.step(batch)
    return status("VmHWM") - before


def in_its_own_process(name: str, cell: tuple[str, str, int, int], folder: str) -> float:
    """[`measure`] in a copy of this process, which has nothing loaded but libraries."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        return pool.apply(measure, (name, cell, folder))


def weights_of(folder: str) -> float:
    """Size of a saved model, in MiB."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / MEBIBYTE


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--families", nargs="+", default=["text", "qwen2.5-vl"])
    options = parser.parse_args()
    names = [name for name in VARIANTS if name != "TRL"]
    print(f"| model | tuning | prompt | completion | weights, MiB | TRL, MiB | {' | '.join(names)} |")
    print("|---" * (6 + len(names)) + "|")
    for cell in [cell for cell in CELLS if cell[0] in options.families]:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            build(cell[0], options.width, options.layers).save_pretrained(folder)
            peaks = {name: in_its_own_process(name, cell, folder) for name in VARIANTS}
            prompt, _ = batch_of(cell[0], *cell[2:], "cpu")
            ratios = [f"{peaks[name]:.0f} (**{peaks[name] / peaks['TRL']:.2f}**)" for name in names]
            row = [*cell[:2], prompt, cell[3], f"{weights_of(folder):.0f}", f"{peaks['TRL']:.0f}", *ratios]
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()

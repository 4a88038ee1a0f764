"""How much memory weights, gradients and optimizer take on each process, from the number of parameters.

    python benchmarks/memory_per_rank.py --parameters 7.0e9 --ranks 8
    python benchmarks/memory_per_rank.py --parameters 72e9 --ranks 32 --trainable 0.8e9

It counts what stays for the whole run; activations, the weights that sharded engines gather for one layer at a time,
buckets of communication and the allocator's fragments come on top. The formulas stand in `bytes_per_rank`.
"""

import argparse
from dataclasses import dataclass

# What each of them shards: 1, the optimizer; 2, gradients too; 3, weights too
STAGES = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3}
REFERENCES = ("model", "cache", "adapter")
FLOAT32, BFLOAT16 = 4.0, 2.0
# Two moments in float32
ADAM = 2 * FLOAT32
# nf4: half a byte a weight, and one float32 scale for 64 of them, which no engine shards
NF4, NF4_SCALES = 0.5, FLOAT32 / 64
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """
    What one process holds, in bytes.

    Args:
        weights (`float`): Weights, the frozen ones of an adapter's base included.
        gradients (`float`): Gradients of the trained weights.
        optimizer (`float`): Two moments, and the float32 copy that DeepSpeed keeps of the weights.
        reference (`float`): The reference model.
    """

    weights: float
    gradients: float
    optimizer: float
    reference: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.reference


def bytes_per_rank(
    parameters: float,
    ranks: int,
    engine: str,
    *,
    trainable: float | None = None,
    reference: str = "model",
    mixed_precision: bool = True,
    base_bytes: float = BFLOAT16,
    base_scales: float = 0.0,
) -> Memory:
    """
    What each process holds, with AdamW.

    P parameters, T of them trained, N processes; w bytes for a weight that is trained, b for one that is not, and s
    for its share of a scale, where it is quantized:

        weights    (w·T + b·(P − T)) / N from stage 3 on, + s·(P − T)
        gradients  w·T               / N from stage 2 on
        optimizer  (8 + m)·T         / N from stage 1 on
        reference  w·P               / N from stage 3 on

    DDP and FSDP2 train float32 weights (w = 4, m = 0), which autocast or FSDP casts layer by layer. DeepSpeed trains
    bfloat16 weights (w = 2) and keeps a float32 copy of them in the optimizer (m = 4), in full precision too (w = 4).

    Args:
        parameters (`float`): P, of the whole model.
        ranks (`int`): N.
        engine (`str`): One of `STAGES`.
        trainable (`float`, *optional*): T; all by default. With LoRA: the adapter's, and P includes them.
        reference (`str`, *optional*, defaults to `"model"`):
            `"model"`: one beside the trained model; `"cache"`: `reference_cache_dir`; `"adapter"`: the base,
            with the adapter switched off. The last two take nothing.
        mixed_precision (`bool`, *optional*, defaults to `True`): `bf16=True`.
        base_bytes (`float`, *optional*, defaults to `2.0`): b: 2 for bfloat16 (`dtype`), `NF4` for `load_in_4bit`,
            which FSDP2 shards with a `bnb_4bit_quant_storage` of floats only.
        base_scales (`float`, *optional*, defaults to `0.0`): s: `NF4_SCALES` for `load_in_4bit`.

    Returns:
        [`Memory`].

    Raises:
        ValueError: If the engine or the reference is unknown.
    """
    if engine not in STAGES or reference not in REFERENCES:
        known = f"{', '.join(STAGES)}, `reference`={reference!r} of {', '.join(REFERENCES)}"
        raise ValueError(f"`engine`={engine!r} must be one of {known}.")
    shards = {level: ranks if STAGES[engine] >= level else 1 for level in (1, 2, 3)}
    deepspeed = engine.startswith("zero")
    trained = parameters if trainable is None else trainable
    frozen = parameters - trained
    width = BFLOAT16 if deepspeed and mixed_precision else FLOAT32
    copy = FLOAT32 if deepspeed else 0.0
    return Memory(
        weights=(width * trained + base_bytes * frozen) / shards[3] + base_scales * frozen,
        gradients=width * trained / shards[2],
        optimizer=(ADAM + copy) * trained / shards[1],
        reference=width * parameters / shards[3] if reference == "model" else 0.0,
    )


def table(parameters: float, ranks: int, adapter: float) -> str:
    """
    Memory by engine and by what is trained, as Markdown, in GiB for each process.

    Args:
        parameters (`float`): Of the model.
        ranks (`int`): Processes.
        adapter (`float`): Parameters of a LoRA adapter.
    """
    columns = {
        "whole model": {"reference": "model"},
        "whole model, reference cache": {"reference": "cache"},
        "LoRA": {"reference": "adapter", "trainable": adapter},
        "QLoRA (nf4)": {"reference": "adapter", "trainable": adapter, "base_bytes": NF4, "base_scales": NF4_SCALES},
    }
    lines = [f"| GiB on each of {ranks} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for engine in STAGES:
        cells = []
        for name, options in columns.items():
            size = parameters + (adapter if "LoRA" in name else 0)
            cells.append(f"{bytes_per_rank(size, ranks, engine, **options).total / GIB:.1f}")
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=7e9, help="of the model (default: %(default)g)")
    parser.add_argument("--ranks", type=int, default=8, help="processes, one a GPU (default: %(default)s)")
    parser.add_argument("--trainable", type=float, default=40e6, help="of a LoRA adapter (default: %(default)g)")
    arguments = parser.parse_args()
    print(table(arguments.parameters, arguments.ranks, arguments.trainable))


if __name__ == "__main__":
    main()

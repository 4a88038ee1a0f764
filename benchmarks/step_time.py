"""Time, arithmetic and memory of an optimizer step: TRL's `DPOTrainer` and ours, alternating in one process.

Every variant gets the same model and the same batches, and their losses are compared before anything is timed. What is
measured is loss, backward pass and optimizer step of one pair; loading data is left out. On a CPU the time is that of
the process, so that others on the machine disturb it little; run it with `OMP_NUM_THREADS=1`.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py --output results/performance.md
    python benchmarks/step_time.py --device cuda --grid gpu --output performance-gpu.md
    python benchmarks/step_time.py --device cuda --grid gpu --families text --attention flex_attention
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from trl import DPOConfig, DPOTrainer

from trl_cwdpo import CWDPOConfig, CWDPOTrainer

VOCABULARY, IMAGE, VIDEO, START, END = 2048, 2047, 2046, 2045, 2044
# (prompt, completion) in tokens
GRIDS = {
    "cpu": [(1024, 64), (256, 256), (64, 512), (64, 64)],
    "gpu": [(prompt, length) for prompt in (64, 256, 1024, 4096) for length in (32, 128, 512)],
}
# Pictures: patches in height and width, completion; a prompt has 34 tokens of text more
VISION_GRIDS = {"cpu": [(32, 32)], "gpu": [(side, length) for side in (32, 64) for length in (32, 128, 512)]}
TEXT_OF_PROMPT = 34
PATCH, MERGE = 14, 2


@dataclass(frozen=True)
class Result:
    """One variant on one shape, relative to `DPOTrainer`."""

    family: str
    tuning: str
    prompt: int
    completion: int
    variant: str
    seconds: float
    time: float
    flops: float
    activations: float
    peak: float | None


def decoder(width: int, layers: int) -> dict[str, Any]:
    """Sizes of a decoder."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 128),
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }


def build(family: str, width: int, layers: int) -> Any:  # noqa: ANN401 (a model of transformers)
    """A model with random weights."""
    text = decoder(width, layers)
    if family == "text":
        return LlamaForCausalLM(LlamaConfig(**text))
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=width // 2,
            intermediate_size=width * 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 128 or 1,
            image_size=16 * PATCH,
            patch_size=PATCH,
        )
        config = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_index=IMAGE, vision_feature_layer=-1
        )
        return LlavaForConditionalGeneration(config)
    vision = {"depth": layers, "hidden_size": width // 2, "intermediate_size": width, "num_heads": width // 128 or 1}
    vision |= {"out_hidden_size": width, "fullatt_block_indexes": [layers - 1]}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**text, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token."""
    words = ["<pad>", "<eos>", *(f"w{index}" for index in range(2, VOCABULARY))]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


def batch_of(family: str, size: int, completion: int, device: str) -> tuple[int, dict[str, torch.Tensor]]:
    """A batch of one pair, as TRL's collators make it, and the length of its prompt."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(2, END, (count,), generator=generator).tolist()

    extra: dict[str, torch.Tensor] = {}
    if family == "text":
        prompt = words(size)
    elif family == "llava":
        prompt = [*words(2), *[IMAGE] * 256, *words(TEXT_OF_PROMPT - 2)]
        pixels = torch.randn(1, 3, 16 * PATCH, 16 * PATCH, generator=generator)
        extra["pixel_values"] = pixels.repeat(2, 1, 1, 1)
    else:
        prompt = [*words(2), START, *[IMAGE] * (size // MERGE) ** 2, END, *words(TEXT_OF_PROMPT - 4)]
        pixels = torch.randn(size * size, 3 * 2 * PATCH**2, generator=generator)
        extra["pixel_values"] = pixels.repeat(2, 1)
        extra["image_grid_thw"] = torch.tensor([[1, size, size]] * 2)
    ids = torch.tensor([prompt + words(completion) for _ in range(2)])
    mask = torch.zeros_like(ids)
    mask[:, len(prompt) :] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, **extra}
    if "image_grid_thw" in extra:
        batch["mm_token_type_ids"] = (ids == IMAGE).long()
    return len(prompt), {name: value.to(device) for name, value in batch.items()}


GATE = {"cooling_mode": "gate", "cooling_floor": -8.0, "cooling_temperature": 0.5}
# The gate leaves the value of the loss as it is, so that all variants can be compared
VARIANTS: dict[str, tuple[type[DPOTrainer], dict[str, Any], bool]] = {
    "TRL": (DPOTrainer, {}, False),
    "cooling": (CWDPOTrainer, {**GATE, "share_prefix": False}, False),
    "sharing": (CWDPOTrainer, {"cooling_mode": "off", "share_prefix": True}, False),
    "cooling + auto": (CWDPOTrainer, {**GATE, "share_prefix": "auto"}, False),
    "cooling + auto + stored reference": (CWDPOTrainer, {**GATE, "share_prefix": "auto"}, True),
}


class Contestant:
    """A variant: its trainer, and one step of it."""

    def __init__(self, name: str, folder: str, tuning: str, device: str, attention: str = "sdpa") -> None:
        trainer_class, options, self.stored = VARIANTS[name]
        config_class = DPOConfig if trainer_class is DPOTrainer else CWDPOConfig
        args = config_class(
            output_dir=f"{folder}/out",
            use_cpu=device == "cpu",
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            max_length=None,
            gradient_checkpointing=False,
            precompute_ref_log_probs=self.stored,
            model_init_kwargs={"attn_implementation": attention},
            **options,
        )
        rows = [{"prompt": "w2 w3 ", "chosen": f"w{4 + i}", "rejected": f"w{9 + i}"} for i in range(2)]
        lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], exclude_modules=".*(vision_tower|visual).*")
        self.trainer = trainer_class(
            model=folder,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=lora if tuning == "lora" else None,
        )
        self.trainer.create_optimizer()
        self.trainer.model.train()

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of a batch."""
        return self.trainer.compute_loss(self.trainer.model, dict(batch))

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """An optimizer step that leaves the weights as they are."""
        optimizer: Any = self.trainer.optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def kept_for_backward(contestant: Contestant, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in contestant.trainer.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contestant.loss(batch)
    del loss
    return sum(kept.values())


def arithmetic(contestant: Contestant, batch: dict[str, torch.Tensor]) -> int:
    """Floating-point operations of a step, attention counted in full where a kernel would skip what is masked."""
    # The fused kernels of a CPU are not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        contestant.loss(batch).backward()
    contestant.trainer.optimizer.zero_grad()  # type: ignore[union-attr]
    return counter.get_total_flops()


def seconds_of(work: Callable[[], None], device: str) -> float:
    """How long it takes: the process on a CPU, the clock on an accelerator."""
    if device == "cpu":
        before = time.process_time()
        work()
        return time.process_time() - before
    torch.accelerator.synchronize()
    before = time.perf_counter()
    work()
    torch.accelerator.synchronize()
    return time.perf_counter() - before


def peak_of(work: Callable[[], None], device: str) -> int | None:
    """Peak memory of an accelerator in bytes."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def compare(
    contestants: dict[str, Contestant], label: tuple[str, str], shape: tuple[int, int], options: argparse.Namespace
) -> list[Result]:
    """All variants on one shape."""
    prompt, batch = batch_of(label[0], *shape, options.device)
    trl_trainer = contestants["TRL"].trainer
    with torch.no_grad():
        reference = trl_trainer.ref_model or trl_trainer.model
        stored = trl_trainer.compute_ref_log_probs(reference, batch)
    batches = {
        name: {**batch, "ref_chosen_logps": stored[0], "ref_rejected_logps": stored[1]} if each.stored else batch
        for name, each in contestants.items()
    }
    losses = {name: each.loss(batches[name]).item() for name, each in contestants.items()}
    for name, loss in losses.items():
        if abs(loss - losses["TRL"]) > 1e-4:
            raise AssertionError(f"{name} has the loss {loss}, TRL {losses['TRL']}: these are not the same step.")
    flops = {name: arithmetic(each, batches[name]) for name, each in contestants.items()}
    kept = {name: kept_for_backward(each, batches[name]) for name, each in contestants.items()}
    peaks = {
        name: peak_of(lambda e=each, n=name: e.step(batches[n]), options.device) for name, each in contestants.items()
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.rounds + 1):
        # Back and forth, since a processor that is slowing down would favour whoever comes first
        for name, each in list(contestants.items())[:: -1 if turn % 2 else 1]:
            taken = seconds_of(lambda e=each, n=name: e.step(batches[n]), options.device)
            if turn:  # the first is to warm up
                times[name].append(taken)
    results = []
    for name in contestants:
        ratios = [ours / theirs for ours, theirs in zip(times[name], times["TRL"], strict=True)]
        peak = None if peaks[name] is None else peaks[name] / peaks["TRL"]  # type: ignore[operator]
        numbers = (statistics.median(times[name]), statistics.median(ratios))
        shares = (flops[name] / flops["TRL"], kept[name] / max(kept["TRL"], 1))
        results.append(Result(*label, prompt, shape[1], name, *numbers, *shares, peak))
        print(results[-1], flush=True)
    return results


def table(results: list[Result]) -> str:
    """Markdown: a row for each shape, time and counted arithmetic of each variant."""
    names = [name for name in VARIANTS if name in {result.variant for result in results} - {"TRL"}]
    lines = [
        "| model | tuning | prompt | completion | TRL, s | "
        + " | ".join(f"{name}: time (FLOPs) memory" for name in names)
        + " |",
        "|---" * (5 + len(names)) + "|",
    ]
    shapes = dict.fromkeys((r.family, r.tuning, r.prompt, r.completion) for r in results)
    for shape in shapes:
        rows = {r.variant: r for r in results if (r.family, r.tuning, r.prompt, r.completion) == shape}
        cells = [
            f"**{r.time:.2f}** ({r.flops:.2f}) {r.activations if r.peak is None else r.peak:.2f}"
            for r in (rows[name] for name in names)
        ]
        lines.append(f"| {' | '.join(map(str, shape))} | {rows['TRL'].seconds:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """Measured time against counted arithmetic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5))
    for name in [name for name in VARIANTS if name != "TRL"]:
        of_variant = [r for r in results if r.variant == name]
        axes.scatter([r.flops for r in of_variant], [r.time for r in of_variant], label=name, alpha=0.7)
    axes.axline((0.5, 0.5), slope=1, color="grey", linewidth=1, label="time = counted FLOPs")
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set(xlabel="FLOPs of a step, relative to TRL", ylabel="time of a step, relative to TRL")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def report(results: list[Result], options: argparse.Namespace, command: str) -> str:
    """The page of results."""
    machine = platform.processor() or platform.machine()
    where = f"{options.device} ({machine}, {torch.get_num_threads()} thread)"
    memory = "bytes kept for the backward pass" if options.device == "cpu" else "peak memory allocated"
    return f"""# Time of an optimizer step

Printed by `{command}` with torch {torch.__version__}, transformers {transformers.__version__} and TRL \
{trl.__version__} on {where}, float32, one pair a step, models of width {options.width} with {options.layers} layers
({options.rounds} rounds, alternating; medians). Everything is relative to TRL's `DPOTrainer` on the same batch with
the same loss; below 1 is better. In parentheses the floating-point operations that PyTorch counted, which bound the
time; then {memory}.

- **cooling**: `CWDPOTrainer`, `share_prefix=False`, in `gate` mode;
- **sharing**: plain DPO with `share_prefix=True`;
- **cooling + auto**: the default, which shares where that is estimated to be cheaper;
- **stored reference**: the same with reference log-probabilities from disk.

{table(results)}

![Time against counted arithmetic](../images/step_time.png)
"""


def write(results: list[Result], options: argparse.Namespace) -> None:
    """The page and its plot, of what there is so far."""
    if options.output is None:
        return
    words = [f"--grid {options.grid}", f"--device {options.device}", f"--rounds {options.rounds}"]
    words += [f"--attention {options.attention}"] * (options.attention != "sdpa")
    command = " ".join(["python benchmarks/step_time.py", *words, f"--output {options.output}"])
    plot(results, options.output.parent.parent / "images" / "step_time.png")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report(results, options, command), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["qwen2.5-vl", "text", "llava"])
    parser.add_argument("--tunings", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS][1:], choices=[*VARIANTS][1:])
    parser.add_argument("--grid", default="cpu", choices=list(GRIDS))
    shapes = {"nargs": "+", "type": lambda text: tuple(map(int, text.split("x"))), "metavar": "PROMPTxCOMPLETION"}
    parser.add_argument("--shapes", help="Of text, instead of the grid's.", **shapes)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="sdpa", help="Attention implementation of transformers.")
    parser.add_argument("--output", type=Path, help="Page to write; the plot goes to ../images beside it.")
    return parser.parse_args()


def main() -> None:
    """Run everything and write the page."""
    options = parse()
    results: list[Result] = []
    for family in options.families:
        grid = (options.shapes or GRIDS[options.grid]) if family == "text" else VISION_GRIDS[options.grid]
        for tuning in options.tunings:
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(0)
                build(family, options.width, options.layers).save_pretrained(folder)
                place = (folder, tuning, options.device, options.attention)
                contestants = {name: Contestant(name, *place) for name in ["TRL", *options.variants]}
                for shape in grid:
                    results += compare(contestants, (family, tuning), shape, options)
            write(results, options)
    print(table(results))


if __name__ == "__main__":
    main()

"""The forward passes of one probe: for every row and response family, sums over the response's tokens."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from transformers import PreTrainedModel

from . import probe_measures, upstream
from .probe_measures import OutputHead, TokenStatistics
from .probe_rows import ProbeRows
from .upstream import picture_features as features_of

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclass(frozen=True)
class Reference:
    """
    The reference model of a probe.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model without wrappers.
        forward (`Callable`, *optional*):
            Runs the reference on a dictionary of inputs; by default, calls `model`.
        seen (`dict`, *optional*):
            What it said of the rows, kept from one probe to the next, where its weights never change; by default it
            is asked each time. Of the chosen responses the hidden states are kept, in the memory of the host.
    """

    model: PreTrainedModel
    forward: Callable[[dict[str, Any]], Any] | None = None
    seen: dict[Any, Any] | None = None

    def run(self, inputs: dict[str, Any]) -> None:
        """Run the reference."""
        if self.forward is None:
            self.model(**inputs)
        else:
            self.forward(inputs)


class Passes:
    """
    The forward passes of one probe.

    Args:
        model (`nn.Module`):
            The policy, in the mode to measure it in.
        rows ([`ProbeRows`]):
            What to measure.
        reference ([`Reference`], *optional*):
            Reference model.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Splits the rows over processes and gives the precision.
        prepare_inputs (`Callable`, *optional*):
            Moves inputs to the device; by default, to that of the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: ProbeRows,
        reference: Reference | None,
        accelerator: Any,  # noqa: ANN401
        prepare_inputs: Callable[[dict[str, Any]], dict[str, Any]] | None,
    ) -> None:
        self.model, self.rows, self.reference, self.accelerator = model, rows, reference, accelerator
        self.inner = upstream.unwrapped(model)
        self.prepare_inputs = prepare_inputs or self._to_device
        self.sharded = accelerator is not None and accelerator.distributed_type in SHARDED

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The precision that training runs in."""
        return contextlib.nullcontext() if self.accelerator is None else self.accelerator.autocast()

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        return {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}

    def all_rows(self, families: Sequence[str], batch_size: int) -> list[dict[str, Any]]:
        """
        Measure all rows, on all processes together.

        Args:
            families (`Sequence[str]`):
                Families to run, of `FORWARD_FAMILIES` in `probe_options`; `"chosen"` and `"rejected"` among them.
            batch_size (`int`):
                Rows a forward pass.

        Returns:
            `list[dict]`: For each row its `position` and, by family, `length` (tokens) and the sums over tokens of
            `logp` (nats), `brier` and, given a reference, `reference` (its log p, nats). For `chosen` also of
            `argmax` (log-probability of the greedy token), `entropy`, `total_variation`, `jensen_shannon` and
            `kullback_leibler`, and the lists `confidence` and `correct`, one entry a token.
        """
        accelerator, count = self.accelerator, len(self.rows)
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        # Every rank makes the same number of forwards (sharded models wait for one another): short ranks repeat rows
        mine = [(rank + world * i) % count for i in range(-(-count // world))]
        found: list[dict[str, Any]] = []
        for positions, prompts in self.rows.batches(mine, batch_size):
            measured: list[dict[str, Any]] = [{"position": position} for position in positions]
            features: Any = None
            for family in families:
                inputs = self.prepare_inputs(self.rows.family_inputs(positions, family, prompts))
                features = self._picture_features(inputs) if features is None else features
                values = self._family(inputs, family, tuple(positions), features)
                for row, value in zip(measured, values, strict=True):
                    row[family] = value
            found += measured
        if world > 1:
            found = gather_object(found)
        return [row for _, row in sorted({row["position"]: row for row in found}.items())]

    def _picture_features(self, inputs: dict[str, Any]) -> Any:  # noqa: ANN401 (the model's output class)
        # The same for all families. Where weights are sharded, they are whole within a forward of the model only
        if "pixel_values" not in inputs or self.sharded or not features_of.takes_features(self.inner):
            return None
        return features_of.picture_features(self.inner, inputs)

    def _family(
        self,
        inputs: dict[str, Any],
        family: str,
        positions: tuple[int, ...],
        features: Any,  # noqa: ANN401 (as above)
    ) -> list[dict[str, Any]]:
        mask = inputs["completion_mask"][:, 1:].bool()
        targets = inputs["input_ids"][:, 1:][mask]
        kwargs = {key: value for key, value in inputs.items() if key != "completion_mask"} | {"use_cache": False}
        seen: list[tuple[TokenStatistics, torch.Tensor, OutputHead]] = []
        against: tuple[torch.Tensor, OutputHead] | None = None

        def score(hidden: torch.Tensor, head: OutputHead) -> None:
            # Virtual tokens of prompt learning come first, the real ones are the last
            hidden = hidden[:, -mask.size(1) - 1 :][:, :-1][mask.to(hidden.device)]
            seen.append(
                (probe_measures.token_statistics(hidden, targets.to(hidden.device), head, against), hidden, head)
            )

        reference_logps = None
        if self.reference is not None and family in ("chosen", "rejected"):
            known = None if self.reference.seen is None else self.reference.seen.get((family, positions))
            if known is None:
                with upstream.scoring_forward(self.reference.model, score, copy_head=self.sharded):
                    self.reference.run(kwargs)
                statistics, hidden, head = seen.pop()
                known = statistics.logp, (hidden, head) if family == "chosen" else None
                self._remember(known, family, positions)
            reference_logps, states = known
            against = None if states is None else (states[0].to(mask.device), states[1])
        if features is not None:
            del kwargs["pixel_values"]
            kwargs["mm_encoder_outputs"] = {"image": features}
        with upstream.scoring_forward(self.inner, score):
            self.model(**kwargs)
        return _by_row(seen.pop()[0], mask.sum(dim=1).tolist(), reference_logps, family == "chosen", targets)

    def _remember(self, known: tuple[Any, Any], family: str, positions: tuple[int, ...]) -> None:
        # The head of a sharded reference is gathered for one forward, and too large to keep
        reference, (logps, states) = self.reference, known
        if reference is None or reference.seen is None or (self.sharded and states is not None):
            return
        kept = None if states is None else (states[0].cpu(), states[1])
        reference.seen[family, positions] = (logps.cpu(), kept)


def _by_row(
    statistics: TokenStatistics,
    lengths: list[int],
    reference_logps: torch.Tensor | None,
    chosen: bool,  # noqa: FBT001 (internal)
    targets: torch.Tensor,
) -> list[dict[str, Any]]:
    columns = {
        "logp": statistics.logp,
        "brier": probe_measures.brier_terms(statistics.logp, statistics.sum_of_squares),
        "reference": reference_logps,
    }
    if chosen:
        columns |= {
            "argmax": statistics.top1_logp,
            "entropy": statistics.entropy,
            "total_variation": statistics.total_variation,
            "jensen_shannon": statistics.jensen_shannon,
            "kullback_leibler": statistics.kullback_leibler,
        }
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    cut = {
        name: torch.zeros(len(lengths), dtype=torch.double).index_add_(0, owner, column.double().cpu()).tolist()
        for name, column in columns.items()
        if column is not None
    }
    rows: list[dict[str, Any]] = [
        {"length": max(length, 1), **{name: values[i] for name, values in cut.items()}}
        for i, length in enumerate(lengths)
    ]
    if chosen:
        confidence = statistics.top1_logp.double().exp().cpu().split(lengths)
        correct = (statistics.argmax == targets.to(statistics.argmax.device)).cpu().split(lengths)
        for row, sure, right in zip(rows, confidence, correct, strict=True):
            row["confidence"], row["correct"] = sure.tolist(), right.tolist()
    return rows

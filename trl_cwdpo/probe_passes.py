"""The forward passes of one probe: for every row and response family, sums over the response's tokens."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType, gather_object
from transformers import PreTrainedModel

from . import probe_measures, upstream
from .pictures_once import TEXT_TENSORS
from .prefix_layout import IGNORED, find_layout
from .probe_measures import OutputHead, TokenStatistics
from .probe_rows import ProbeRows
from .shared_prefix import WORTHWHILE, SharedPrefix, relative_cost, row_inputs, row_obstacle
from .upstream import picture_features as features_of
from .upstream.shared_prefix import scored_places

logger = logging.getLogger(__name__)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
PAIR = ("chosen", "rejected")
# Hidden states, and the head that reads them
States = tuple[torch.Tensor, OutputHead]
Scored = tuple[TokenStatistics, States]


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


class PromptSharing:
    """
    Whether the families of a batch may be computed with one prompt, as the trainer's fast path does with pairs.

    The first batch is computed both ways. Where they disagree, or one row for all cannot be run, every family has
    rows of its own from then on. Each process decides for itself: no forward pass here waits for another process.

    Args:
        shared_prefix ([`~trl_cwdpo.shared_prefix.SharedPrefix`]):
            The trainer's, which allows it.
    """

    def __init__(self, shared_prefix: SharedPrefix) -> None:
        self.shared_prefix = shared_prefix
        # By the id of a model without wrappers
        self.verdicts: dict[int, bool] = {}

    def run(
        self,
        model: PreTrainedModel,
        together: Callable[[], list[Scored] | None],
        usual: Callable[[], list[Scored]],
    ) -> list[Scored]:
        """
        Score some families.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                Policy or reference, without wrappers.
            together (`Callable`):
                Scores them with one prompt; returns nothing where a batch does not allow it.
            usual (`Callable`):
                Scores each with its own.

        Returns:
            `list`: Of each, its statistics, and the hidden states and head that they come from.
        """
        verdict = self.verdicts.get(id(model))
        if verdict is not None:
            return (together() if verdict else None) or usual()
        expected = usual()
        try:
            found = together()
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            logger.debug("Probes compute every response with its own prompt: %s", error)
            self.verdicts[id(model)] = False
            return expected
        if found is None:
            return expected
        pairs = zip(found, expected, strict=True)
        differences = torch.cat([(ours.logp - theirs.logp).abs() for (ours, _), (theirs, _) in pairs])
        self.verdicts[id(model)] = differences.double().mean().item() <= self.shared_prefix.tolerance(model)
        return found if self.verdicts[id(model)] else expected


@dataclass(frozen=True)
class _Responses:
    """One family of a batch: the inputs of its forward pass, and the tokens that are scored."""

    kwargs: dict[str, Any]
    # Of shape (B, T): the tokens of the responses, IGNORED elsewhere
    labels: torch.Tensor

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> "_Responses":
        labels = inputs["input_ids"].masked_fill(~inputs["completion_mask"].bool(), IGNORED)
        return cls(
            {key: value for key, value in inputs.items() if key != "completion_mask"} | {"use_cache": False}, labels
        )

    @property
    def mask(self) -> torch.Tensor:
        """Places that predict a token of the response, of shape `(B, T - 1)`."""
        return self.labels[:, 1:] != IGNORED

    @property
    def targets(self) -> torch.Tensor:
        """These tokens, of shape `(N,)`."""
        return self.labels[:, 1:][self.mask]

    def pick(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states that predict them."""
        mask = self.mask.to(hidden.device)
        # Virtual tokens of prompt learning come first, the real ones are the last
        return hidden[:, -mask.size(1) - 1 :][:, :-1][mask]

    def with_features(self, features: Any) -> "_Responses":  # noqa: ANN401 (the model's output class)
        """With the features of pictures, if there are any, in place of the pictures."""
        if features is None:
            return self
        kwargs = {name: value for name, value in self.kwargs.items() if name != "pixel_values"}
        return replace(self, kwargs={**kwargs, "mm_encoder_outputs": {"image": features}})


def _stacked(responses: Sequence[_Responses]) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
    """Some families as one batch: what is said of tokens, labels, and the rest, which is the same for all."""
    width = max(each.labels.size(1) for each in responses)

    def joined(tensors: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
        return torch.cat([F.pad(tensor, (0, width - tensor.size(1)), value=padding) for tensor in tensors])

    first = responses[0].kwargs
    text = {name: joined([each.kwargs[name] for each in responses], 0) for name in TEXT_TENSORS & first.keys()}
    labels = joined([each.labels for each in responses], IGNORED)
    return text, labels, {name: value for name, value in first.items() if name not in text}


def _each(
    model: PreTrainedModel,
    run: Callable[[dict[str, Any]], Any],
    responses: _Responses,
    against: States | None,
    *,
    copy: bool,
) -> Scored:
    seen: list[Scored] = []

    def score(hidden: torch.Tensor, head: OutputHead) -> None:
        hidden = responses.pick(hidden)
        targets = responses.targets.to(hidden.device)
        seen.append((probe_measures.token_statistics(hidden, targets, head, against), (hidden, head)))

    with upstream.scoring_forward(model, score, copy_head=copy):
        run(responses.kwargs)
    return seen.pop()


def _together(
    model: PreTrainedModel,
    run: Callable[[dict[str, Any]], Any],
    responses: Sequence[_Responses],
    against: Sequence[States | None],
) -> list[Scored] | None:
    """Families in one forward pass with one row for all, or nothing where that cannot be or does not pay."""
    text, labels, others = _stacked(responses)
    if row_obstacle(model, {**text, **others}) is not None:
        return None
    layout = find_layout(text["input_ids"], text["attention_mask"], labels, len(responses))
    if isinstance(layout, str) or relative_cost(model, layout) > WORTHWHILE:
        return None
    places = layout.labels(labels)[:, 1:]
    seen: list[Scored] = []

    def score(hidden: torch.Tensor, head: OutputHead) -> None:
        count = len(responses)
        parts = zip(hidden[:, :-1].chunk(count), places.to(hidden.device).chunk(count), against, strict=True)
        for states, targets, given in parts:
            is_token = targets != IGNORED
            picked = states[is_token]
            statistics = probe_measures.token_statistics(picked, targets[is_token], head, given)
            seen.append((statistics, (picked, head)))

    rows = row_inputs(model, layout, text, others)
    with upstream.scoring_forward(model, score), scored_places(model, layout.scored_index):
        run(rows)
    return seen


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
        sharing ([`PromptSharing`], *optional*):
            Lets families share their prompts.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: ProbeRows,
        reference: Reference | None,
        accelerator: Any,  # noqa: ANN401
        prepare_inputs: Callable[[dict[str, Any]], dict[str, Any]] | None,
        sharing: "PromptSharing | None" = None,
    ) -> None:
        self.model, self.rows, self.reference, self.accelerator = model, rows, reference, accelerator
        self.sharing = sharing
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
            # The pictures, which are the same for all families, go to the device once
            pictures = {name: value for name, value in prompts.items() if name not in TEXT_TENSORS}
            prompts = {**prompts, **(self.prepare_inputs(pictures) if pictures else {})}
            inputs = [self.prepare_inputs(self.rows.family_inputs(positions, name, prompts)) for name in families]
            values = self._batch([_Responses.of(each) for each in inputs], families, tuple(positions))
            for place, position in enumerate(positions):
                of_families = {name: of[place] for name, of in zip(families, values, strict=True)}
                found.append({"position": position, **of_families})
        if world > 1:
            found = gather_object(found)
        return [row for _, row in sorted({row["position"]: row for row in found}.items())]

    def _picture_features(self, inputs: dict[str, Any]) -> Any:  # noqa: ANN401 (the model's output class)
        # The same for all families. Where weights are sharded, they are whole within a forward of the model only
        if "pixel_values" not in inputs or self.sharded or not features_of.takes_features(self.inner):
            return None
        return features_of.picture_features(self.inner, inputs)

    def _batch(
        self, responses: list["_Responses"], families: Sequence[str], positions: tuple[int, ...]
    ) -> list[list[dict[str, Any]]]:
        features = self._picture_features(responses[0].kwargs)
        known = self._of_reference(responses, families, positions)
        against = [states for _, states in known]
        inputs = [each.with_features(features) for each in responses]
        found = self._scored(self.inner, lambda rows: self.model(**rows), inputs, against)
        return [
            _by_row(statistics, each.mask.sum(dim=1).tolist(), logps, family == "chosen", each.targets)
            for (statistics, _), each, (logps, _), family in zip(found, responses, known, families, strict=True)
        ]

    def _of_reference(
        self, responses: list["_Responses"], families: Sequence[str], positions: tuple[int, ...]
    ) -> list[tuple[torch.Tensor | None, States | None]]:
        # Log-probabilities and, of chosen responses, what whole distributions are computed from
        reference, nothing = self.reference, (None, None)
        if reference is None:
            return [nothing] * len(families)
        # Log-ratios are those of pairs
        seen = {} if reference.seen is None else reference.seen
        known: dict[str, Any] = {family: seen.get((family, positions)) for family in families if family in PAIR}
        if any(each is None for each in known.values()):
            # In the very way of the policy, other families included, so that equal models come to equal numbers
            asked = families if self._may_share(reference.model) else list(known)
            theirs = [responses[families.index(family)] for family in asked]
            found = self._scored(reference.model, reference.run, theirs, [None] * len(asked), copy=self.sharded)
            for family, (statistics, states) in zip(asked, found, strict=True):
                if family in known:
                    known[family] = statistics.logp, states if family == "chosen" else None
                    self._remember(known[family], family, positions)
        device = responses[0].labels.device
        said = (known.get(family, nothing) for family in families)
        return [(logps, states and (states[0].to(device), states[1])) for logps, states in said]

    def _scored(
        self,
        model: PreTrainedModel,
        run: Callable[[dict[str, Any]], Any],
        responses: list["_Responses"],
        against: Sequence[States | None],
        *,
        copy: bool = False,
    ) -> list[Scored]:
        def usual() -> list[Scored]:
            return [_each(model, run, one, given, copy=copy) for one, given in zip(responses, against, strict=True)]

        if self.sharing is None or self.sharded:
            return usual()
        return self.sharing.run(model, lambda: _together(model, run, responses, against), usual)

    def _may_share(self, model: PreTrainedModel) -> bool:
        return self.sharing is not None and not self.sharded and self.sharing.verdicts.get(id(model), True)

    def _remember(self, known: tuple[torch.Tensor, States | None], family: str, positions: tuple[int, ...]) -> None:
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

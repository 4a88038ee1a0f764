"""Where the tokens of preference pairs stand when a pair is one row: [prompt | longer side | shorter side].

Pure tensor arithmetic. A batch of `B` pairs comes as `2B` rows of `T` tokens, the chosen ones first, padded on the
right. Prompts, chosen and rejected responses are cut out of it and put into `B` rows of three blocks, each padded on
the right to the longest of the batch. The side whose block is longer comes first, so that the shapes alone tell the
blocks apart. [`PrefixLayout`] goes there and back.

Prompts may have more than two responses: K sides come as `KB` rows and make blocks as wide as the widest, but for the
last and shortest one, which keeps its width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

IGNORED = -100


@dataclass(frozen=True)
class PrefixLayout:
    """
    The layout of one batch of `B` pairs, or of `B` prompts with K responses.

    Args:
        prompt_lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of each prompt, at least 1.
        lengths (`torch.Tensor` of shape `(K, B)`):
            Tokens of each chosen and each rejected response, at least 1.
        length (`int`):
            T, columns of the batch as it came.
        prompt (`int`):
            P, the width of the block of prompts.
        sides (`tuple[int, ...]` of length K):
            Tokens of the longest chosen and of the longest rejected response.
        padded_prompts (`bool`):
            Whether prompts differ in length.
        tokens (`int`):
            Tokens of all prompts and responses, each prompt counted once.
    """

    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    length: int
    prompt: int
    sides: tuple[int, ...]
    padded_prompts: bool
    tokens: int

    @property
    def pairs(self) -> int:
        """B."""
        return len(self.prompt_lengths)

    @property
    def width(self) -> int:
        """N, tokens of a row."""
        return self.prompt + max(self.sides) * (len(self.sides) - 1) + min(self.sides)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        # The longest side comes first
        order = sorted(range(len(self.sides)), key=lambda side: -self.sides[side])
        return tuple(self.prompt + max(self.sides) * order.index(side) for side in range(len(order)))

    @property
    def used(self) -> torch.Tensor:
        """Of each column of the rows whether it holds a token, `torch.Tensor` of shape `(B, N)`, bool."""
        return self._place[2]

    @property
    def side_of_column(self) -> torch.Tensor:
        """-1 for the prompt, 0 for the chosen, 1 for the rejected response …, `torch.Tensor` of shape `(N,)`."""
        return self._place[0]

    def _columns(self, width: int) -> torch.Tensor:
        return torch.arange(width, device=self.prompt_lengths.device)

    @cached_property
    def _place(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Of each column of a row: its side (-1 for the prompt), the place within its block, whether it holds a token
        column = self._columns(self.width)
        side = torch.full_like(column, -1)
        place = column.clone()
        for index, start in enumerate(self._starts):
            block = slice(start, min(start + max(self.sides), self.width))
            side[block], place[block] = index, column[: block.stop - start]
        limits = torch.cat([self.lengths, self.prompt_lengths.unsqueeze(0)])  # side -1 is the last
        return side, place, place < limits[side].transpose(0, 1)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        Tokens of the batch, or anything said of each of them, as rows.

        Args:
            tensor (`torch.Tensor` of shape `(KB, T)`):
                As the collator returns it. Padding takes the value of the first chosen token.

        Returns:
            `torch.Tensor` of shape `(B, N)`.
        """
        return torch.cat(tensor.chunk(len(self.sides)), dim=1).gather(1, self._origin)

    @cached_property
    def _origin(self) -> torch.Tensor:
        # Of each column of a row: its column in [chosen row | rejected row | …]
        side, place, used = self._place
        prompt = self.prompt_lengths.unsqueeze(1)
        index = torch.where(side < 0, place, prompt + place) + self.length * side.clamp(min=0)
        return torch.where(used, index, prompt)

    def positions(self, prompt_positions: torch.Tensor | None = None) -> torch.Tensor:
        """
        Position ids of the rows, which go on from the prompt for either side.

        Args:
            prompt_positions (`torch.Tensor` of shape `(axes, B, T)`, *optional*):
                Positions of `[prompt | chosen]` where they are more than a count, as in multi-axis RoPE.

        Returns:
            `torch.Tensor` of shape `(B, N)` or `(axes, B, N)`.
        """
        side, place, used = self._place
        prompt = self.prompt_lengths.unsqueeze(1)
        in_prompt = side < 0
        if prompt_positions is None:
            return torch.where(used, torch.where(in_prompt, place, prompt + place), prompt)
        first = prompt_positions.gather(2, prompt.expand(len(prompt_positions), -1, -1))
        of_prompt = prompt_positions[..., place.clamp(max=self.length - 1)]
        positions = torch.where(in_prompt, of_prompt, first + place)
        return torch.where(used, positions, first)

    @cached_property
    def side_mask(self) -> torch.Tensor:
        """
        What the longest side may attend to; its first rows and columns are what a shorter side may.

        Returns:
            `torch.Tensor` of shape `(B, 1, M, P + M)`, bool, columns being the prompt and the side itself, with M the
            longest side. The first dimension is 1 where no prompt is padded.
        """
        width = max(self.sides)
        causal = torch.ones(width, width, dtype=torch.bool, device=self.prompt_lengths.device).tril()
        prompts = self._columns(self.prompt) < self.prompt_lengths.unsqueeze(1)
        if not self.padded_prompts:
            prompts = prompts[:1]
        prompts = prompts[:, None, None, :].expand(-1, 1, width, -1)
        return torch.cat([prompts, causal.expand(len(prompts), 1, -1, -1)], dim=-1)

    def dense_mask(self) -> torch.Tensor:
        """
        What each token of a row may attend to.

        Returns:
            `torch.Tensor` of shape `(B, 1, N, N)`, bool.
        """
        side, _, _ = self._place
        column = self._columns(self.width)
        causal = column.unsqueeze(1) >= column
        own = side.unsqueeze(1) == side
        prompts = (side < 0) & (column < self.prompt_lengths.unsqueeze(1))  # (B, N)
        return (causal & (prompts.unsqueeze(1) | (own & (side >= 0)))).unsqueeze(1)

    @cached_property
    def _before_response(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Counts 0 (last token of the prompt), 1, … (response); of each of KB rows whether it exists, and its prompt
        count = self._columns(1 + max(self.sides))
        return count, count <= self.lengths.reshape(-1, 1), self._prompts

    @property
    def _prompts(self) -> torch.Tensor:
        # Their lengths once for each response, of shape (KB, 1)
        return self.prompt_lengths.repeat(len(self.sides)).unsqueeze(1)

    @cached_property
    def scored_index(self) -> torch.Tensor:
        """
        The places that predict responses: the last token of the prompt, and the response.

        Returns:
            `torch.Tensor` of shape `(KB, 1 + M)`, indices into rows laid end to end.
        """
        count, exists, prompt = self._before_response
        starts = torch.tensor(self._starts, device=count.device).repeat_interleave(self.pairs).unsqueeze(1)
        place = torch.where(exists & (count > 0), starts + count - 1, prompt - 1)
        return place + self.width * self._columns(self.pairs).repeat(len(self.sides)).unsqueeze(1)

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """
        Labels of the places of [`~PrefixLayout.scored_index`].

        Args:
            labels (`torch.Tensor` of shape `(KB, T)`):
                Labels of the batch as it came.

        Returns:
            `torch.Tensor` of shape `(KB, 1 + M)`, -100 where there is no response.
        """
        count, exists, prompt = self._before_response
        index = (prompt - 1 + count).clamp(max=self.length - 1)
        return labels.gather(1, index).masked_fill(~exists, IGNORED)

    def restore(self, per_token: torch.Tensor) -> torch.Tensor:
        """
        Values of the scored places, as the usual forward pass returns them.

        Args:
            per_token (`torch.Tensor` of shape `(KB, M)`):
                Value of each token of the responses.

        Returns:
            `torch.Tensor` of shape `(KB, T - 1)`, zero outside the responses.
        """
        place, elsewhere = self._restored
        return per_token.gather(1, place).masked_fill(elsewhere, 0)

    @cached_property
    def _restored(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Of each of T - 1 places: which of the scored ones it is, and whether it is none
        place = self._columns(self.length - 1) - (self._prompts - 1)
        elsewhere = (place < 0) | (place >= self.lengths.reshape(-1, 1))
        return place.clamp(min=0, max=max(self.sides) - 1), elsewhere

    def relative_cost(
        self, hidden_size: int, intermediate_size: int, head_size: float = 0.0, width: float | None = None
    ) -> float:
        """
        Estimated arithmetic of decoder and head on the rows, relative to that on the batch as it came.

        Args:
            hidden_size (`int`):
                Width of the decoder.
            intermediate_size (`int`):
                Width of its feed-forward layers.
            head_size (`float`, *optional*, defaults to 0):
                Width of the head, divided by the number of layers, where the usual way scores every token.
            width (`float`, *optional*):
                Tokens of a row, if not N.

        Returns:
            `float`.
        """
        per_token = 8 * hidden_size**2 + 6 * hidden_size * intermediate_size
        per_score = 2 * hidden_size * head_size
        longer, shorter, sides = max(self.sides), min(self.sides), len(self.sides)
        seen = self.prompt**2 / 2 + longer * (self.prompt + longer) * (sides - 1) + shorter * (self.prompt + shorter)
        ours = (width or self.width) * per_token + sides * (1 + longer) * per_score + 4 * hidden_size * seen
        # Causal attention computes half of what it could see
        usual = self.length * (per_token + per_score) + 4 * hidden_size * self.length**2 / 2
        return ours / (sides * usual)


class PackedRows:
    """
    The rows of a layout laid end to end in one row, without their padding: pairs attend to nothing of each other.

    Stands in for the layout where attention takes a function of two places as its mask.

    Args:
        layout ([`PrefixLayout`]):
            Layout of the batch.
        multiple (`int`, *optional*, defaults to 128):
            The row is padded to a multiple of it, so that kernels see few different lengths.
    """

    def __init__(self, layout: PrefixLayout, multiple: int = 128) -> None:
        self.layout, self.pairs = layout, layout.pairs
        self.restore, self.labels = layout.restore, layout.labels
        used = layout.used.flatten()
        # Tokens keep their order, so a stable sort puts padding behind them without asking for their number
        order = torch.sort((~used).byte(), stable=True).indices
        self.length = -(-layout.tokens // multiple) * multiple
        spare = max(0, self.length - len(order))
        self._kept = torch.cat([order, order[-1:].expand(spare)])[: self.length]
        place = used.cumsum(0) - 1
        self.scored_index = place[layout.scored_index]
        pair = torch.arange(layout.pairs, device=used.device).repeat_interleave(layout.width)
        side = layout.side_of_column.repeat(layout.pairs)
        is_padding = torch.arange(self.length, device=used.device) >= layout.tokens
        self._pair = pair[self._kept].masked_fill(is_padding, layout.pairs)
        self._side = side[self._kept]
        self._mask: Any = None

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        Tokens of the batch, or anything said of each of them, as one row.

        Args:
            tensor (`torch.Tensor` of shape `(2B, T)`):
                As the collator returns it. Padding takes values that padding of the layout's rows has, or none.

        Returns:
            `torch.Tensor` of shape `(1, length)`.
        """
        return self._pack(self.layout.rows(tensor))

    def positions(self, prompt_positions: torch.Tensor | None = None) -> torch.Tensor:
        """Position ids of the row, of shape `(1, length)` or `(axes, 1, length)`; see [`PrefixLayout.positions`]."""
        return self._pack(self.layout.positions(prompt_positions))

    def _pack(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.flatten(-2)[..., self._kept].unsqueeze(-2)

    def attends(self) -> Callable[..., torch.Tensor]:
        """
        What each place may attend to: its pair's prompt and its own side, up to itself.

        Returns:
            `Callable` of batch, head, place and place attended to, as FlexAttention takes it.
        """
        pair, side = self._pair, self._side

        def mask(_batch: Any, _head: Any, place: Any, seen: Any) -> torch.Tensor:  # noqa: ANN401 (tensors or traced)
            own = (side[seen] < 0) | (side[seen] == side[place])
            return (seen <= place) & (pair[seen] == pair[place]) & own

        return mask

    def mask(self, build: Callable[[Callable[..., torch.Tensor], int], Any]) -> Any:  # noqa: ANN401 (of the kernel)
        """What `build` makes of [`~PackedRows.attends`] and the length, once for policy and reference."""
        if self._mask is None:
            self._mask = build(self.attends(), self.length)
        return self._mask

    def relative_cost(self, hidden_size: int, intermediate_size: int, head_size: float = 0.0) -> float:
        """As [`PrefixLayout.relative_cost`], without the padding."""
        return self.layout.relative_cost(hidden_size, intermediate_size, head_size, self.length / self.layout.pairs)


def find_layout(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor, sides: int = 2
) -> PrefixLayout | str:
    """
    The layout of a batch.

    Args:
        input_ids (`torch.Tensor` of shape `(KB, T)`):
            Tokens, chosen rows first.
        attention_mask (`torch.Tensor` of shape `(KB, T)`, *optional*):
            Zero on padding.
        labels (`torch.Tensor` of shape `(KB, T)`):
            -100 outside the responses.
        sides (`int`, *optional*, defaults to `2`):
            K, responses to each prompt.

    Returns:
        [`PrefixLayout`], or why the pairs of this batch do not share a prefix.
    """
    if attention_mask is None or attention_mask.shape != input_ids.shape or len(input_ids) % sides:
        return "it is no batch of pairs with a padding mask"
    column = torch.arange(input_ids.size(1), device=input_ids.device)
    response = labels != IGNORED
    lengths, used = response.sum(dim=1), attention_mask.sum(dim=1)
    prompts = used - lengths
    before_end = column < used.unsqueeze(1)
    regular = (attention_mask.bool() == before_end) & (response == (before_end & (column >= prompts.unsqueeze(1))))
    chosen, *others = input_ids.chunk(sides)
    prompts, *their_prompts = prompts.chunk(sides)
    in_response = column >= prompts.unsqueeze(1)
    same = [
        (((chosen == other) | in_response).all() & (prompts == theirs).all())
        for other, theirs in zip(others, their_prompts, strict=True)
    ]
    widths = [prompts.max(), prompts.min(), lengths.min(), *lengths.reshape(sides, -1).amax(dim=1)]
    tokens = prompts.sum() + lengths.sum()
    checks = [regular.all(), torch.stack(same).all()]
    # All that the host needs to know, in one transfer
    found = torch.stack([tokens, *(check.long() for check in checks), *widths]).tolist()
    total, is_regular, is_same, longest, shortest, shortest_side, *of_sides = map(int, found)
    if not is_regular:
        return "its rows are not a prompt and a response, padded on the right"
    if not is_same:
        return "the prompts of chosen and rejected rows differ, as when `truncation_mode='keep_end'` cuts them"
    if not shortest or not shortest_side:
        return "a prompt or a response is empty"
    uneven = longest != shortest
    return PrefixLayout(prompts, lengths.reshape(sides, -1), len(column), longest, tuple(of_sides), uneven, total)

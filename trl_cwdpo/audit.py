"""Read preference data before it is trained on, and say what is wrong with it: pure functions of rows.

An error is what stops a run or makes it train on less than the data seems to hold; a warning is left out in training
or makes the result worse; a note is only worth knowing.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist, mean, median
from typing import Any, Literal

from .data import UnusablePairError, excerpt, pair_problem, response_text, with_image_list
from .pair_checks import pair_fault
from .stored_pictures import picture_fault

Severity = Literal["error", "warning", "note"]

ROWS_KEPT = 10
# From here on, the length of a response alone tells well which one is chosen
BIASED_SHARE = 0.6
SIGNIFICANT = 0.01
SEVERITY_OF_PROBLEMS: dict[str, Severity] = {
    "empty chosen response": "error",
    "empty rejected response": "error",
    "identical responses": "warning",
}


@dataclass
class Finding:
    """
    One kind of defect.

    Args:
        severity (`str`):
            `"error"`, `"warning"` or `"note"`.
        name (`str`):
            What it is.
        count (`int`):
            How many rows have it.
        rows (`list[int]`):
            Numbers of the first of them.
        example (`str`):
            The offending value, the reason, or what follows from it, of the first row.
    """

    severity: Severity
    name: str
    count: int
    rows: list[int]
    example: str = ""


@dataclass
class LengthBias:
    """
    Whether the length of a response tells which one is chosen.

    Args:
        unit (`str`):
            `"characters"` or `"tokens"`.
        mean_chosen (`float`):
            Mean length of chosen responses.
        mean_rejected (`float`):
            Mean length of rejected responses.
        chosen_longer (`float`):
            Share of pairs whose chosen response is the longer one, among those that differ in length.
        p_value (`float`):
            Of a two-sided sign test (normal approximation).
    """

    unit: str
    mean_chosen: float
    mean_rejected: float
    chosen_longer: float
    p_value: float

    @property
    def is_biased(self) -> bool:
        """Whether one of the sides is longer far too often for chance."""
        return max(self.chosen_longer, 1 - self.chosen_longer) >= BIASED_SHARE and self.p_value < SIGNIFICANT


@dataclass
class Quantities:
    """
    Minimum, median, mean and maximum of some numbers.

    Args:
        minimum (`float`):
            Smallest.
        median (`float`):
            Middle one.
        mean (`float`):
            Average.
        maximum (`float`):
            Largest.
    """

    minimum: float
    median: float
    mean: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quantities":
        """Of one or more values."""
        return cls(min(values), median(values), mean(values), max(values))


@dataclass
class AuditReport:
    """
    What an audit found.

    Args:
        rows (`int`):
            Rows read.
        usable_pairs (`int`):
            Rows that can be trained on.
        findings (`list[Finding]`):
            Defects, the worst first.
        images_per_row (`dict[int, int]`):
            How many rows have how many pictures.
        distinct_prompts (`int`):
            Prompts that differ, in text or pictures.
        length_bias (`list[LengthBias]`):
            In characters and, where a model is known, in tokens.
        tokens (`dict[str, Quantities]`):
            Lengths of `prompt` (with its image tokens), `chosen`, `rejected`, and the longest `sequence` of a pair.
    """

    rows: int
    usable_pairs: int
    findings: list[Finding]
    images_per_row: dict[int, int]
    distinct_prompts: int
    length_bias: list[LengthBias] = field(default_factory=list)
    tokens: dict[str, Quantities] = field(default_factory=dict)

    @property
    def has_errors(self) -> bool:
        """Whether any finding is an error."""
        return any(finding.severity == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"has_errors": self.has_errors, **asdict(self)}

    def sort(self) -> None:
        """Put the worst findings first."""
        order = ("error", "warning", "note")
        self.findings.sort(key=lambda finding: (order.index(finding.severity), -finding.count))


class _Findings:
    def __init__(self) -> None:
        self.found: dict[str, Finding] = {}

    def add(self, severity: Severity, name: str, row: int, example: str = "") -> None:
        finding = self.found.setdefault(name, Finding(severity, name, 0, [], example))
        finding.count += 1
        if len(finding.rows) < ROWS_KEPT:
            finding.rows.append(row)


def audit_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[AuditReport, list[int]]:
    """
    Audit rows without a model.

    Args:
        rows (`Iterable[dict]`):
            Rows with `chosen`, `rejected`, usually `prompt`, and `images` or `image`, not decoded (`bytes`, `path`).

    Returns:
        `tuple`: the report, and the numbers of the rows that can be trained on.
    """
    findings, usable, count = _Findings(), [], 0
    images_per_row: Counter[int] = Counter()
    seen: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    lengths: list[tuple[int, int]] = []
    for index, source in enumerate(rows):
        count += 1
        try:
            row = with_image_list(dict(source))
        except UnusablePairError as error:
            findings.add("error", "malformed row", index, str(error))
            continue
        images = row.get("images") or []
        images_per_row[len(images)] += 1
        if _audit_row(row, images, index, findings):
            usable.append(index)
            chosen, rejected = response_text(row["chosen"]), response_text(row["rejected"])
            lengths.append((len(chosen), len(rejected)))
            seen[_prompt_key(row, images)].append((index, chosen, rejected))
    _audit_prompts(seen, findings)
    report = AuditReport(count, len(usable), list(findings.found.values()), dict(images_per_row), len(seen))
    if not usable:
        report.findings.append(Finding("error", "no usable pair", count, [], "there is nothing to train on"))
    elif bias := length_bias(lengths, "characters"):
        report.length_bias.append(bias)
        if bias.is_biased:
            report.findings.append(_bias_finding(bias, len(lengths)))
    report.sort()
    return report, usable


def _audit_row(row: Mapping[str, Any], images: Sequence[Any], index: int, findings: _Findings) -> bool:
    """Whether a row can be trained on; what is wrong with it goes to the findings."""
    faults: list[str] = []
    fault = pair_fault(row, len(images) if "images" in row else None)
    if fault is not None:
        findings.add("error", "malformed row", index, fault)
        return False
    if "prompt" in row and not any(text for _, text in _turns(row["prompt"])):
        findings.add("error", "empty prompt", index)
        faults.append("prompt")
    problem = pair_problem(row.get("chosen"), row.get("rejected"))
    if problem is not None:
        example = excerpt(repr(row.get("chosen")))
        findings.add(SEVERITY_OF_PROBLEMS.get(problem, "error"), problem, index, f"chosen is {example}")
        faults.append(problem)
    for image in images:
        reason = picture_fault(image)
        if reason is not None:
            findings.add("error", "unreadable image", index, excerpt(reason))
            faults.append(reason)
            break
    return not faults


def _turns(prompt: Any) -> list[tuple[str, str]]:  # noqa: ANN401 (either format, or what should be one)
    """Role and text of each message of a prompt."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return [(str(message.get("role")), response_text([message])) for message in messages if message]


def _prompt_key(row: Mapping[str, Any], images: Sequence[Any]) -> str:
    """What two rows share if they ask the same thing about the same pictures."""
    digest = hashlib.blake2b(repr(_turns(row.get("prompt"))).encode(), digest_size=16)
    for image in images:
        if isinstance(image, Mapping):
            digest.update(image["bytes"] if image.get("bytes") is not None else str(image["path"]).encode())
        else:
            digest.update(image.tobytes())
    return digest.hexdigest()


def _audit_prompts(seen: Mapping[str, Sequence[tuple[int, str, str]]], findings: _Findings) -> None:
    """Compare the pairs of each prompt with one another."""
    for pairs in seen.values():
        if len(pairs) < 2:
            continue
        first: dict[tuple[str, str], int] = {}
        rejected = {text: index for index, _, text in reversed(pairs)}
        for index, chosen_text, rejected_text in pairs:
            pair = (chosen_text, rejected_text)
            if pair in first:
                findings.add("warning", "repeated pair", index, f"the same as row {first[pair]}")
                continue
            first[pair] = index
            if chosen_text in rejected:
                reason = f"its chosen response is the rejected one of row {rejected[chosen_text]}"
                findings.add("warning", "contradicting label", index, reason)
        if len(first) > 1:
            findings.add("note", "prompt with several pairs", pairs[0][0], f"{len(first)} pairs")


def length_bias(lengths: Sequence[tuple[float, float]], unit: str) -> LengthBias | None:
    """
    Compare the lengths of chosen and rejected responses.

    Args:
        lengths (`list[tuple[float, float]]`):
            Lengths of both responses of each pair, the chosen one first.
        unit (`str`):
            What they are counted in.

    Returns:
        `LengthBias`, or `None` without pairs.
    """
    if not lengths:
        return None
    longer = sum(chosen > rejected for chosen, rejected in lengths)
    different = sum(chosen != rejected for chosen, rejected in lengths)
    share = longer / different if different else 0.5
    # With continuity correction; a sign test needs no more than this for data sets of any size worth training on
    score = max(abs(longer - different / 2) - 0.5, 0) / math.sqrt(different / 4) if different else 0.0
    p_value = 2 * (1 - NormalDist().cdf(score))
    chosen_mean, rejected_mean = (mean(side) for side in zip(*lengths, strict=True))
    return LengthBias(unit, chosen_mean, rejected_mean, share, p_value)


def _bias_finding(bias: LengthBias, pairs: int) -> Finding:
    side, share = ("chosen", bias.chosen_longer) if bias.chosen_longer > 0.5 else ("rejected", 1 - bias.chosen_longer)
    reason = f"the {side} response is the longer one in {100 * share:.0f} % of pairs: length alone tells the label"
    return Finding("warning", "length bias", pairs, [], reason)


def audit_lengths(
    report: AuditReport,
    rows: Sequence[int],
    lengths: Sequence[tuple[int, int, int]],
    max_length: int | None,
    images_cut: Iterable[int] = (),
) -> None:
    """
    Add what the lengths in tokens tell to a report.

    Args:
        report ([`AuditReport`]):
            Changed in place.
        rows (`list[int]`):
            Numbers of the usable rows.
        lengths (`list[tuple[int, int, int]]`):
            Tokens of prompt, chosen and rejected response of each of them.
        max_length (`int`, *optional*):
            Tokens that training keeps of a prompt with its response.
        images_cut (`Iterable[int]`, *optional*):
            Numbers of the rows that lose image tokens at this length.
    """
    if not lengths:
        return
    columns = [list(column) for column in zip(*lengths, strict=True)]
    columns.append([prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths])
    names = ("prompt", "chosen", "rejected", "sequence")
    report.tokens = {name: Quantities.of(column) for name, column in zip(names, columns, strict=True)}
    if bias := length_bias([(chosen, rejected) for _, chosen, rejected in lengths], "tokens"):
        report.length_bias.append(bias)
    if max_length is not None:
        findings, cut = _Findings(), set(images_cut)
        for row, (prompt, chosen, rejected) in zip(rows, lengths, strict=True):
            length = f"{prompt + max(chosen, rejected)} tokens, of which {prompt} are the prompt's"
            if row in cut:
                findings.add("warning", "image tokens cut off", row, length)
            if prompt >= max_length:
                findings.add("warning", "no response token left", row, length)
            elif prompt + max(chosen, rejected) > max_length:
                findings.add("note", "response cut off", row, length)
        report.findings += findings.found.values()
        report.usable_pairs -= sum(prompt >= max_length for prompt, _, _ in lengths)
        if report.usable_pairs <= 0 and not any(finding.name == "no usable pair" for finding in report.findings):
            report.findings.append(Finding("error", "no usable pair", report.rows, [], f"at max_length {max_length}"))
    report.sort()

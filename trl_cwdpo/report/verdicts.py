"""What a run's probes say, in plain words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trl_cwdpo.probe_flags import ADVICE, MEANINGS
from trl_cwdpo.probe_measures import Interval
from trl_cwdpo.probe_records import ProbeRecord
from trl_cwdpo.report.tracks import Track
from trl_cwdpo.signal_thresholds import DEFAULTS, SignalThresholds
from trl_cwdpo.signals import diagnose, is_still, raised_flags, settled

FAMILY_NAMES = {
    "chosen": "chosen",
    "rejected": "rejected, all",
    "rejected_hard": "rejected, hard",
    "rejected_easy": "rejected, easy",
    "rephrase": "rephrased",
    "mismatched": "another row's chosen",
    "shuffled": "chosen, shuffled",
    "argmax": "greedy tokens",
}
# Tone of a verdict: what a reader sees first
GOOD, WATCH, BAD, NEUTRAL = "good", "watch", "bad", "neutral"


@dataclass(frozen=True)
class FlagHistory:
    """
    When a flag was raised.

    Args:
        name (`str`):
            The flag.
        meaning (`str`):
            What it means.
        first_step (`int`):
            Step of the first probe that raised it.
        probes (`int`):
            How many probes raised it.
        of (`int`):
            How many probes there are.
        is_raised (`bool`):
            Whether the last probe raises it.
        reason (`str`):
            What the last probe that raised it says.
        advice (`str`):
            What to change.
    """

    name: str
    meaning: str
    first_step: int
    probes: int
    of: int
    is_raised: bool
    reason: str
    advice: str

    def __str__(self) -> str:
        """A sentence."""
        when = "raised by the last probe" if self.is_raised else "not raised any more"
        return (
            f"{self.meaning[0].upper()}{self.meaning[1:]}. First at step {self.first_step}, in {self.probes} of "
            f"{self.of} probes, {when}."
        )


@dataclass(frozen=True)
class Verdict:
    """
    What is to be said of one training.

    Args:
        title (`str`):
            The diagnosis.
        tone (`str`):
            `"good"`, `"watch"`, `"bad"` or `"neutral"`.
        advice (`str`):
            What to do.
        reason (`str`):
            The numbers it rests on.
        sentences (`tuple[str, ...]`):
            What happened, one sentence each.
        flags (`tuple[FlagHistory, ...]`):
            The flags that were raised.
        missing (`tuple[str, ...]`):
            What the run did not record, and how to get it.
    """

    title: str
    tone: str
    advice: str
    reason: str
    sentences: tuple[str, ...] = ()
    flags: tuple[FlagHistory, ...] = ()
    missing: tuple[str, ...] = ()


def judge(track: Track, thresholds: SignalThresholds | None = None) -> Verdict:
    """
    Say what happened in a training.

    Args:
        track ([`~trl_cwdpo.report.tracks.Track`]):
            The training.
        thresholds ([`~trl_cwdpo.signal_thresholds.SignalThresholds`], *optional*):
            The numbers of the rules; by default, those of the run.

    Returns:
        [`Verdict`].
    """
    thresholds = thresholds or track.thresholds
    missing = tuple(_missing(track))
    if len(track.records) < 2:
        title = "not probed" if not track.records else "one probe only"
        advice = "Without a second probe nothing can be said about what training changes."
        return Verdict(title, NEUTRAL, advice, "", missing=missing)
    flags = tuple(flag_history(track.records, thresholds))
    sentences = tuple(_sentences(track.records[0], track.records[-1], thresholds))
    raised = [flag for flag in flags if flag.is_raised]
    if track.is_supervised:
        return Verdict(*_of_stage_1(track.records[-1], raised, thresholds), "", sentences, flags, missing)
    diagnosis = diagnose(track.records[-1], thresholds)
    undecided = WATCH if raised else NEUTRAL
    tones = {"healthy": WATCH if raised else GOOD, "unclear": undecided, "nothing moved yet": undecided}
    tone = tones.get(diagnosis.name, BAD)
    advice = diagnosis.advice
    if raised and diagnosis.name == "unclear":
        advice = f"The families follow no known pattern; by the flags: {_advice(raised)}"
    return Verdict(diagnosis.name, tone, advice, diagnosis.reason, sentences, flags, missing)


def _of_stage_1(
    last: ProbeRecord, raised: Sequence[FlagHistory], thresholds: SignalThresholds
) -> tuple[str, str, str]:
    # Title, tone and advice; the table of diagnoses is about pairs
    if raised:
        names = [flag.name for flag in raised]
        return f"flags: {', '.join(names)}", BAD if "drift" in names else WATCH, _advice(raised)
    if is_still(last, thresholds):
        advice = "If the model was to learn something here, train for more steps or raise `learning_rate`."
        return "nothing moved yet", NEUTRAL, advice
    return "no flags", GOOD, "Go on with stage 2."


def _advice(raised: Sequence[FlagHistory]) -> str:
    return " ".join(f"{flag.name[0].upper()}{flag.name[1:]}: {flag.advice}" for flag in raised)


def flag_history(records: Sequence[ProbeRecord], thresholds: SignalThresholds = DEFAULTS) -> list[FlagHistory]:
    """
    Every flag that some probe of a run raised, in order of appearance.

    Args:
        records (`Sequence[ProbeRecord]`):
            All probes of the run.
        thresholds ([`~trl_cwdpo.signal_thresholds.SignalThresholds`], *optional*):
            The numbers of the rules.

    Returns:
        `list[FlagHistory]`.
    """
    raised = [(records[end], raised_flags(records[: end + 1], thresholds)) for end in range(len(records))]
    histories = []
    for name in dict.fromkeys(name for _, flags in raised for name in flags):
        found = [(record.step, flags[name]) for record, flags in raised if name in flags]
        histories.append(
            FlagHistory(
                name=_words(name),
                meaning=MEANINGS[name],
                first_step=found[0][0],
                probes=len(found),
                of=len(records),
                is_raised=name in raised[-1][1],
                reason=found[-1][1],
                advice=ADVICE[name],
            )
        )
    return histories


def _words(name: str) -> str:
    return name.replace("_", " ")


def _missing(track: Track) -> list[str]:
    lines = []
    if not track.records:
        lines.append(
            "No probes were taken, so there is no diagnosis, and no curve of what training does to each kind of "
            "response. Give the trainer an `eval_dataset` (with `trl-cwdpo`: a test split, or `eval_rows`); for a "
            "trainer of TRL's, add `trainer.add_callback(DeltaLogpProbeCallback(trainer, held_out_pairs))`."
        )
    elif not track.examples:
        lines.append("The texts and pictures of the probed rows were not saved; runs of this version save them.")
    if not track.log:
        lines.append(
            "No training log was found, so there is no loss and no gradient norm. Call `trainer.save_state()` after "
            "training, or let the trainer save checkpoints."
        )
    if not track.options:
        lines.append("The options of the run were not recorded. `trl-cwdpo` and the probes record them.")
    return lines


def _sentences(first: ProbeRecord, last: ProbeRecord, thresholds: SignalThresholds) -> list[str]:
    chosen, rejected = last.delta0("chosen"), last.delta0("rejected")
    lines = []
    if chosen is not None:
        lines.append(f"Chosen responses {_change(chosen)}.")
    if rejected is not None:
        lines.append(f"Rejected responses {_change(rejected)}{_by_hardness(last)}.")
    lines.append(_margin(first, last))
    if last.weight is not None:
        before = "" if first.weight is None else f" (at first {first.weight:.2f})"
        trained = "" if last.trained_weight is None else f", of the pairs trained on {last.trained_weight:.2f}"
        share = settled(last, thresholds).easy_fraction
        easy = f"; {share:.0%} of the negatives are easy (w < {thresholds.easy_weight:.3g})" if share else ""
        lines.append(f"The mean cooling weight is {last.weight:.2f}{before}{trained}{easy}.")
    elif last.loser_share is not None:
        lines.append("No cooling weights were at work.")
    lines.append(_calibration(first, last))
    return lines


def _change(delta: Interval) -> str:
    """A change of average log-probability, in nats and as a factor for each token."""
    if abs(delta.mean) < 5e-4:
        return f"stayed where they were (Δ {delta.mean:+.4f} nats per token)"
    factor = math.expm1(delta.mean)
    word = "gained" if delta.mean > 0 else "lost"
    surely = "" if delta.low > 0 or delta.high < 0 else ", which may be chance"
    return (
        f"{word} {abs(delta.mean):.3f} nats per token (95 % interval {delta.low:+.3f} to {delta.high:+.3f}): each "
        f"token became {abs(factor):.1%} {'likelier' if factor > 0 else 'less likely'}{surely}"
    )


def _by_hardness(record: ProbeRecord) -> str:
    hard, easy = record.delta0("rejected_hard"), record.delta0("rejected_easy")
    if hard is None or easy is None:
        return ""
    return f"; hard ones {hard.mean:+.3f}, easy ones {easy.mean:+.3f}"


def _margin(first: ProbeRecord, last: ProbeRecord) -> str:
    won = (
        ""
        if last.accuracy is None or not any(last.row_margins)
        else f"; the chosen response gained more in {last.accuracy:.0%} of the pairs"
    )
    return (
        f"The margin between them went from {first.margin.mean:.2f} to {last.margin.mean:.2f} nats per response{won}."
    )


def _calibration(first: ProbeRecord, last: ProbeRecord) -> str:
    distance = (
        "" if last.total_variation is None else (f"; total variation to the reference {last.total_variation:.3f}")
    )
    return (
        f"Calibration error {first.ece:.3f} → {last.ece:.3f}, probability of the most likely token "
        f"{first.top1_mass:.3f} → {last.top1_mass:.3f}{distance}."
    )

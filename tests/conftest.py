"""What every test relies on: no network, one thread per process, and accelerator tests only where there is one.

Fixtures that several test files share belong below the settings.
"""

import gc
import importlib.metadata
import os

# Before anything imports huggingface_hub, which reads these once. Offline mode also keeps TRL's telemetry silent.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Test processes run side by side: more threads each would only make them wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# How long an example takes says something of the machine only
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_report_header():
    """The versions that a result stands for."""
    packages = ("trl", "transformers", "torch", "accelerate", "peft", "datasets")
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Mark what `test_upstream*.py` hold as contracts; skip tests marked `gpu` on machines without an accelerator."""
    for item in items:
        if item.path.name.startswith("test_upstream"):
            item.add_marker(pytest.mark.contract)
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """Every `train` collects garbage, which takes longer than the training where all of transformers is searched."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    """Folder of a tiny text model and its tokenizer."""
    import tiny

    return tiny.save_text_model(tmp_path_factory.mktemp("text_model"))


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory):
    """Folder of a tiny mixture-of-experts model."""
    import tiny

    return tiny.save_text_model(tmp_path_factory.mktemp("moe_model"), moe=True)


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory):
    """Folder of the shapes model, untrained, with its processor."""
    from trl_cwdpo.shapes import build_model, build_processor

    folder = tmp_path_factory.mktemp("vision_model")
    processor = build_processor()
    build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vision_pairs():
    """A few preference pairs with pictures."""
    from trl_cwdpo.shapes import build_dataset

    return build_dataset(num_train=24, num_test=8, seed=0)

"""What the tests of the shapes task share: a small dataset and a tiny model on disk, each built once."""

import pytest

from trl_cwdpo.shapes.dataset import write_dataset
from trl_cwdpo.shapes.model import build_model, build_processor
from trl_cwdpo.shapes.pretraining import Recipe, pretrain


@pytest.fixture(scope="session")
def dataset_path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("dataset") / "shapes", num_train=30, num_test=9, seed=1)


@pytest.fixture(scope="session")
def small_recipe():
    return Recipe(num_scenes=64, batch_size=16)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, small_recipe):
    """A model after 20 steps: far from good, but no longer random."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return pretrain(folder, steps=20, recipe=small_recipe, progress=False)


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture
def model(processor):
    return build_model(processor, seed=0)

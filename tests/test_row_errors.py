"""`row_errors`: pairs that a stream loses on its way are counted."""

import re

import pytest
import tiny
from datasets import IterableDataset

from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer


@pytest.mark.parametrize("long", [(2,), (0, 3), (3,), ()])
@pytest.mark.parametrize("stage", ["cwdpo", "sft"])
def test_too_long_pairs_of_a_stream_are_counted_in_a_warning(long, stage, text_model, tmp_path, caplog):
    rows = tiny.pairs(4, conversational=False).to_list()
    for index in long:
        rows[index]["prompt"] = "what " * 80
    trainer_class, config_class = {
        "cwdpo": (CWDPOTrainer, CWDPOConfig),
        "sft": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig),
    }[stage]
    args = config_class(
        **tiny.training_options(tmp_path, max_length=40, max_steps=4 - len(long), per_device_train_batch_size=1)
    )
    trainer_class(text_model, args=args, train_dataset=IterableDataset.from_generator(lambda: iter(rows))).train()
    said = [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()]
    assert bool(said) == bool(long)
    assert all(re.match(r"Left out \d+ pairs of the train dataset so far: `max_length`=40", text) for text in said)

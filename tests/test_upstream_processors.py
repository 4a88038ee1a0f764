"""What the package assumes about processors and TRL's preference collator for pictures."""

import model_zoo
import pytest
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from trl_cwdpo.upstream import processors


@pytest.fixture(scope="module")
def paligemma():
    return model_zoo.ZOO["paligemma"].build()[1]


def examples():
    return [dict(row) for row in model_zoo.data("paligemma", 2)]


def test_trl_gives_responses_to_the_processor_without_pictures(paligemma):
    with pytest.raises(ValueError, match="`images` are expected"):
        DataCollatorForVisionPreference(processor=paligemma)(examples())


def test_responses_of_paligemma_are_the_causal_suffix(paligemma):
    batch = processors.collator_for_responses(DataCollatorForVisionPreference(processor=paligemma))(examples())
    assert "labels" not in batch
    completion, used = batch["completion_mask"].bool(), batch["attention_mask"].bool()
    assert set(batch["token_type_ids"][completion].tolist()) == {1}
    assert set(batch["token_type_ids"][used & ~completion].tolist()) == {0}
    tokenizer = paligemma.tokenizer
    rows = examples()
    texts = [row[side][0]["content"] for side in ("chosen", "rejected") for row in rows]
    for ids, mask, text in zip(batch["input_ids"], completion, texts, strict=True):
        # The template ends a response with the end token; its beginning, up to there, is the prompt's
        assert ids[mask].tolist() == tokenizer(f"{text} <eos>")["input_ids"]
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image).sum(1).tolist() == [paligemma.image_seq_length] * 4


def test_other_collators_and_processors_stay_what_they_are():
    llava = model_zoo.ZOO["llava"].build()[1]
    assert processors.for_responses(llava) is llava
    collator = DataCollatorForVisionPreference(processor=llava, max_length=7)
    assert processors.collator_for_responses(collator) == collator
    assert processors.collator_for_responses(len) is len

"""What `upstream.preemption` assumes of transformers' checkpoint on a signal."""

import signal

import tiny
from transformers import Trainer, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging

from trl_cwdpo.upstream.preemption import release_signals


def test_the_trainer_takes_over_sigterm_and_the_callback_gives_it_back(text_model, tmp_path):
    from transformers import AutoModelForCausalLM

    logging.set_verbosity_error()
    before = signal.getsignal(signal.SIGTERM)
    args = TrainingArguments(**tiny.training_options(tmp_path, enable_jit_checkpoint=True))
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(text_model), args)
    assert signal.getsignal(signal.SIGTERM) is not before
    assert any(isinstance(callback, JITCheckpointCallback) for callback in trainer.callback_handler.callbacks)
    release_signals(trainer)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not any(isinstance(callback, JITCheckpointCallback) for callback in trainer.callback_handler.callbacks)
    release_signals(trainer)
    assert signal.getsignal(signal.SIGTERM) is before

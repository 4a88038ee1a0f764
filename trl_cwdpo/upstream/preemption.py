"""transformers' own checkpoint on a signal, which each process decides on by itself.

What is assumed: with `enable_jit_checkpoint`, `Trainer.__init__` adds a `JITCheckpointCallback`, whose `set_trainer`
takes over SIGTERM and whose `on_train_end` gives it back.
"""

from typing import Any

from transformers.trainer_jit_checkpoint import JITCheckpointCallback


def release_signals(trainer: Any) -> None:  # noqa: ANN401 (either trainer)
    """
    Remove transformers' callback for SIGTERM, and give the signal back to whoever had it before.

    Args:
        trainer ([`~transformers.Trainer`]):
            A trainer that is set up.
    """
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, JITCheckpointCallback):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
            trainer.remove_callback(callback)

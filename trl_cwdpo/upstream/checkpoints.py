"""What this package assumes about how transformers saves checkpoints."""

from typing import Any

__all__ = ["save_checkpoint"]


def save_checkpoint(trainer: Any) -> None:  # noqa: ANN401 (any transformers trainer)
    """Save a checkpoint of now, before the first step too, as the trainer itself does; on all processes together."""
    trainer._save_checkpoint(trainer.model, trial=None)
    trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)

"""Resume a run that has already taken all of its steps."""

from typing import Any


class FinishedRunStaysFinished:
    """
    Mixin for a [`~transformers.Trainer`]: a run resumed from the checkpoint of its last step trains no further.

    transformers looks at the number of steps after each step only, so that such a run would take one step too many,
    unless its last step ends an epoch. A run killed between its last checkpoint and the end of the program is resumed
    in just this way.
    """

    state: Any

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        parent: Any = super()
        trained = parent._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else trained

"""Settings of the demonstration."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DemoSettings:
    """
    All numbers of a demonstration run. DPO and CW-DPO share every one of them.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of data, model and training.
        num_pairs (`int`, *optional*, defaults to `2000`):
            Preference pairs; a third each has a hard, a medium and an easy rejected response.
        stage1_share (`float`, *optional*, defaults to `0.75`):
            Share of the pairs that stage 1 trains on; stage 2 gets the others.
        num_held_out (`int`, *optional*, defaults to `1000`):
            Pairs to evaluate on, with pictures that no training has seen.
        pretraining_steps (`int`, *optional*, defaults to `800`):
            Steps of the pretraining of the tiny model.
        pretraining_scenes (`int`, *optional*, defaults to `20000`):
            Pictures of the pretraining.
        batch_size (`int`, *optional*, defaults to `16`):
            Pairs a step, in both stages.
        stage1_steps (`int`, *optional*, defaults to `60`):
            Steps of stage 1.
        stage1_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Peak learning rate of stage 1.
        stage2_steps (`int`, *optional*, defaults to `120`):
            Steps of DPO and of CW-DPO.
        stage2_learning_rate (`float`, *optional*, defaults to `3e-5`):
            Peak learning rate of DPO and of CW-DPO.
        beta (`float`, *optional*, defaults to `0.5`):
            β of DPO and of CW-DPO.
    """

    seed: int = 0
    num_pairs: int = 2000
    stage1_share: float = 0.75
    num_held_out: int = 1000
    pretraining_steps: int = 800
    pretraining_scenes: int = 20000
    batch_size: int = 16
    stage1_steps: int = 60
    stage1_learning_rate: float = 1e-4
    stage2_steps: int = 120
    stage2_learning_rate: float = 3e-5
    beta: float = 0.5

    @property
    def num_stage1_pairs(self) -> int:
        """How many pairs stage 1 trains on."""
        return round(self.stage1_share * self.num_pairs)

    def shortened(self) -> "DemoSettings":
        """The settings of `--fast`: the same run with fewer steps and pictures."""
        return replace(self, num_pairs=800, num_held_out=400, pretraining_steps=300, stage1_steps=30, stage2_steps=40)

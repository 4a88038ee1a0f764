"""What early stopping and the curriculum assume about transformers."""

import inspect

import tiny
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_cwdpo.pair_order import OrderSampler
from trl_cwdpo.upstream.checkpoints import save_checkpoint
from trl_cwdpo.upstream.sampling import use_sampler


def trainer_of(model, output, **options):
    args = DPOConfig(**tiny.training_options(output, **options))
    return DPOTrainer(model, args=args, train_dataset=tiny.pairs(8))


def test_a_checkpoint_can_be_saved_before_the_first_step_and_resumed(text_model, tmp_path):
    class SaveFirst(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            save_checkpoint(trainer)

    trainer = trainer_of(text_model, tmp_path, max_steps=1)
    trainer.add_callback(SaveFirst())
    trainer.train()
    assert (tmp_path / "checkpoint-0" / "trainer_state.json").is_file()
    again = trainer_of(text_model, tmp_path, max_steps=1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-0"))
    assert again.state.log_history[0]["loss"] == trainer.state.log_history[0]["loss"]


def test_rotation_spares_and_the_end_restores_what_the_state_names_the_best():
    saving = inspect.getsource(Trainer._save_checkpoint)
    assert "best_model_checkpoint=self.state.best_model_checkpoint" in saving
    source = inspect.getsource(Trainer)
    assert "self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None" in source


def test_the_training_dataloader_asks_for_its_sampler(text_model, tmp_path):
    trainer = trainer_of(text_model, tmp_path)
    plain = trainer.data_collator
    seen = []
    trainer.data_collator = lambda rows: seen.append(len(rows)) or plain(rows)
    use_sampler(trainer, OrderSampler(8, lambda: [7, 1]))
    loader = trainer.get_train_dataloader()
    assert list(loader.batch_sampler) == [[7, 1, 7, 1], [7, 1, 7, 1]]

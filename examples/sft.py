"""Stage 1: supervised fine-tuning on the chosen responses, with gentle pressure on the rejected ones.

Takes the preference pairs that stage 2 takes, every flag of TRL's own SFT script and those of
`GentleNegativeSFTConfig`; `--config FILE.yaml` reads them from a file. The model's config decides between a text and
a vision-language model.

LoRA on the pairs beside this script, with the model of `fetch_smollm2.py`:

    python examples/sft.py \
        --model_name_or_path ~/.cache/trl-cwdpo/smollm2-135m/model \
        --dataset_name examples/data/preferences.jsonl \
        --output_dir outputs/sft --use_peft --learning_rate 2e-4 --max_steps 20
"""

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_cwdpo import GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.data_arguments import DataArguments
from trl_cwdpo.loading import dataset_from_arguments


def main(
    script: ScriptArguments,
    args: GentleNegativeSFTConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    data: DataArguments,
) -> None:
    """Train, and save the model or the adapter in the output directory."""
    if model.model_name_or_path is None:
        raise ValueError("No model is given. Set `model_name_or_path`.")
    overrides = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **overrides,
    }
    dataset = dataset_from_arguments(script, mixture, data)
    trainer = GentleNegativeSFTTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    # Finishes the trackers and the process group; without it a distributed run ends with a warning.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    options = (ScriptArguments, GentleNegativeSFTConfig, ModelConfig, DatasetMixtureConfig, DataArguments)
    # TRL names a dataclass type by a NewType that no class has for mypy.
    parser = TrlParser(options)  # type: ignore[arg-type]
    main(*parser.parse_args_and_config())

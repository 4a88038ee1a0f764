"""Which of two models answers better, by a judge of your own: win-rate with ties and a bootstrap interval.

    python examples/custom_judge.py outputs/cwdpo outputs/sft examples/data/preferences.jsonl

The judge below prefers the response that shares more words with the dataset's chosen one, and the shorter one among
equals. Replace `score` by anything that says how good a response is. A judge that compares two responses side by side
is a function of comparisons as well, see `trl_cwdpo.evaluation.win_rate`.
"""

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer

from trl_cwdpo.data import response_text
from trl_cwdpo.evaluation.comparison import load_for_evaluation
from trl_cwdpo.evaluation.judges import as_messages
from trl_cwdpo.evaluation.win_rate import Comparison, compare_responses, score_judge
from trl_cwdpo.loading import load_preference_dataset


def score(comparisons: Sequence[Comparison]) -> list[float]:
    """How good the first response of each comparison is."""
    scores = []
    for pair in comparisons:
        wanted = set(response_text(pair.row["chosen"]).lower().split())
        given = pair.first.lower().split()
        shared = len(wanted & set(given)) / max(len(wanted | set(given)), 1)
        scores.append(shared - 1e-3 * len(given))
    return scores


@torch.no_grad()
def answers(model_name: str, prompts: Sequence[list[dict[str, str]]], max_new_tokens: int) -> list[str]:
    """Greedy responses of a text model."""
    model, tokenizer = load_for_evaluation(model_name), AutoTokenizer.from_pretrained(model_name)
    texts = []
    for messages in prompts:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        response = output[:, inputs["input_ids"].size(1) :]
        texts += tokenizer.batch_decode(response, skip_special_tokens=True)
    return texts


def main() -> None:
    """Compare two models on a dataset."""
    parser = argparse.ArgumentParser(description="Win-rate of one model over another.")
    parser.add_argument("first", help="the model whose win-rate it is")
    parser.add_argument("second", help="the model it is compared with")
    parser.add_argument("dataset", help="preference pairs: a file, a folder or a name on the hub")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    options = parser.parse_args()
    rows = load_preference_dataset(options.dataset)["train"]
    rows = rows.select(range(min(options.limit, len(rows))))
    prompts = [as_messages(row["prompt"]) for row in rows]
    first, second = (answers(name, prompts, options.max_new_tokens) for name in (options.first, options.second))
    comparisons = [Comparison(*each) for each in zip(prompts, first, second, rows, strict=True)]
    # Each response is scored by itself, so that their order cannot matter
    found = compare_responses(comparisons, score_judge(score), swap=False)
    low, high = found.win_rate.low, found.win_rate.high
    print(f"{options.first} wins {found.win_rate.mean:.1%} [{low:.1%}, {high:.1%}] against {options.second}")
    print(f"  {found.comparisons} prompts, {found.ties:.1%} ties")


if __name__ == "__main__":
    main()

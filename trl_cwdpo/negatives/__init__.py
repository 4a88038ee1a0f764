"""On-policy negatives: responses sampled from the current policy take the place of the dataset's rejected ones.

- `selection`: which samples make a negative, and which of them is taken. Pure.
- `responses`: responses put into a collated batch, and taken out of it.
- `engines`: sampling, with transformers or vLLM.
- `scoring`: rewards and average log-probabilities of samples.
- `refresh`: when to sample during a run, for how many pairs, and what a checkpoint keeps of it.
- `records`: metrics, and a table of samples for the trackers.
"""

from .selection import Choice, Sample, select

__all__ = ["Choice", "Sample", "select"]

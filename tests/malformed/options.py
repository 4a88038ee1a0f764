"""Malformed configurations: for each of this package's options, values that cannot be meant."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from trl_cwdpo import CWDPOConfig, GentleNegativeSFTConfig
from trl_cwdpo.data_arguments import DataArguments

CONFIGS = {"sft": GentleNegativeSFTConfig, "cwdpo": CWDPOConfig}
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), float("-inf")])
WORDS = st.text("abcxyz", min_size=3, max_size=6)
# Of the wrong type, wherever a number is wanted
NO_NUMBER = st.one_of(WORDS, st.just([1]), st.just({"a": 1}), st.just(""), st.booleans())
NO_TEXT = st.one_of(st.integers(), st.sampled_from([["loss"], {"a": 1}, True]))


@dataclass(frozen=True)
class BadOption:
    """One option with a value that cannot be meant."""

    stage: str
    name: str
    value: Any

    @property
    def key(self):
        return f"{self.stage} {self.name} {self.value!r}"


def whole(least, *, optional=False):
    too_small = st.integers(least - 100, least - 1)
    wrong = st.one_of(too_small, NO_NUMBER, st.floats(0.1, 0.9).map(lambda x: least + x), NOT_FINITE)
    return wrong if optional else st.one_of(wrong, st.none())


def number(low, high, *, low_included=True, high_included=True, optional=False):
    outside = [st.floats(max_value=low, exclude_max=low_included, allow_infinity=False)]
    if high is not None:
        outside.append(st.floats(min_value=high, exclude_min=high_included, allow_infinity=False))
    return st.one_of(*outside, NOT_FINITE, NO_NUMBER, *([] if optional else [st.none()]))


def choice():
    return st.one_of(WORDS, st.sampled_from(["LOSS", "Smoothed", " off", "loss ", "none!"]), NO_TEXT, st.none())


def flag():
    return st.one_of(WORDS, st.sampled_from([0, 1, 2, "true", "yes"]), st.none(), st.just([True]))


def text():
    return st.one_of(st.integers(), st.booleans(), st.just(["a"]), st.floats())


def number_or_auto():
    return st.one_of(WORDS, NOT_FINITE, st.none(), st.booleans(), st.just([1.0]), st.just("automatic"), st.just(""))


POSITIVE = number(0.0, None, low_included=False)
SHARED = {
    "probe_dataset_size": whole(1),
    "probe_steps": whole(0),
    "probe_thresholds": st.one_of(
        st.just({"patience": 0}),
        st.just({"no_such_number": 1.0}),
        st.dictionaries(st.just("flat"), WORDS, min_size=1),
        st.sampled_from(["flat", "[1]", "{", ""]),
        st.just(3),
    ),
    "probe_families": st.one_of(
        st.lists(WORDS, min_size=1, max_size=2), st.just([]), st.just("chosen"), st.just([None]), st.just(3)
    ),
    "probe_early_stopping": flag(),
    "probe_restore_best": flag(),
    "share_prefix": st.one_of(WORDS, st.integers(), st.none(), st.just([]), st.just("Auto!")),
}
DATA = {
    "columns": st.one_of(
        WORDS,
        st.sampled_from(["{'prompt': 'q'}", '{"prompt": ', '{"prompt": 3}', "TRL", "[1]", ""]),
        st.dictionaries(WORDS, WORDS, min_size=1, max_size=1),
        st.just({"prompt": "q", "chosen": "q"}),
        st.just({"prompt": 3}),
        st.integers(),
        st.just(["prompt"]),
    ),
    "image_folder": st.one_of(st.integers(), st.just(["a"]), st.just("")),
    "train_rows": st.one_of(st.integers(), WORDS, st.just(""), st.just(":"), st.just(["a"])),
    "eval_rows": st.one_of(st.integers(), WORDS, st.just(""), st.just("a:"), st.just({"a": 1})),
}
OPTIONS = {
    "sft": {
        **SHARED,
        "negative_loss_type": choice(),
        "negative_weight": number(0.0, None, optional=True),
        "negative_label_smoothing": number(0.0, 1.0, high_included=False),
        "negative_nll_floor": st.one_of(number_or_auto(), st.floats(-9.0, 0.0)),
        "negative_nll_ceiling": st.one_of(number_or_auto(), st.floats(-9.0, 0.0)),
        "negative_reduction": choice(),
    },
    "cwdpo": {
        **SHARED,
        "cooling_mode": choice(),
        "cooling_floor": number_or_auto(),
        "cooling_temperature": st.one_of(number_or_auto(), st.floats(-9.0, 0.0)),
        "cooling_preset": choice(),
        "cooling_calibration_size": whole(1),
        "cooling_constant": number(0.0, 1.0),
        "cooling_stop_gradient": flag(),
        "cooling_min_weight": number(0.0, 1.0, high_included=False),
        "reference_cache_dir": st.one_of(text(), st.just("")),
        "dataset_negative_fraction": number(0.0, 1.0),
        "dataset_negative_fraction_end": number(0.0, 1.0, optional=True),
        "num_negative_generations": whole(1),
        "negative_selection": choice(),
        "negative_reward_funcs": st.one_of(st.just([]), WORDS, st.just([None]), st.just([""]), st.floats(0.0, 1.0)),
        "negative_reward_weights": st.one_of(st.just([]), WORDS, st.just([None]), st.just(["a"]), st.floats(0.0, 1.0))
        | NOT_FINITE.map(lambda value: [1.0, value]),
        "on_policy_chosen": flag(),
        "negative_discard_truncated": flag(),
        "negative_max_completion_length": whole(1),
        "negative_temperature": POSITIVE,
        "negative_top_p": number(0.0, 1.0, low_included=False),
        "negative_refresh_steps": whole(1),
        "negative_generation_batch_size": whole(1, optional=True),
        "negative_log_samples": whole(0),
        "ds3_gather_for_generation": flag(),
        "use_vllm": flag(),
        "vllm_mode": choice(),
        "vllm_model_impl": choice(),
        "vllm_enable_sleep_mode": flag(),
        "vllm_structured_outputs_regex": text(),
        "vllm_server_base_url": text(),
        "vllm_server_host": st.one_of(text(), st.none()),
        "vllm_server_port": st.one_of(whole(1), st.integers(65536, 10**6)),
        "vllm_server_timeout": number(0.0, None),
        "vllm_group_port": st.one_of(whole(1), st.integers(65536, 10**6)),
        "vllm_gpu_memory_utilization": number(0.0, 1.0, low_included=False),
        "vllm_max_model_length": whole(1, optional=True),
        "vllm_tensor_parallel_size": whole(1),
    },
}
PLAN = [(stage, name) for stage, options in OPTIONS.items() for name in options]
# What a command line cannot get wrong: any word is text
FREE_TEXT = {"vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host", "image_folder"}


def bad_options(stage, name):
    return OPTIONS[stage][name].map(lambda value: BadOption(stage, name, value))


def own_options(config):
    """Names of the options that this package adds."""
    found = set()
    for base in config.__mro__:
        if base.__module__.startswith("trl_cwdpo."):
            found |= set(base.__annotations__)
    return found


# Sets of options that contradict one another, and a name that the error must say
CONTRADICTIONS = [
    ("cwdpo", {"cooling_mode": "gate", "cooling_stop_gradient": False}, "cooling_stop_gradient"),
    ("cwdpo", {"cooling_mode": "off", "cooling_stop_gradient": False}, "cooling_stop_gradient"),
    ("cwdpo", {"cooling_mode": "constant", "cooling_constant": 0.2, "cooling_min_weight": 0.3}, "cooling_min_weight"),
    ("cwdpo", {"loss_type": "aot"}, "loss_type"),
    ("cwdpo", {"loss_type": ["sigmoid", "aot"], "loss_weights": [1.0, 1.0]}, "loss_type"),
    ("cwdpo", {"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy"),
    ("cwdpo", {"reference_cache_dir": "r", "precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
    ("cwdpo", {"reference_cache_dir": "r", "sync_ref_model": True}, "sync_ref_model"),
    ("cwdpo", {"reference_cache_dir": "r", "dataset_negative_fraction": 0.5}, "dataset_negative_fraction"),
    ("cwdpo", {"precompute_ref_log_probs": True, "dataset_negative_fraction_end": 0.0}, "precompute_ref_log_probs"),
    ("cwdpo", {"use_vllm": True, "ds3_gather_for_generation": False}, "ds3_gather_for_generation"),
    ("cwdpo", {"probe_early_stopping": True, "probe_steps": 0}, "probe_steps"),
    ("sft", {"probe_early_stopping": True, "probe_steps": 0}, "probe_steps"),
    ("sft", {"negative_loss_type": "band", "negative_nll_floor": 3, "negative_nll_ceiling": 1}, "negative_nll_floor"),
    ("sft", {"packing": True}, "packing"),
    ("sft", {"eval_packing": True}, "eval_packing"),
    ("sft", {"padding_free": True}, "padding_free"),
    ("sft", {"assistant_only_loss": True}, "assistant_only_loss"),
    ("sft", {"completion_only_loss": False}, "completion_only_loss"),
    ("sft", {"dataset_kwargs": {"skip_prepare_dataset": True}}, "dataset_kwargs"),
    ("sft", {"dataset_text_field": "caption"}, "dataset_text_field"),
    ("sft", {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
]
KNOWN = own_options(CWDPOConfig) | own_options(GentleNegativeSFTConfig) | own_options(DataArguments)


@st.composite
def misspelt(draw, names):
    """The name of an option with a slip: a letter left out, doubled, exchanged or put in."""
    name = draw(st.sampled_from(sorted(names)))
    place = draw(st.integers(1, len(name) - 2))
    slip = draw(st.sampled_from(["left out", "doubled", "exchanged", "put in"]))
    letter = name[place]
    if slip == "left out":
        return name[:place] + name[place + 1 :]
    if slip == "doubled":
        return name[:place] + letter + name[place:]
    if slip == "exchanged":
        return name[:place] + name[place + 1] + letter + name[place + 2 :]
    return name[:place] + draw(st.sampled_from("qxz")) + name[place:]

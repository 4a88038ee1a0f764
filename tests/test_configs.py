"""`CWDPOConfig` and `GentleNegativeSFTConfig`: defaults, documentation, validation, command line, YAML, JSON."""

import ast
import dataclasses
import inspect
import json
import math
import re

import pytest
from transformers import HfArgumentParser
from trl import DPOConfig, SFTConfig, TrlParser

from trl_cwdpo.cwdpo_config import CWDPOConfig
from trl_cwdpo.gentle_negative_sft_config import GentleNegativeSFTConfig
from trl_cwdpo.negative_options import NegativeOptions

CONFIGS = [(CWDPOConfig, DPOConfig), (GentleNegativeSFTConfig, SFTConfig)]
CPU = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}
CPU_FLAGS = [f"--{name}={value}" for name, value in CPU.items()]

both_configs = pytest.mark.parametrize(("config", "parent"), CONFIGS, ids=["cwdpo", "sft"])


def cwdpo(**options):
    return CWDPOConfig(**CPU, **options)


def sft(**options):
    return GentleNegativeSFTConfig(**CPU, **options)


def own_fields(config, parent):
    inherited = {field.name for field in dataclasses.fields(parent)}
    return [field for field in dataclasses.fields(config) if field.name not in inherited]


def documented_defaults(config):
    """Options of the class docstring with their default as it is written there, or None without one."""
    # On-policy negatives have so many options that they are documented where they are declared
    classes = [config, NegativeOptions] if issubclass(config, NegativeOptions) else [config]
    texts = [inspect.getdoc(documented).split("Parameters:", 1)[1] for documented in classes]
    entries = re.findall(r"^ {4}(\w+) \((.+)\):$", "\n".join(texts), flags=re.MULTILINE)
    defaults = {}
    for name, description in entries:
        assert name not in defaults, name
        assert "*optional*" in description, name
        written = re.search(r"defaults to `(.+?)`", description)
        defaults[name] = None if written is None else ast.literal_eval(written.group(1))
    return defaults


NEGATIVE_DEFAULTS = {
    "dataset_negative_fraction": 1.0,
    "num_negative_generations": 1,
    "negative_selection": "random",
    "on_policy_chosen": False,
    "negative_max_completion_length": 256,
    "negative_temperature": 1.0,
    "negative_top_p": 1.0,
    "negative_refresh_steps": 1,
    "use_vllm": False,
    "vllm_mode": "colocate",
}
PROBE_DEFAULTS = {
    "probe_dataset_size": 64,
    "probe_steps": 50,
    "probe_families": None,
    "probe_early_stopping": False,
    "probe_restore_best": True,
    "probe_thresholds": None,
}

# --- defaults and documentation --------------------------------------------------------------------------------------


def test_defaults_of_cwdpo_are_those_of_the_method():
    expected = {
        **PROBE_DEFAULTS,
        **NEGATIVE_DEFAULTS,
        "cooling_mode": "loss",
        "cooling_floor": "auto",
        "cooling_temperature": "auto",
        "cooling_preset": "head",
        "cooling_calibration_size": 256,
        "cooling_constant": 0.5,
        "cooling_stop_gradient": True,
        "cooling_min_weight": 0.0,
        "reference_cache_dir": None,
    }
    config = cwdpo()
    assert {name: getattr(config, name) for name in expected} == expected


def test_defaults_of_gentle_negative_sft_are_those_of_the_method():
    expected = {
        **PROBE_DEFAULTS,
        "negative_loss_type": "smoothed",
        "negative_weight": 0.05,
        "negative_label_smoothing": 0.1,
        "negative_nll_floor": "auto",
        "negative_reduction": "sequence",
    }
    config = sft()
    assert {name: getattr(config, name) for name in expected} == expected


@both_configs
def test_inherited_defaults_are_the_parents(config, parent):
    ours, theirs = config(**CPU).to_dict(), parent(**CPU).to_dict()
    assert {name: ours[name] for name in theirs} == theirs


@both_configs
def test_every_option_is_documented_once_with_the_default_that_it_has(config, parent):
    documented = documented_defaults(config)
    fields = {field.name: field.default for field in own_fields(config, parent)}
    assert documented == fields
    assert {name: type(value) for name, value in documented.items()} == {
        name: type(value) for name, value in fields.items()
    }


@both_configs
def test_every_option_has_help_that_argparse_can_format(config, parent):
    for field in own_fields(config, parent):
        text = field.metadata["help"]
        assert len(text) > 20, field.name
        assert text.endswith("."), field.name
        # argparse formats the help text: a bare % would raise
        assert text % {} == text.replace("%%", "%")


@both_configs
def test_choices_of_the_command_line_are_those_that_validation_accepts(config, parent):
    for field in own_fields(config, parent):
        for choice in field.metadata.get("choices", []):
            assert getattr(config(**CPU, **{field.name: choice}), field.name) == choice
        if "choices" in field.metadata:
            with pytest.raises(ValueError, match=f"`{field.name}` must be one of"):
                config(**CPU, **{field.name: "no such thing"})


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"cooling_mode": "gated"}, ["`cooling_mode`", "'loss', 'gate', 'constant', 'off'", "'gated'"]),
        ({"cooling_preset": "median"}, ["`cooling_preset`", "'head', 'tail', 'paper'", "'median'"]),
        ({"cooling_floor": "low"}, ["`cooling_floor`", "finite number or 'auto'", "'low'"]),
        ({"cooling_floor": math.nan}, ["`cooling_floor`", "finite number or 'auto'", "nan"]),
        ({"cooling_floor": None}, ["`cooling_floor`", "finite number or 'auto'", "None"]),
        ({"cooling_temperature": "warm"}, ["`cooling_temperature`", "finite number or 'auto'", "'warm'"]),
        ({"cooling_temperature": math.inf}, ["`cooling_temperature`", "finite number or 'auto'", "inf"]),
        ({"cooling_temperature": 0}, ["`cooling_temperature`", "positive", "0.0", "0.01"]),
        ({"cooling_temperature": "-0.5"}, ["`cooling_temperature`", "positive", "-0.5"]),
        ({"cooling_calibration_size": 0}, ["`cooling_calibration_size`", "at least 1", "0"]),
        ({"cooling_constant": -0.1}, ["`cooling_constant`", "[0, 1]", "-0.1"]),
        ({"cooling_constant": 1.5}, ["`cooling_constant`", "[0, 1]", "1.5"]),
        ({"cooling_constant": math.nan}, ["`cooling_constant`", "[0, 1]", "nan"]),
        ({"cooling_min_weight": -0.1}, ["`cooling_min_weight`", "[0, 1)", "-0.1"]),
        ({"cooling_min_weight": 1.0}, ["`cooling_min_weight`", "[0, 1)", "1.0"]),
        (
            {"cooling_stop_gradient": False, "cooling_mode": "gate"},
            ["`cooling_stop_gradient=False`", "`cooling_mode='gate'`", "Use `cooling_mode='loss'`"],
        ),
        (
            {"cooling_stop_gradient": False, "cooling_mode": "constant"},
            ["`cooling_stop_gradient=False`", "`cooling_mode='constant'`"],
        ),
        ({"cooling_stop_gradient": False, "cooling_mode": "off"}, ["`cooling_stop_gradient=False`", "'off'"]),
        (
            {"cooling_mode": "constant", "cooling_constant": 0.2, "cooling_min_weight": 0.3},
            ["`cooling_min_weight`=0.3", "`cooling_constant`=0.2", "Lower `cooling_min_weight`"],
        ),
        (
            {"loss_type": "aot"},
            ["`loss_type='aot'`", "`cooling_mode='loss'`", "'aot_unpaired'", "`cooling_mode='off'`"],
        ),
        ({"loss_type": ["sft", "aot"], "cooling_mode": "gate"}, ["`loss_type='aot'`", "`cooling_mode='gate'`"]),
    ],
)
def test_cwdpo_refuses_with_option_value_and_fix(options, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        cwdpo(**options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("make", [cwdpo, sft])
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"probe_dataset_size": 0}, ["`probe_dataset_size`", "at least 1", "`probe_steps=0`"]),
        ({"probe_steps": -1}, ["`probe_steps`", "at least 0", "-1"]),
        ({"probe_families": ["chosen", "chosn"]}, ["`probe_families`", "['chosn']", "'mismatched'"]),
        ({"probe_families": []}, ["`probe_families`", "no response family"]),
        ({"probe_thresholds": {"patience": 0}}, ["`probe_thresholds`", "`patience` must be at least 1, got 0"]),
        ({"probe_thresholds": {"drift": 1.0}}, ["`probe_thresholds`", "no threshold 'drift'", "total_variation"]),
        ({"probe_thresholds": {"flat": "0.1"}}, ["`probe_thresholds`", "`flat` must be a number, got '0.1'"]),
        ({"probe_thresholds": "flat=0.1"}, ["`probe_thresholds`", "'flat=0.1'", "Expecting value"]),
        ({"probe_thresholds": "[1]"}, ["`probe_thresholds`", "dictionary of numbers by name"]),
        ({"probe_early_stopping": True, "probe_steps": 0}, ["`probe_early_stopping=True`", "`probe_steps=0`"]),
    ],
)
def test_probe_options_are_refused_with_option_value_and_fix(make, options, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        make(**options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"cooling_stop_gradient": False},
        {"cooling_mode": "constant", "cooling_constant": 0.0, "cooling_min_weight": 0.3},
        {"cooling_mode": "constant", "cooling_constant": 0.3, "cooling_min_weight": 0.3},
        {"cooling_mode": "constant", "cooling_constant": 1.0},
        {"cooling_mode": "off", "loss_type": "aot"},
        {"loss_type": "aot_unpaired"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
        {"cooling_min_weight": 0.99},
        {"cooling_calibration_size": 1},
        {"cooling_temperature": 0.01},
    ],
)
def test_cwdpo_accepts(options):
    config = cwdpo(**options)
    for name, value in options.items():
        assert getattr(config, name) == ([value] if name == "loss_type" and isinstance(value, str) else value)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            {"negative_loss_type": "soft"},
            ["`negative_loss_type`", "'smoothed', 'hinge', 'band', 'none'", "'soft'"],
        ),
        ({"negative_reduction": "token"}, ["`negative_reduction`", "'sequence', 'batch'", "'token'"]),
        ({"negative_weight": -0.1}, ["`negative_weight`", "-0.1"]),
        ({"negative_weight": math.nan}, ["`negative_weight`", "nan"]),
        ({"negative_weight": math.inf}, ["`negative_weight`", "inf"]),
        ({"negative_label_smoothing": 1.0}, ["`negative_label_smoothing`", "[0, 1)", "1.0"]),
        ({"negative_label_smoothing": -0.1}, ["`negative_label_smoothing`", "[0, 1)", "-0.1"]),
        ({"negative_nll_floor": "low"}, ["`negative_nll_floor`", "finite number or 'auto'", "'low'"]),
        ({"negative_nll_ceiling": math.inf}, ["`negative_nll_ceiling`", "finite number or 'auto'", "inf"]),
        (
            {"negative_loss_type": "band", "negative_nll_floor": 3, "negative_nll_ceiling": 2},
            ["`negative_nll_floor`=3.0", "`negative_nll_ceiling`=2.0", "Swap them"],
        ),
        ({"packing": True}, ["`packing=True`", "Set `packing=False`"]),
        ({"eval_packing": True}, ["`eval_packing=True`", "Set `eval_packing=False`"]),
        ({"padding_free": True}, ["`padding_free=True`", "Set `padding_free=False`"]),
        ({"assistant_only_loss": True}, ["`assistant_only_loss=True`", "Set `assistant_only_loss=False`"]),
        ({"completion_only_loss": False}, ["`completion_only_loss=False`", "Leave it unset"]),
        (
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            ["`dataset_kwargs={'skip_prepare_dataset': True}`", "`chosen` and `rejected`"],
        ),
        ({"label_smoothing_factor": 0.1}, ["`label_smoothing_factor`=0.1", "`negative_label_smoothing`"]),
    ],
)
def test_sft_refuses_with_option_value_and_fix(options, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        sft(**options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"negative_loss_type": "hinge", "negative_nll_floor": 3.0, "negative_nll_ceiling": 2.0},
        {"negative_loss_type": "band", "negative_nll_floor": 2.0, "negative_nll_ceiling": 2.0},
        {"negative_loss_type": "band", "negative_nll_floor": 2.0},
        {"negative_label_smoothing": 0.0},
        {"completion_only_loss": True},
        {"dataset_kwargs": {"skip_prepare_dataset": False}},
        {"eval_packing": False},
    ],
)
def test_sft_accepts(options):
    config = sft(**options)
    for name, value in options.items():
        assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("kind", "weight", "used"),
    [("smoothed", 0.05, True), ("hinge", 0.1, True), ("band", 0.1, True), ("none", 0.0, False)],
)
def test_the_default_weight_depends_on_the_type_of_the_loss(kind, weight, used):
    config = sft(negative_loss_type=kind)
    assert config.negative_weight == weight
    assert config.uses_negatives == used


def test_a_given_weight_is_kept():
    assert sft(negative_loss_type="hinge", negative_weight=0.05).negative_weight == 0.05
    assert sft(negative_weight=0.3).negative_weight == 0.3


@pytest.mark.parametrize("kind", ["smoothed", "hinge", "band", "none"])
def test_weight_zero_uses_no_negatives(kind):
    config = sft(negative_loss_type=kind, negative_weight=0.0)
    assert config.negative_weight == 0.0
    assert not config.uses_negatives


def test_a_loss_without_negatives_uses_none_whatever_its_weight():
    assert not sft(negative_loss_type="none", negative_weight=0.3).uses_negatives


# --- numbers or "auto" -----------------------------------------------------------------------------------------------

NUMBERS_OR_AUTO = [
    (CWDPOConfig, "cooling_floor"),
    (CWDPOConfig, "cooling_temperature"),
    (GentleNegativeSFTConfig, "negative_nll_floor"),
    (GentleNegativeSFTConfig, "negative_nll_ceiling"),
]
number_or_auto_options = pytest.mark.parametrize(("config", "option"), NUMBERS_OR_AUTO)
texts = pytest.mark.parametrize(("text", "expected"), [("auto", "auto"), ("2.5", 2.5), ("1e-3", 0.001), ("3", 3.0)])


def assert_number_or_auto(found, expected):
    assert found == expected
    assert type(found) is type(expected)


@number_or_auto_options
@texts
def test_numbers_or_auto_from_python(config, option, text, expected):
    assert_number_or_auto(getattr(config(**CPU, **{option: text}), option), expected)


@number_or_auto_options
@texts
@pytest.mark.parametrize("style", ["underscores", "dashes"])
def test_numbers_or_auto_from_the_command_line(config, option, text, expected, style):
    flag = f"--{option if style == 'underscores' else option.replace('_', '-')}"
    (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses([*CPU_FLAGS, flag, text])
    assert_number_or_auto(getattr(parsed, option), expected)


@pytest.mark.parametrize("text", ["-2.5", "-3"])
def test_a_negative_floor_from_the_command_line(text):
    (parsed,) = TrlParser(CWDPOConfig).parse_args_and_config([*CPU_FLAGS, "--cooling_floor", text])
    assert_number_or_auto(parsed.cooling_floor, float(text))


def test_a_negative_floor_in_scientific_notation_needs_an_equals_sign():
    (parsed,) = TrlParser(CWDPOConfig).parse_args_and_config([*CPU_FLAGS, "--cooling_floor=-1e-3"])
    assert_number_or_auto(parsed.cooling_floor, -0.001)


@number_or_auto_options
@pytest.mark.parametrize(
    ("text", "expected"), [("auto", "auto"), ("2.5", 2.5), ("1e-3", 0.001), ("3", 3.0), ("'2.5'", 2.5)]
)
def test_numbers_or_auto_from_yaml(config, option, text, expected, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"{option}: {text}\n")
    (parsed,) = TrlParser(config).parse_args_and_config([*CPU_FLAGS, "--config", str(path)])
    assert_number_or_auto(getattr(parsed, option), expected)


def test_negative_floors_from_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("-2.5", "'-2.5'", "-3"):
        path.write_text(f"cooling_floor: {text}\n")
        (parsed,) = TrlParser(CWDPOConfig).parse_args_and_config([*CPU_FLAGS, "--config", str(path)])
        assert_number_or_auto(parsed.cooling_floor, float(text.strip("'")))


def test_the_command_line_overrides_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("cooling_floor: -2.5\ncooling_mode: gate\n")
    flags = [*CPU_FLAGS, "--config", str(path), "--cooling_floor", "auto"]
    (parsed,) = TrlParser(CWDPOConfig).parse_args_and_config(flags)
    assert parsed.cooling_floor == "auto"
    assert parsed.cooling_mode == "gate"


# --- the other options, from the command line and YAML ---------------------------------------------------------------


@both_configs
def test_without_flags_the_parsed_config_is_the_default_one(config, parent):
    (parsed,) = TrlParser(config).parse_args_and_config(CPU_FLAGS)
    default = config(**CPU)
    for field in own_fields(config, parent):
        assert_number_or_auto(getattr(parsed, field.name), getattr(default, field.name))


NEGATIVE_VALUES = {
    # Less would not go with stored references
    "dataset_negative_fraction": 1.0,
    "dataset_negative_fraction_end": 1.0,
    "num_negative_generations": 4,
    "negative_selection": "hardest",
    "negative_reward_funcs": ["rewards:short", "a-reward-model"],
    "negative_reward_weights": [0.5, 2.0],
    "on_policy_chosen": True,
    "negative_discard_truncated": True,
    "negative_max_completion_length": 32,
    "negative_temperature": 0.7,
    "negative_top_p": 0.9,
    "negative_refresh_steps": 3,
    "negative_generation_batch_size": 8,
    "negative_log_samples": 0,
    "ds3_gather_for_generation": True,
    "use_vllm": True,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": "yes|no",
    "vllm_server_base_url": "http://localhost:8001",
    "vllm_server_host": "localhost",
    "vllm_server_port": 8002,
    "vllm_server_timeout": 10.0,
    "vllm_group_port": 51217,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 4096,
    "vllm_tensor_parallel_size": 2,
}
PROBE_VALUES = {
    "probe_dataset_size": 16,
    "probe_steps": 10,
    "probe_families": ["chosen", "argmax"],
    "probe_early_stopping": True,
    "probe_restore_best": False,
    "probe_thresholds": {"total_variation": 0.4, "patience": 3},
}
CWDPO_VALUES = {
    **PROBE_VALUES,
    **NEGATIVE_VALUES,
    "cooling_mode": "constant",
    "cooling_floor": -2.5,
    "cooling_temperature": 0.15,
    "cooling_preset": "paper",
    "cooling_calibration_size": 64,
    "cooling_constant": 0.25,
    "cooling_stop_gradient": True,
    "cooling_min_weight": 0.03,
    "reference_cache_dir": "outputs/reference",
    "share_prefix": True,
}
SFT_VALUES = {
    **PROBE_VALUES,
    "negative_loss_type": "band",
    "negative_weight": 0.2,
    "negative_label_smoothing": 0.3,
    "negative_nll_floor": 1.5,
    "negative_nll_ceiling": 2.5,
    "negative_reduction": "batch",
    "share_prefix": False,
}
both_values = pytest.mark.parametrize(
    ("config", "parent", "values"),
    [(CWDPOConfig, DPOConfig, CWDPO_VALUES), (GentleNegativeSFTConfig, SFTConfig, SFT_VALUES)],
    ids=["cwdpo", "sft"],
)


@both_values
def test_the_values_of_these_tests_cover_every_option(config, parent, values):
    assert list(values) == [field.name for field in own_fields(config, parent)]


@both_values
def test_every_option_from_the_command_line(config, parent, values):
    texts = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()}
    words = {name: [*map(str, value)] if isinstance(value, list) else [str(value)] for name, value in texts.items()}
    flags = [text for name, given in words.items() for text in (f"--{name}", *given)]
    (parsed,) = TrlParser(config).parse_args_and_config([*CPU_FLAGS, *flags])
    for name, value in values.items():
        assert_number_or_auto(getattr(parsed, name), value)


@both_values
def test_every_option_from_yaml(config, parent, values, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    (parsed,) = TrlParser(config).parse_args_and_config([*CPU_FLAGS, "--config", str(path)])
    for name, value in values.items():
        assert_number_or_auto(getattr(parsed, name), value)


@pytest.mark.parametrize("flags", [["--cooling_stop_gradient", "false"], ["--no_cooling_stop_gradient"]])
def test_the_gradient_of_the_weight_can_be_kept_from_the_command_line(flags):
    (parsed,) = TrlParser(CWDPOConfig).parse_args_and_config([*CPU_FLAGS, *flags])
    assert parsed.cooling_stop_gradient is False


def test_a_bare_off_in_yaml_turns_cooling_off(tmp_path):
    # YAML reads `off` as the boolean False
    path = tmp_path / "config.yaml"
    path.write_text("cooling_mode: off\n")
    (parsed,) = TrlParser(CWDPOConfig).parse_args_and_config([*CPU_FLAGS, "--config", str(path)])
    assert parsed.cooling_mode == "off"


@both_configs
def test_the_command_lines_help_lists_every_option(config, parent):
    text = HfArgumentParser(config).format_help()
    for field in own_fields(config, parent):
        assert f"--{field.name}" in text


# --- JSON ------------------------------------------------------------------------------------------------------------


@both_values
def test_configs_survive_json(config, parent, values):
    before = config(**CPU, **values)
    data = json.loads(json.dumps(before.to_dict()))
    after = config(**{name: value for name, value in data.items() if name in {**CPU, **values}})
    for name, value in values.items():
        assert data[name] == value
        assert_number_or_auto(getattr(after, name), value)
    assert json.loads(before.to_json_string()) == data


@both_configs
def test_defaults_survive_json(config, parent):
    before = config(**CPU)
    data = json.loads(before.to_json_string())
    names = [field.name for field in own_fields(config, parent)]
    after = config(**CPU, **{name: data[name] for name in names})
    assert {name: getattr(after, name) for name in names} == {name: getattr(before, name) for name in names}

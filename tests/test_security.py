"""SECURITY.md, point by point: what comes from others runs no code, opens no file, and gives no secret away."""

import ast
import contextlib
import copy
import io
import json
import logging
import os
import pickle
import shutil
import sys
from pathlib import Path

import PIL.Image
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset

import trl_cwdpo
from trl_cwdpo import CWDPOConfig, CWDPOTrainer, GentleNegativeSFTConfig, GentleNegativeSFTTrainer
from trl_cwdpo.cli import main
from trl_cwdpo.cli.recipe import RecipeError, make_recipe
from trl_cwdpo.cli.table import format_table
from trl_cwdpo.cli.yaml_files import YamlError, read_yaml
from trl_cwdpo.data import excerpt
from trl_cwdpo.loading import load_preference_dataset
from trl_cwdpo.redaction import HIDDEN, UnpickledToken, printable, redacted

PACKAGE = Path(trl_cwdpo.__file__).parent
STAGES = {"sft": (GentleNegativeSFTTrainer, GentleNegativeSFTConfig), "cwdpo": (CWDPOTrainer, CWDPOConfig)}
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWx"
PASSWORD = "correct-horse-battery"
URL = f"http://somebody:{PASSWORD}@localhost:8000/v1"


class Payload:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


# --- the source ------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("dill.load", "dill.loads", "joblib.load", "cloudpickle.load", "cloudpickle.loads"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "tempfile.mktemp"),
}


def name_of(function):
    parts = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join([*([function.id] if isinstance(function, ast.Name) else ["?"]), *reversed(parts)])


def fault_of_call(call):
    name, options = name_of(call.func), {word.arg: word.value for word in call.keywords}

    def says(option, *, value):
        return isinstance(options.get(option), ast.Constant) and options[option].value is value

    if name in FORBIDDEN:
        return name
    if name == "torch.load" and not says("weights_only", value=True):
        return "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and "allow_pickle" in options and not says("allow_pickle", value=False):
        return "numpy.load with pickles"
    if name == "yaml.load" and [name_of(word) for word in call.args[1:]] != ["Loader"]:
        return "yaml.load with another loader"
    if says("shell", value=True) or says("trust_remote_code", value=True):
        return "a shell, or code of others"
    return None


def faults_of(source):
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"line {call.lineno}: {fault}" for call in calls if (fault := fault_of_call(call)) is not None]


def test_the_package_calls_nothing_that_runs_data():
    files = [file for folder in (PACKAGE, PACKAGE.parent / "examples") for file in folder.rglob("*.py")]
    assert len(files) > 100
    found = [f"{file.relative_to(PACKAGE.parent)}, {fault}" for file in files for fault in faults_of(file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "import pickle\npickle.loads(data)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text)",
        "subprocess.run(words, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert len(faults_of(source)) == 1


def test_the_loader_of_yaml_is_a_safe_one():
    import yaml

    source = (PACKAGE / "cli" / "yaml_files.py").read_text()
    (loader,) = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == "Loader"
    ]
    assert [name_of(base) for base in loader.bases] == ["yaml.SafeLoader"]
    for tag in ("object/apply:os.system", "object/new:os.system", "name:os.system", "module:os"):
        with pytest.raises(YamlError):
            read_yaml(f"a: !!python/{tag} []")
    assert issubclass(yaml.SafeLoader, yaml.constructor.SafeConstructor)


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_with_code_in_it_does_not_run_it(stage, file, text_model, tmp_path):
    trainer_class, config_class = STAGES[stage]
    options = tiny.training_options(tmp_path / "out", save_strategy="steps", save_steps=1, max_steps=1)
    trainer_class(text_model, args=config_class(**options), train_dataset=tiny.pairs(8)).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    assert (checkpoint / file).is_file()
    torch.save(Payload(tmp_path / "ran"), checkpoint / file)
    options["max_steps"] = 2
    trainer = trainer_class(text_model, args=config_class(**options), train_dataset=tiny.pairs(8))
    # Not every file is read at all; which error torch raises for one is its affair
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError, ValueError, TypeError):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_with_code_in_its_weights_does_not_run_it(stage, text_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(text_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    trainer_class, config_class = STAGES[stage]
    with pytest.raises(Exception, match=r"(?i)weights|unpickl"):
        trainer_class(str(folder), args=config_class(**tiny.training_options(tmp_path)), train_dataset=tiny.pairs(8))
    assert not (tmp_path / "ran").exists()


def test_the_payload_would_run(tmp_path):
    """What the tests above plant is a working one."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


# --- code of others --------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(text_model, tmp_path):
    """A model whose folder brings code, which leaves a mark if it runs."""
    folder = tmp_path / "foreign"
    shutil.copytree(text_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "architectures": ["Foreign"]}
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.Foreign")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    return folder


def test_code_of_a_model_does_not_run_unless_asked_for(foreign, tmp_path, monkeypatch):
    from trl_cwdpo.evaluation.comparison import load_for_evaluation
    from trl_cwdpo.upstream.rewards import RewardModel

    # transformers asks at the terminal where there is one
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n" * 9))
    args = CWDPOConfig(**tiny.training_options(tmp_path))
    for load in (
        lambda: CWDPOTrainer(str(foreign), args=args, train_dataset=tiny.pairs(8)),
        lambda: load_for_evaluation(str(foreign)),
        lambda: RewardModel(str(foreign), None),
    ):
        with pytest.raises(ValueError, match=r"trust_remote_code|custom code|foreign"):
            load()
    assert not (tmp_path / "ran").exists()


def test_scripts_beside_data_do_not_run(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    (folder / "train.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert len(load_preference_dataset(str(folder))["train"]) == 1
    (folder / "train.jsonl").unlink()
    with pytest.raises((ValueError, OSError, RuntimeError)):
        load_preference_dataset(str(folder))
    assert not (tmp_path / "ran").exists()


# --- paths in the data -----------------------------------------------------------------------------------------------

OUTSIDE = (
    "../secret.png",
    "pictures/../../secret.png",
    "/etc/passwd",
    "{root}/secret.png",
    "file:///etc/passwd",
    "http://localhost/a.png",
    "https://example.com/a.png",
    "s3://bucket/a.png",
    "hf://datasets/a/b/c.png",
    "zip://a.png::http://localhost/a.zip",
)


@pytest.fixture
def data(tmp_path):
    """A folder for data, beside a picture that is none of their business."""
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(folder / "pictures" / "a.png")
    return folder


def row(image):
    return {"prompt": "what ?", "chosen": "blue", "rejected": "green", "image": image}


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("form", ["jsonl", "parquet", "stored in parquet"])
def test_a_path_out_of_the_data_is_refused(path, form, data, tmp_path):
    path = path.replace("{root}", str(tmp_path))
    if form == "jsonl":
        (data / "train.jsonl").write_text("".join(json.dumps(row(name)) + "\n" for name in ("pictures/a.png", path)))
    else:
        cells = [str(data / "pictures" / "a.png"), path]
        stored = [{"bytes": None, "path": cell} for cell in cells] if form.startswith("stored") else cells
        if form == "parquet":
            stored[0] = "pictures/a.png"
        Dataset.from_list([row(cell) for cell in stored]).to_parquet(data / "train.parquet")
    with pytest.raises(ValueError, match="Row 1 of the train split, column 'image'"):
        load_preference_dataset(str(data))


@pytest.mark.parametrize("name", ["~/a.png", "%2e%2e/secret.png", "pictures/a.png\x00.jpg", "$HOME/a.png", "a" * 5000])
def test_an_odd_name_is_only_a_name(name, data):
    (data / "train.jsonl").write_text(json.dumps(row(name)) + "\n")
    with pytest.raises((ValueError, OSError), match="Row 0 of the train split, column 'image'"):
        load_preference_dataset(str(data))


@pytest.mark.parametrize("where", ["/etc/passwd", "https://example.com/a.png", "data:image/png;base64,AAAA", b"x"])
def test_in_python_objects_only_pictures_are_pictures(where, vision_model, tmp_path):
    pair = tiny.pairs(1)[0]
    rows = IterableDataset.from_generator(lambda: ({**pair, "images": [where]} for _ in range(4)))
    args = CWDPOConfig(**tiny.training_options(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match="is no picture") as caught:
        CWDPOTrainer(vision_model, args=args, train_dataset=rows).train()
    assert "Paths are not opened" in str(caught.value)


def test_a_path_within_a_message_is_not_opened(vision_model, tmp_path):
    """A part of a message may bring its picture itself, which nobody reads."""
    pair = tiny.pairs(1)[0]
    pair["prompt"] = [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]
    rows = IterableDataset.from_generator(lambda: ({**pair, "images": []} for _ in range(4)))
    args = CWDPOConfig(**tiny.training_options(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match="Row 0 of the train dataset: 'prompt' has a part that brings its own"):
        CWDPOTrainer(vision_model, args=args, train_dataset=rows).train()


def test_names_in_the_data_do_not_become_files(text_model, tmp_path):
    """Every text and name that data can bring leads out of the folder: nothing is written there."""
    name = "../../escaped"
    rows = [{**pair, "id": name, "category": name, "grade": name, "source": name} for pair in tiny.pairs(12).to_list()]
    out = tmp_path / "a" / "b" / "out"
    args = CWDPOConfig(
        **tiny.training_options(out, max_steps=2, dataset_negative_fraction=0.5, negative_max_completion_length=4),
        probe_steps=1,
    )
    rows = Dataset.from_list(rows)
    CWDPOTrainer(text_model, args=args, train_dataset=rows, eval_dataset=rows).train()
    written = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert written
    assert all(file.is_relative_to(out) for file in written)
    assert not [file for file in written if "escaped" in file.name]


# --- output ----------------------------------------------------------------------------------------------------------

STEERING = "red\x1b[2J\x1b]0;title\x07\r\x08\u202egnp.exe"


def test_texts_of_the_data_do_not_steer_a_terminal(tmp_path, capsys):
    for shown in (printable(STEERING), excerpt(STEERING), format_table([STEERING], [[STEERING]])):
        assert not set("\x1b\x07\r\x08\u202e") & set(shown)
        assert "red" in shown
    assert printable("größer\n\tals 色 — ✓ 👩") == "größer\n\tals 色 — ✓ 👩"
    rows = [{"prompt": STEERING, "chosen": STEERING, "rejected": STEERING}] * 2
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    main(["audit", str(tmp_path / "train.jsonl")])
    printed = capsys.readouterr()
    assert not set("\x1b\x07\x08\u202e") & set(printed.out + printed.err)


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (URL, f"http://{HIDDEN}@localhost:8000/v1"),
        ("https://host/x?api_key=abc&y=1", f"https://host/x?api_key={HIDDEN}&y=1"),
        (f"token {TOKEN}!", f"token {HIDDEN}!"),
        ("sk-" + "a" * 24, HIDDEN),
        ("Authorization: Bearer " + "a" * 24, f"Authorization: Bearer {HIDDEN}"),
        (
            {"hub_token": "x", "eos_token": "</s>", "api_key": "y"},
            {"hub_token": HIDDEN, "eos_token": "</s>", "api_key": HIDDEN},
        ),
        ([{"password": "p", "beta": 0.1}], [{"password": HIDDEN, "beta": 0.1}]),
        (
            {"api_key_variable": "OPENAI_API_KEY", "pad_token": None},
            {"api_key_variable": "OPENAI_API_KEY", "pad_token": None},
        ),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("mail@example.com, http://localhost:8000", "mail@example.com, http://localhost:8000"),
        (3, 3),
    ],
)
def test_secrets_are_hidden_and_nothing_else(value, expected):
    assert redacted(value) == expected


def test_a_token_is_pickled_as_none():
    token = UnpickledToken(TOKEN)
    assert token == TOKEN
    assert copy.deepcopy({"a": token})["a"] == copy.copy(token) == TOKEN
    assert pickle.loads(pickle.dumps({"a": token})) == {"a": None}


def with_secret(folder, *secrets):
    return [
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and any(secret.encode() in file.read_bytes() for secret in secrets)
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_no_file_of_a_run_holds_a_secret(stage, text_model, tmp_path, caplog):
    trainer_class, config_class = STAGES[stage]
    options = tiny.training_options(tmp_path / "out", save_strategy="steps", save_steps=1, max_steps=1)
    args = config_class(**options, hub_token=TOKEN, probe_steps=1)
    assert args.hub_token == TOKEN
    with caplog.at_level(logging.DEBUG):
        trainer = trainer_class(text_model, args=args, train_dataset=tiny.pairs(8), eval_dataset=tiny.pairs(8))
        trainer.train()
        trainer.save_model()
        trainer.create_model_card(model_name="m")
    assert args.hub_token == TOKEN
    assert (tmp_path / "out" / "training_args.bin").is_file()
    assert (tmp_path / "out" / "probe_rows.json").is_file()
    assert with_secret(tmp_path / "out", TOKEN, PASSWORD) == []
    assert TOKEN not in caplog.text
    assert PASSWORD not in caplog.text


def test_no_file_and_no_line_of_the_command_holds_a_secret(text_model, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    tiny.pairs(8).to_json(tmp_path / "pairs.jsonl")
    words = (
        f"cwdpo --model_name_or_path {text_model} --dataset_name {tmp_path / 'pairs.jsonl'} --use_cpu --max_steps 1"
    )
    words += f" --bf16 false --report_to none --output_dir {tmp_path / 'out'} --save_strategy steps --save_steps 1"
    assert main([*words.split(), "--hub_token", TOKEN]) == 0
    assert with_secret(tmp_path / "out", TOKEN, PASSWORD) == []
    assert main([*words.split(), "--vllm_server_base_url", URL]) == 2
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err
    assert PASSWORD not in printed.out + printed.err


@pytest.mark.parametrize(("name", "value"), [("hub_token", TOKEN), ("vllm_server_base_url", URL)])
def test_a_recipe_with_a_secret_is_refused(name, value):
    raw = {"data": {"shapes": True}, "model": {"shapes": True}, "stage2": {name: value}}
    with pytest.raises(RecipeError, match=name) as caught:
        make_recipe(raw)
    assert TOKEN not in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_a_password_in_an_url_is_refused():
    with pytest.raises(ValueError, match="vllm_server_base_url") as caught:
        CWDPOConfig(**tiny.training_options("out"), vllm_server_base_url=URL)
    assert PASSWORD not in str(caught.value)


def test_env_prints_no_secret(capsys, monkeypatch):
    for variable in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(variable, TOKEN)
    monkeypatch.setenv("HTTPS_PROXY", URL)
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert "trl-cwdpo" in printed
    assert TOKEN not in printed
    assert PASSWORD not in printed


def test_the_page_says_where_to_report():
    page = Path(__file__).parent.parent / "SECURITY.md"
    if not page.is_file():
        pytest.skip("SECURITY.md is not beside the tests")
    text = page.read_text()
    assert "Report a vulnerability" in text
    for point in ("No pickle", "No remote code", "No fetching", "No other files", "No shell", "No secrets"):
        assert f"**{point}**" in text

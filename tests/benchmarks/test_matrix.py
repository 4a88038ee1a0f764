"""The YAML file of a benchmark: what it accepts, what it refuses and how, and which cells come of it."""

import pytest

from trl_cwdpo.benchmarks.checks import MatrixError
from trl_cwdpo.benchmarks.configurations import check_options
from trl_cwdpo.benchmarks.matrix import Cell, digest, parse_matrix

GRID = {"learning_rate": ["1e-4", 3e-4], "beta": [0.1, 0.5]}


def matrix(**changes):
    values = {"grid": GRID, "methods": {"dpo": None, "sft": {}}, "selection_seeds": [0, 1], "seeds": [10], **changes}
    return parse_matrix(values)


def test_an_entry_is_the_method_of_its_name():
    found = matrix(methods={"dpo": None, "ours": {"method": "cwdpo", "stage1": "hinge", "options": {"beta": 1}}})
    assert found.methods["dpo"].method == "dpo"
    assert found.methods["ours"].method == "cwdpo"
    assert found.methods["ours"].options == {"beta": 1}


def test_cells():
    found = matrix()
    cells = list(found.grid_cells())
    # DPO has two rates times two β, SFT has no β; with two seeds
    assert len(cells) == 2 * (4 + 2)
    assert cells[0] == Cell("default", "dpo", 1e-4, 0.1, 0)
    assert {cell.beta for cell in cells if cell.method == "sft"} == {0.1}
    chosen = {("default", "dpo"): (3e-4, 0.5)}
    assert list(found.final_cells(chosen)) == [Cell("default", "dpo", 3e-4, 0.5, 10)]
    assert cells[0].name == "default/dpo/lr0.0001-beta0.1-seed0"


def test_regimes_change_what_they_name():
    found = matrix(
        stage2={"options": {"cooling_preset": "paper"}, "steps": 7},
        regimes={"noisy": {"data": {"label_noise": 0.2}, "stage2": {"options": {"max_grad_norm": 2.0}}}, "plain": {}},
    )
    assert found.data_of("noisy").label_noise == 0.2
    assert found.data_of("plain").label_noise == 0.0
    assert found.stage2_of("noisy").options == {"cooling_preset": "paper", "max_grad_norm": 2.0}
    assert found.stage2_of("noisy").steps == 7


def test_settings_tell_cells_apart():
    plain = matrix()
    cell = Cell("default", "dpo", 1e-4, 0.1, 0)
    same = digest(plain.cell_settings(cell))
    assert digest(matrix().cell_settings(cell)) == same
    # Another method elsewhere in the file leaves this cell as it is
    assert digest(matrix(methods={"dpo": {}, "rpo": {}}).cell_settings(cell)) == same
    for change in (
        {"stage2": {"steps": 3}},
        {"stage1": {"steps": 3}},
        {"base": {"steps": 3}},
        {"data": {"label_noise": 0.1}},
        {"methods": {"dpo": {"options": {"weight_decay": 0.1}}}},
    ):
        assert digest(matrix(**change).cell_settings(cell)) != same


def test_label_noise_shares_the_start():
    found = matrix(
        regimes={"plain": {}, "noisy": {"data": {"label_noise": 0.2}}, "hard": {"data": {"grade_mix": {"hard": 1}}}}
    )
    plain, noisy, hard = (digest(found.start_settings(name, "smoothed", 0)) for name in ("plain", "noisy", "hard"))
    assert plain == noisy != hard


def test_selection_runs_never_touch_test_rows():
    assert matrix().splits(0) == ("validation",)
    assert matrix().splits(10) == ("validation", "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metods": {}}, "unknown key 'metods' in the file; did you mean 'methods'"),
        ({"methods": {"dpoo": {}}}, "methods.dpoo.method is 'dpoo', which is unknown; did you mean 'dpo'"),
        ({"methods": {"dpo": {"stage1": "hing"}}}, "did you mean 'hinge'"),
        ({"methods": {}}, "`methods` is empty"),
        ({"seeds": [1, 2]}, r"share \[1\]"),
        ({"grid": {"learning_rate": []}}, "at least one learning_rate"),
        ({"grid": {"learning_rate": ["fast"]}}, "learning_rate must be a number, got 'fast'"),
        ({"grid": None}, "lacks the key 'learning_rate'"),
        ({"stage2": {"steps": 2.5}}, "stage2: steps must be int, got 2.5"),
        ({"stage2": {"steps": True}}, "stage2: steps must be int, got True"),
        ({"regimes": {"noisy": {"data": {"label_nose": 0.1}}}}, "unknown key 'label_nose' in regimes.noisy.data"),
        ({"methods": ["dpo"]}, r"methods must be a mapping of keys to values, got \['dpo'\]"),
        ({"methods": {"dpo": "cwdpo"}}, "methods.dpo must map keys to values, got 'cwdpo'"),
        ({"stage2": {"steps": 0}}, "stage2: `steps` must be 1 or more, got 0"),
        ({"stage1": {"batch_size": 0}}, "stage1: `batch_size` must be 1 or more"),
        ({"stage1": {"learning_rate": -1}}, "stage1: `learning_rate` must be a number above 0"),
        ({"base": {"scenes": 0}}, "base: `scenes` must be 1 or more"),
        ({"data": {"test": 0}}, "data: `test` must be 1 or more, got 0"),
        ({"data": {"label_noise": 1.5}}, r"`label_noise` is a share in \[0, 1\], got 1.5"),
        ({"regimes": {"a": {"data": {"label_noise": 2}}}}, "regimes.a.data: `label_noise`"),
        ({"data": {"grade_mix": {"hrd": 1}}}, "`grade_mix` is 'hrd', which is unknown; did you mean 'hard'"),
        ({"data": {"grade_mix": {"hard": -1}}}, "`grade_mix.hard` must be 0 or more"),
        ({"data": {"grade_mix": {"hard": 0}}}, "no share above 0"),
        ({"grid": {"learning_rate": ["nan"]}}, "grid: `learning_rate` must be a number above 0, got nan"),
        ({"grid": {"learning_rate": [1e-4], "beta": [0]}}, "`beta` must be a number above 0, got 0"),
        ({"grid": {"learning_rate": [1e-4, 0.0001]}}, "`learning_rate` names 0.0001 more than once"),
        ({"seeds": [10, 11, 10]}, "`seeds` names 10 more than once"),
        ({"selection_seeds": [0, 0]}, "`selection_seeds` names 0 more than once"),
        ({"seeds": [], "selection_seeds": [], "grid": {"learning_rate": [1e-4]}}, "there is nothing to run"),
        ({"seeds": 10}, r"seeds must be a list, such as \[1, 2\], got 10"),
        ({"curve_rows": 0}, "`curve_rows` must be 1 or more"),
        ({"regimes": {"a/b": {}}}, "`regimes` has the name 'a/b', which cannot be a folder's"),
        ({"regimes": {"..": {}}}, "cannot be a folder's"),
        ({"methods": {"a/b": {"method": "dpo"}}}, "`methods` has the name 'a/b'"),
        ({"methods": {"start": {"method": "dpo"}}}, "tables have for the start"),
    ],
)
def test_refusals_name_key_and_fix(changes, message):
    with pytest.raises(MatrixError, match=message):
        matrix(**changes)


def test_not_a_mapping():
    with pytest.raises(MatrixError, match="must map keys to values, got \\[\\]"):
        parse_matrix([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": {"cwdpo": {"options": {"cooling_min_wieght": 0.1}}}},
            "unknown option 'cooling_min_wieght' in methods.cwdpo.options; did you mean 'cooling_min_weight'",
        ),
        (
            {"methods": {"cwdpo": {"options": {"cooling_mode": "gat"}}}},
            "methods.cwdpo in the regime default: `cool",
        ),
        (
            {"methods": {"sft": {"options": {"cooling_mode": "gate"}}}},
            "'cooling_mode' in methods.sft.options",
        ),
        ({"stage2": {"options": {"zzz": 1}}}, "in stage2.options; the options of CWDPOConfig are what can be set"),
        ({"stage1": {"options": {"negative_wieght": 1}}}, "in stage1.options; did you mean 'negative_weight'"),
        (
            {"regimes": {"a": {"stage2": {"options": {"bata": 1}}}}},
            "option 'bata' in regimes.a.stage2.options",
        ),
        # A grid would not be the grid that its tables show
        ({"stage2": {"options": {"learning_rate": 1}}}, "that is what `grid.learning_rate` says. Leave it out"),
        (
            {"methods": {"dpo": {"options": {"beta": 1}}}},
            "'beta': 1, but that is what `grid.beta` says",
        ),
        ({"stage1": {"options": {"negative_loss_type": "hinge"}}}, "that is what `stage1` of a method says"),
        ({"stage2": {"options": {"output_dir": "/x"}}}, "that is what `--output_dir` says"),
        (
            {"methods": {"bdpo": {"options": {"cooling_mode": "gate"}}}},
            "`cooling_mode` is 'gate', but Bounded DPO.* is not",
        ),
        ({"stage2": {"options": {"on_policy_chosen": True}}}, "on_policy_chosen|reward: true"),
        (
            {"stage2": {"options": {"negative_selection": "lowest_reward", "dataset_negative_fraction": 0}}},
            "reward: true",
        ),
        ({"lora": {"rank": 3}}, "lora: .*unexpected keyword argument 'rank'"),
    ],
)
def test_options_are_checked_before_anything_runs(changes, message):
    with pytest.raises(MatrixError, match=message):
        check_options(matrix(**changes))


def test_options_that_are_right_pass():
    check_options(
        matrix(
            methods={
                "sft": {"options": {"weight_decay": 0.1}},
                "cwdpo": {"stage1": "skip"},
                "dpop": {"stage1": "hinge"},
            },
            stage1={"options": {"negative_nll_floor": 3.0}},
            regimes={"sampled": {"stage2": {"options": {"dataset_negative_fraction": 0.5}}}},
            lora={"r": 2},
        )
    )

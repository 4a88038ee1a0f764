"""`report`: one page that says what happened, shows only text as text, fetches nothing, and reads without scripts."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest

from trl_cwdpo import report
from trl_cwdpo.cli import main
from trl_cwdpo.probe_flags import ADVICE
from trl_cwdpo.probe_measures import Interval
from trl_cwdpo.probe_records import FamilyMeasure, ProbeRecord, write_records
from trl_cwdpo.report.catalogue import sections_of
from trl_cwdpo.report.colors import COLORS, darkened
from trl_cwdpo.report.contents import charts_of
from trl_cwdpo.report.interactive import figure_of
from trl_cwdpo.report.pictures import column_edges, svg
from trl_cwdpo.report.tracks import read_runs
from trl_cwdpo.report.verdicts import flag_history, judge

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
PIXEL = "data:image/png;base64,iVBORw0KGgo="
FAMILIES = ("chosen", "rejected", "rejected_hard", "rejected_easy", "mismatched", "shuffled", "argmax")
# Change a probe, nats per token
HEALTHY = {"chosen": 0.1, "rejected": -0.1, "rejected_hard": -0.2}
SQUEEZING = {"chosen": -0.1, "rejected": -0.5, "rejected_hard": -0.4, "rejected_easy": -0.6, "argmax": 0.1}


def record(step, changes, **values):
    """A probe of four rows; every family has moved by its change for each ten steps."""
    families = {}
    for name in FAMILIES:
        delta = changes.get(name, 0.0) * step / 10
        rows = (0, 1) if name == "rejected_hard" else (2, 3) if name == "rejected_easy" else (0, 1, 2, 3)
        moved = Interval(delta, delta - 0.01, delta + 0.01)
        mean = Interval(-1 + delta, -1.1 + delta, -0.9 + delta)
        families[name] = FamilyMeasure(mean, rows, tuple(-1 + delta - 0.1 * row for row in rows), moved, None)
    defaults = {
        "entropy": 0.5,
        "top1_mass": 0.8 + step / 1000,
        "brier": 0.2,
        "ece": 0.05,
        "smooth_ece": 0.04,
        "margin": Interval(step / 10, step / 10 - 0.1, step / 10 + 0.1),
        "loser_share": 0.5,
        "weight": 0.5,
        "easy_fraction": 0.25,
        "accuracy": 0.75,
        "row_margins": (1.0, 1.0, 1.0, -1.0) if step else (0.0,) * 4,
        "row_weights": (0.05, 0.35, 0.65, 0.95),
        "reliability": ((3, 0.4, 1 / 3), (5, 0.9, 0.8)),
        "total_variation": 0.01 * step,
        "jensen_shannon": 0.02 * step,
        "squeezing_index": Interval(0.0, -0.01, 0.01),
    }
    return ProbeRecord(step=step, num_rows=4, families=families, **{**defaults, **values})


def write_run(folder, changes=HEALTHY, *, probes=True, log=True, text="a red circle", steps=(0, 10, 20)):
    folder.mkdir(parents=True)
    if probes:
        write_records(folder / "probes.jsonl", [record(step, changes) for step in steps])
        example = {"prompt": text, "chosen": text, "rejected": text, "pictures": [PIXEL, "https://example.org/x.png"]}
        described = {"trainer": "CWDPOTrainer", "options": {"beta": 0.1, "note": text, "seed": 0}}
        rows = [{"index": 10 + i, "hardness": "hard"} for i in range(4)]
        content = {"rows": rows, "examples": [example] * 4, "run": described}
        (folder / "probe_rows.json").write_text(json.dumps(content))
    if log:
        norms = [1.0, 1.1] * 10
        norms[15] = 30.0
        history = [
            {"step": i, "loss": 0.7 - i / 100, "grad_norm": norm, "cooling/weight": 0.5, "cooling/floor": -2.5}
            for i, norm in enumerate(norms, start=1)
        ]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": history}))
    return folder


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.scripts, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("report") / "<b>run&x", text=HOSTILE)
    return Page(report.render_report(read_runs([folder])))


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds: for tests of what else a page says."""
    monkeypatch.setattr("trl_cwdpo.report.page.svg", lambda chart: f"<svg><title>{chart.key}</title></svg>")


class TestPage:
    def test_says_what_happened(self, tmp_path, no_pictures):
        page = Page(report.render_report(read_runs([write_run(tmp_path / "good")])))
        assert "Training report: good" in page.text
        assert "Healthy" in page.text
        assert "Chosen responses gained 0.200 nats per token" in page.text
        assert "22.1% likelier" in page.text  # exp(0.2) - 1
        assert "The margin between them went from 0.00 to 2.00 nats" in page.text
        assert "row 13" in page.text
        assert "weight w 0.95 → 0.95" in page.text
        assert "cooling/floor (solved)" in page.text

    def test_data_stays_text(self, hostile_page):
        assert hostile_page.text.count(HOSTILE) >= 4
        assert "<b>run&x" in hostile_page.text
        assert [attrs.get("id") for tag, attrs in hostile_page.elements if tag == "script"] == [
            "figures",
            "colors",
            "plotly",
            None,
        ]
        assert not any(name.startswith("on") for _, attrs in hostile_page.elements for name in attrs)

    def test_nothing_is_fetched(self, hostile_page):
        links = [
            attrs[name]
            for _, attrs in hostile_page.elements
            for name in ("src", "href", "srcset", "action", "data", "poster")
            if name in attrs
        ]
        assert len(links) > 30
        assert all(link.startswith(("#", "data:")) for link in links)
        assert "url(" not in hostile_page.scripts[-1]

    def test_only_its_own_scripts_may_run(self, hostile_page):
        policy = next(attrs["content"] for tag, attrs in hostile_page.elements if attrs.get("http-equiv"))
        assert "default-src 'none'" in policy
        allowed = re.findall(r"'sha256-([^']+)'", policy)
        from plotly.offline import get_plotlyjs

        for script in (hostile_page.scripts[-1], get_plotlyjs()):
            assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in allowed
        assert len(allowed) == 2

    def test_every_chart_is_a_picture_and_data(self, hostile_page):
        drawn = [attrs["data-chart"] for _, attrs in hostile_page.elements if "data-chart" in attrs]
        figures = json.loads(hostile_page.scripts[0])
        assert drawn == list(figures)
        assert len(drawn) == 16
        pictures = [attrs for tag, attrs in hostile_page.elements if tag == "img" and "Chart" in attrs["alt"]]
        assert len(pictures) == 16
        assert base64.b64decode(pictures[0]["src"].partition(",")[2]).startswith(b"<?xml")

    def test_judges_by_the_numbers_of_the_run(self, tmp_path):
        folder = write_run(tmp_path / "a")
        (track,) = read_runs([folder]).tracks
        assert judge(track).title == "healthy"
        rows = json.loads((folder / "probe_rows.json").read_text())
        rows["run"]["options"]["probe_thresholds"] = {
            "flat": 3.0,
            "strong": 4.0,
            "easy_weight": 0.4,
            "spike_ratio": 99.0,
        }
        (folder / "probe_rows.json").write_text(json.dumps(rows))
        runs = read_runs([folder])
        verdict = judge(runs.tracks[0])
        assert (verdict.title, verdict.tone) == ("nothing moved yet", "neutral")
        assert any("50% of the negatives are easy (w < 0.4)" in sentence for sentence in verdict.sentences)
        charts = {chart.key: chart for chart in charts_of(runs)}
        parts = {name: heights[0] for name, _, heights in charts["stage2-easy-and-hard"].stack.parts}
        assert parts == {"easy (w < 0.4)": 2.0, "between (0.4 to 0.5)": 0.0, "hard (w ≥ 0.5)": 2.0}
        assert charts["stage2-gradient-norm"].lines[-1].style != "points"

    def test_the_same_twice(self, tmp_path, no_pictures):
        runs = read_runs([write_run(tmp_path / "a")])
        assert report.render_report(runs) == report.render_report(runs)
        chart = charts_of(runs)[0]
        assert svg(chart) == svg(chart)

    def test_several_runs_are_laid_over_each_other(self, tmp_path, no_pictures):
        runs = read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", SQUEEZING)])
        page = Page(report.render_report(runs))
        assert "2 runs compared" in page.text
        assert "Squeezing" in page.text
        assert "Set cooling_mode='gate'" in page.text
        margin = json.loads(page.scripts[0])["stage2-margin"]["data"]
        assert [trace["name"] for trace in margin if "name" in trace] == ["a", "b"]
        assert "2 runs" in page.text


class TestCharts:
    def test_plotly_takes_every_figure(self, tmp_path):
        for folders in (["a"], ["b", "c"]):
            charts = charts_of(read_runs([write_run(tmp_path / name) for name in folders]))
            for chart in charts:
                text = json.dumps(figure_of(chart), allow_nan=False)
                # Names of colours are ours; plotly checks the rest
                go.Figure(json.loads(re.sub(r'"@[a-z0-9_]+(/[0-9a-f]{2})?"', '"#123456"', text)))

    def test_weights_fall_into_bins(self, tmp_path):
        charts = {c.key: c for c in charts_of(read_runs([write_run(tmp_path / "a")]))}
        heat_map = charts["stage2-weight-distribution"].heat_map
        assert heat_map.x == (0.0, 10.0, 20.0)
        assert [sum(column) for column in zip(*heat_map.shares, strict=True)] == [1.0, 1.0, 1.0]
        # 0.05, 0.35, 0.65 and 0.95 are lower edges of twenty bins, or a rounding error below
        filled = [row for row, shares in enumerate(heat_map.shares) if shares[0]]
        assert filled == pytest.approx([1, 7, 13, 19], abs=1)
        parts = {name.split()[0]: heights[0] for name, _, heights in charts["stage2-easy-and-hard"].stack.parts}
        assert parts == {"easy": 1.0, "between": 1.0, "hard": 2.0}

    def test_weight_of_the_pairs_trained_on_is_drawn_beside_that_of_the_probed_ones(self, tmp_path):
        folder = write_run(tmp_path / "a")
        later = (record(10, HEALTHY, trained_weight=0.3), record(20, HEALTHY, trained_weight=0.2))
        write_records(folder / "probes.jsonl", [record(0, HEALTHY), *later])
        runs = read_runs([folder])
        chart = next(c for c in charts_of(runs) if c.key == "stage2-cooling-weight")
        probed, trained = chart.lines
        assert (probed.name, probed.y) == ("probed pairs", (0.5, 0.5, 0.5))
        assert (trained.name, trained.x, trained.y) == ("pairs trained on", (10.0, 20.0), (0.3, 0.2))
        assert any(
            "is 0.50 (at first 0.50), of the pairs trained on 0.20" in line for line in judge(runs.tracks[0]).sentences
        )
        two = read_runs([folder, write_run(tmp_path / "b")])
        chart = next(c for c in charts_of(two) if c.key == "stage2-cooling-weight")
        assert [line.name for line in chart.lines] == ["a", "b"]

    def test_all_weights_in_one_bin(self, tmp_path):
        folder = write_run(tmp_path / "a")
        write_records(folder / "probes.jsonl", [record(s, HEALTHY, row_weights=(0.01,) * 4) for s in (0, 10)])
        chart = next(c for c in charts_of(read_runs([folder])) if c.heat_map)
        assert chart.heat_map.shares[0] == (1.0, 1.0)
        assert svg(chart).count(COLORS["accent"][0]) == 2

    def test_gradient_spike_is_marked(self, tmp_path):
        charts = {c.key: c for c in charts_of(read_runs([write_run(tmp_path / "a")]))}
        spikes = charts["stage2-gradient-norm"].lines[-1]
        assert (spikes.x, spikes.y, spikes.style) == ((16.0,), (30.0,), "points")

    def test_what_is_not_known_is_left_out(self, tmp_path):
        folder = write_run(tmp_path / "a")
        bare = {"weight": None, "easy_fraction": None, "row_weights": (), "loser_share": None, "total_variation": None}
        records = [
            record(step, HEALTHY, jensen_shannon=None, squeezing_index=None, ece=math.nan, **bare) for step in (0, 10)
        ]
        write_records(folder / "probes.jsonl", records)
        keys = {chart.key for chart in charts_of(read_runs([folder]))}
        assert "stage2-margin" in keys
        assert not {key for key in keys if "weight" in key or "distance" in key or "squeezing" in key}

    def test_tiny_changes_are_not_blown_up(self, tmp_path):
        folder = write_run(tmp_path / "a")
        write_records(folder / "probes.jsonl", [record(s, HEALTHY, top1_mass=0.8 + s / 1e6) for s in (0, 10)])
        chart = next(c for c in charts_of(read_runs([folder])) if c.key == "stage2-top1-mass")
        low, high = chart.y_range
        assert high - low == pytest.approx(0.055)
        assert low < 0.8 < high

    def test_pictures_are_recoloured_for_dark_pages(self, tmp_path):
        chart = charts_of(read_runs([write_run(tmp_path / "a")]))[0]
        drawn = svg(chart)
        dark = darkened(drawn)
        assert COLORS["chosen"][0] in drawn
        assert COLORS["chosen"][1] in dark
        assert not any(f"{light}" in dark for light, _ in COLORS.values())

    def test_names_are_no_formulas(self, tmp_path):
        chart = charts_of(read_runs([write_run(tmp_path / "_$a_{", text="x"), write_run(tmp_path / "$\\frac$")]))[0]
        assert svg(chart).startswith("<?xml")
        assert [line.name for line in chart.lines] == ["_$a_{", "$\\frac$"]

    def test_column_edges(self):
        assert column_edges((0.0, 10.0, 30.0)) == [-5.0, 5.0, 20.0, 40.0]
        assert column_edges((4.0,)) == [3.5, 4.5]


class TestVerdict:
    def test_flags_over_time(self):
        records = [record(0, SQUEEZING), record(10, SQUEEZING), record(20, HEALTHY, total_variation=0.3)]
        history = {flag.name: flag for flag in flag_history(records)}
        displaced = history["displacement"]
        assert (displaced.first_step, displaced.probes, displaced.of, displaced.is_raised) == (10, 1, 3, False)
        assert history["drift"].is_raised
        assert "not raised any more" in str(displaced)

    def test_supervised_runs_get_no_diagnosis_of_pairs(self, tmp_path):
        track = read_runs([write_run(tmp_path / "a")]).tracks[0]
        verdict = judge(replace(track, stage="stage1"))
        assert (verdict.title, verdict.advice) == ("no flags", "Go on with stage 2.")
        drifted = replace(track, stage="stage1", records=(*track.records, record(30, HEALTHY, total_variation=0.4)))
        verdict = judge(drifted)
        assert (verdict.title, verdict.advice) == ("flags: drift", f"Drift: {ADVICE['drift']}")
        still = replace(track, stage="stage1", records=(record(0, {}), record(10, {})))
        verdict = judge(still)
        assert (verdict.title, verdict.tone) == ("nothing moved yet", "neutral")
        assert "`beta`" not in verdict.advice

    def test_where_no_pattern_fits_the_flags_say_what_to_do(self, tmp_path, no_pictures):
        odd = {"chosen": 0.3, "rejected": 0.3, "rejected_hard": -0.3, "rejected_easy": 0.3}
        folder = write_run(tmp_path / "a", odd)
        (track,) = read_runs([folder]).tracks
        assert judge(track).advice == "No known pattern: look at the single families."
        write_records(folder / "probes.jsonl", [record(0, odd), record(10, odd, ece=0.2)])
        runs = read_runs([folder])
        verdict = judge(runs.tracks[0])
        assert (verdict.title, verdict.tone) == ("unclear", "watch")
        assert verdict.advice.endswith(f"by the flags: Miscalibration: {ADVICE['miscalibration']}")
        assert "Train for fewer steps, lower learning_rate or raise beta ." in Page(report.render_report(runs)).text

    def test_missing_probes(self, tmp_path, no_pictures):
        runs = read_runs([write_run(tmp_path / "a", probes=False)])
        verdict = judge(runs.tracks[0])
        assert verdict.title == "not probed"
        page = Page(report.render_report(runs))
        assert "DeltaLogpProbeCallback(trainer, held_out_pairs)" in page.text
        assert "Training loss" in page.text

    def test_missing_log(self, tmp_path):
        verdict = judge(read_runs([write_run(tmp_path / "a", log=False)]).tracks[0])
        assert any("trainer.save_state()" in line for line in verdict.missing)


class TestReading:
    def test_folder_of_the_pipeline(self, tmp_path, no_pictures):
        write_run(tmp_path / "run" / "stage1")
        write_run(tmp_path / "run" / "stage2")
        numbers = {"accuracy": 0.9, "margin": {"mean": 1.5}, "ece": 0.1, "brier": 0.2, "tv": 0.3, "top1_mass": 0.8,
                   "families": {"chosen": {"delta0": {"mean": 0.25}}, "rejected": {"delta0": None}}}  # fmt: skip
        of_loss = {"weight": 0.625, "easy_fraction": None, "loser_share": 0.375}
        models = {"stage1": numbers, "stage2": {**numbers, **of_loss}}
        evaluation = {"reference": "stage1", "num_pairs": 7, "models": models}
        (tmp_path / "run" / "evaluation.json").write_text(json.dumps(evaluation))
        runs = read_runs([tmp_path / "run"])
        assert [(track.name, track.stage) for track in runs.tracks] == [("run", "stage1"), ("run", "stage2")]
        page = Page(report.render_report(runs))
        assert "Stage 1: supervised finetuning" in page.text
        assert "7 held-out pairs; changes, margins and distances from stage1" in page.text
        assert "90.0%" in page.text
        assert "TV mean w loser share" in page.text
        assert "0.300 – – stage2" in page.text
        assert "0.300 0.62 0.38" in page.text

    def test_newest_readable_state(self, tmp_path):
        folder = write_run(tmp_path / "a", log=False)
        for step, text in ((10, None), (20, '{"global_step": 20, "log_hi')):
            checkpoint = folder / f"checkpoint-{step}"
            checkpoint.mkdir()
            state = json.dumps({"global_step": step, "log_history": [{"step": step, "loss": 0.5}]})
            (checkpoint / "trainer_state.json").write_text(text or state)
        assert read_runs([folder]).tracks[0].logged("loss") == ([10], [0.5])

    def test_stage_is_told_by_what_was_logged(self, tmp_path):
        folder = write_run(tmp_path / "a", log=False)
        write_records(folder / "probes.jsonl", [record(0, HEALTHY, loser_share=None)])
        assert read_runs([folder]).tracks[0].is_supervised
        (folder / "run.json").write_text(json.dumps({"command": "cwdpo", "options": {"beta": 0.3}}))
        track = read_runs([folder]).tracks[0]
        assert not track.is_supervised
        assert track.options["beta"] == 0.3

    def test_names_tell_runs_apart(self, tmp_path):
        folders = [write_run(tmp_path / name) for name in ("x/out", "y/out", "z")]
        assert [track.name for track in read_runs(folders).tracks] == ["x/out", "y/out", "z"]

    def test_pictures_from_elsewhere_are_left_out(self, tmp_path):
        kinds = report.summary_of(read_runs([write_run(tmp_path / "a")]))["runs"][0]["examples"]
        assert [kind["kind"] for kind in kinds] == ["Hardest negatives"]
        assert [row["pictures"] for row in kinds[0]["rows"]] == [1, 1, 1, 1]
        assert [row["index"] for row in kinds[0]["rows"]] == [13, 12, 11, 10]

    def test_json_holds_everything(self, tmp_path):
        runs = read_runs([write_run(tmp_path / "a")])
        found = json.loads(json.dumps(report.summary_of(runs), allow_nan=False))["runs"][0]
        assert found["diagnosis"]["name"] == "healthy"
        assert [probe["step"] for probe in found["probes"]] == [0, 10, 20]
        assert found["gradient_spikes"] == [{"step": 16, "norm": 30.0}]
        assert len(found["log"]) == 20

    def test_sections_need_no_stage_two(self, tmp_path):
        track = read_runs([write_run(tmp_path / "a")]).tracks[0]
        assert next(section.key for section in sections_of("stage1", [track])) == "stage1-responses"


class TestCommand:
    def test_writes_page_pictures_and_numbers(self, tmp_path, capsys):
        folder = write_run(tmp_path / "a")
        assert main(["report", str(folder), "--png", str(tmp_path / "p"), "--json", str(tmp_path / "n.json")]) == 0
        said = capsys.readouterr().out
        assert "healthy. Go on." in said
        assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
        pictures = sorted(file.name for file in (tmp_path / "p").iterdir())
        assert "stage2-delta-logp.png" in pictures
        assert (tmp_path / "p" / pictures[0]).read_bytes().startswith(b"\x89PNG")
        assert json.loads((tmp_path / "n.json").read_text())["runs"][0]["name"] == "a"

    def test_json_alone(self, tmp_path, capsys, no_pictures):
        folder = write_run(tmp_path / "a", probes=False)
        assert main(["report", str(folder), "-o", str(tmp_path / "sub" / "r.html"), "--json", "-"]) == 0
        assert json.loads(capsys.readouterr().out)["runs"][0]["diagnosis"]["name"] == "not probed"
        assert (tmp_path / "sub" / "r.html").is_file()

    def test_no_run(self, tmp_path, capsys):
        assert main(["report", str(tmp_path)]) == 1
        assert "holds no training run" in capsys.readouterr().err
        assert main(["report", str(tmp_path / "nowhere")]) == 1
        assert "is no folder" in capsys.readouterr().err

    def test_broken_records(self, tmp_path, capsys):
        folder = write_run(tmp_path / "a")
        (folder / "probes.jsonl").write_text("{}\n{}\n")
        assert main(["report", str(folder)]) == 1
        assert "line 1 is no probe record" in capsys.readouterr().err

    def test_missing_extra(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(report, "find_spec", lambda name: None if name == "plotly" else True)
        folder = write_run(tmp_path / "a")
        assert main(["report", str(folder)]) == 1
        assert 'needs plotly. Install what is missing: pip install "trl-cwdpo[report]"' in capsys.readouterr().err
        with pytest.raises(ImportError, match=r"pip install \"trl-cwdpo\[report\]\""):
            report.write_report([folder], tmp_path / "r.html")
        assert not (folder / "report.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The page after its scripts, what the console said, and the addresses that were asked for."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [write_run(folder / "a", text=HOSTILE), write_run(folder / "b", SQUEEZING)]
    file, log = folder / "r.html", folder / "net.json"
    report.write_report(runs, file)
    run = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--no-first-run", "--window-size=1280,12000",
         "--virtual-time-budget=20000", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}",
         f"--log-net-log={log}", "--dump-dom", f"file://{file}"],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    return run.stdout, run.stderr, log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
class TestBrowser:
    def test_charts_are_drawn(self, seen):
        page = Page(seen[0])
        plots = [attrs for _, attrs in page.elements if "data-chart" in attrs]
        drawn = [attrs for _, attrs in page.elements if "js-plotly-plot" in attrs.get("class", "")]
        assert len(drawn) == len(plots) > 15

    def test_console_is_silent(self, seen):
        assert [line for line in seen[1].splitlines() if "CONSOLE" in line] == []

    def test_no_request(self, seen):
        # The browser itself may look for updates; what a page asks for has the page as its initiator
        asked = set(re.findall(r'"initiator":"([^"]*)"', seen[2])) - {"not an origin"}
        assert asked == set()

    def test_hostile_text_stays_text(self, seen):
        page = Page(seen[0])
        assert HOSTILE in page.text
        assert not any(name.startswith("onerror") for _, attrs in page.elements for name in attrs)

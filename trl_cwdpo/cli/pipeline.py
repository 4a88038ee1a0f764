"""`trl-cwdpo run`: take a recipe's steps one after the other, and pick up where an earlier attempt has ended.

Each step is a process of its own (`pipeline_steps`). What it depends on is written down before it starts, and that it
has finished afterwards: a finished step whose inputs are what they were is skipped, an unfinished one goes on from its
last checkpoint, and a step whose inputs have changed is refused rather than mixed with what is there.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from trl_cwdpo.cli.env import versions
from trl_cwdpo.cli.errors import CommandError
from trl_cwdpo.cli.exit_codes import DONE, STOPPED_BY_RULE
from trl_cwdpo.cli.fingerprints import data_fingerprint, digest_of, model_fingerprint
from trl_cwdpo.cli.pipeline_plan import (
    CONFIG,
    MERGE,
    NEGATIVES,
    PROBES,
    RECORD,
    REPORT_NEEDS,
    REPORT_STEP,
    SPLIT,
    STAGE1,
    STAGE2,
    Layout,
    command_of,
    dataset_options,
    result_of,
    section_of,
    stage_options,
    start_model,
    start_of,
    steps_of,
    title_of,
    trainings_of,
)
from trl_cwdpo.cli.pipeline_steps import LIFELINE, write_json
from trl_cwdpo.cli.recipe import Recipe, make_recipe
from trl_cwdpo.interrupts import SIGNALS

HEADER = "# Written by `trl-cwdpo run`: the recipe of this folder with all defaults. The folder belongs to the run.\n"
# Where the folder stands, and what it is called, is no part of what was trained
NAMES = ("name", "description", "output_dir")
LOCK = ".lock"
# Seconds to wait for the last step of a killed run to notice that it has been left alone
PATIENCE = 20.0


class Pipeline:
    """
    A run of a recipe.

    Args:
        recipe ([`Recipe`]):
            The recipe.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.layout = Layout(recipe.output_dir)
        self.trainings = trainings_of(recipe)
        self.durations: dict[str, float] = {}

    def run(self, *, overwrite: bool = False) -> int:
        """
        Take all steps.

        Args:
            overwrite (`bool`, *optional*, defaults to `False`):
                Whether to remove what an earlier run has left in the folder.

        Returns:
            `int`: The exit code: that of the first step that did not succeed, or 0.

        Raises:
            CommandError: If the folder belongs to something else, to another recipe, or to a run that is going on.
        """
        with self._locked():
            self._claim(overwrite=overwrite)
            for step in ("check", *steps_of(self.recipe)):
                code = self._take(step)
                if code != DONE:
                    return code
            self._gather_probes()
            self._record()
            self._report()
        print(f"\nDone: {self.layout.folder}")
        return DONE

    def _take(self, step: str) -> int:
        if step == "check":
            self._write_stage_options()
            return self._start(step)
        if step in self.trainings:
            self._write_stage_options()
        inputs = self.inputs(step)
        known = _read_json(self.layout.state(step)) or {}
        self._refuse_changed_inputs(step, known.get("inputs"), inputs)
        if known.get("finished") and known.get("result") == self.result(step):
            print(f"\n{title_of(step)}: done before ({known['seconds']:.1f} s)")
            self.durations[step] = known["seconds"]
            return DONE
        # A stage says itself what it is
        print("" if step in self.trainings else f"\n{title_of(step)}", flush=True)
        write_json(self.layout.state(step), {"inputs": inputs, "finished": None})
        begin = time.monotonic()
        code = self._start(step)
        if code == STOPPED_BY_RULE:
            print("  A rule over the probes ended the stage; the pipeline goes on with the model it left.")
        if code not in (DONE, STOPPED_BY_RULE):
            return code
        self.durations[step] = round(time.monotonic() - begin, 3)
        finished = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": self.durations[step]}
        write_json(self.layout.state(step), {"inputs": inputs, "result": self.result(step), **finished})
        return DONE

    def inputs(self, step: str) -> dict[str, str]:
        """
        Digests of all that a step depends on.

        Args:
            step (`str`):
                The step.

        Returns:
            `dict[str, str]`: Digest by what it is of, as a message would name it.
        """
        recipe, layout = self.recipe, self.layout
        if step.startswith(MERGE):
            return {"the adapter": model_fingerprint(str(layout / step.removeprefix(MERGE)))}
        data = {"the data": self._data_digest()} if step != "prepare" or self._has_data() else {}
        if step == "prepare":
            return data
        split = {**data, "the split": data_fingerprint(str(layout / SPLIT))}
        if step == "evaluate":
            results = {f"{name}'s result": model_fingerprint(result_of(recipe, name)) for name in self.trainings}
            return {**split, **results}
        training = step.removesuffix(NEGATIVES)
        start = {"the model it starts from": model_fingerprint(start_of(recipe, training))}
        if step.endswith(NEGATIVES):
            return {**split, "the options": digest_of(recipe[section_of(training)]), **start}
        options = stage_options(recipe, training, _read_json(layout / SPLIT) or {})
        negatives = layout / f"{training}{NEGATIVES}"
        made = {"the negatives": data_fingerprint(str(negatives))} if negatives.exists() else {}
        return {**split, **made, "the options": digest_of(options), **start}

    def result(self, step: str) -> str:
        """A digest of what a step leaves behind; it tells whether that is still there."""
        layout = self.layout
        if step in self.trainings:
            return model_fingerprint(str(layout / step))
        if step.startswith(MERGE):
            return model_fingerprint(result_of(self.recipe, step.removeprefix(MERGE)))
        if step.endswith(NEGATIVES):
            return data_fingerprint(str(layout / step))
        if step == "evaluate":
            return str((layout / "evaluation.json").is_file())
        return f"{data_fingerprint(str(layout / SPLIT))} {model_fingerprint(start_model(self.recipe))}"

    def _data_digest(self) -> str:
        names = [dataset_options(self.recipe, stage) for stage in (STAGE1, STAGE2)]
        return digest_of([data_fingerprint(str(options.get("dataset_name"))) for options in names] + names)

    def _has_data(self) -> bool:
        # Drawn data may not have been drawn yet
        return self.recipe["data"]["shapes"] is None

    def _refuse_changed_inputs(self, step: str, before: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
        changed = [] if before is None else [name for name in now if before.get(name) != now[name]]
        if changed:
            raise CommandError(
                f"{' and '.join(changed)} changed since {title_of(step).split(':')[0].lower()!r} was begun in "
                f"{self.layout.folder}. Put back what was there, start over with --overwrite, or use another folder "
                "with --output_dir."
            )

    def _write_stage_options(self) -> None:
        import yaml  # type: ignore[import-untyped, unused-ignore]

        split = _read_json(self.layout / SPLIT) or {}
        for stage in self.trainings:
            text = yaml.safe_dump(stage_options(self.recipe, stage, split), sort_keys=False, allow_unicode=True)
            alone = f"trl-cwdpo {command_of(stage)} --config"
            header = f"# Written by `trl-cwdpo run`: this stage alone is `{alone}` this file.\n"
            self.layout.stage_config(stage).write_text(header + text, encoding="utf-8")

    def _claim(self, *, overwrite: bool) -> None:
        import yaml  # type: ignore[import-untyped, unused-ignore]

        folder, config = self.layout.folder, self.layout / CONFIG
        present = [name for name in self.layout.owned if (self.layout / name).exists()]
        if present and not (config.is_file() and config.read_text(encoding="utf-8").startswith(HEADER)):
            raise CommandError(
                f"{folder} holds {present[0]}, which this command did not write. Move it away, or name another folder "
                "with --output_dir."
            )
        if present and overwrite:
            for name in present:
                _remove(self.layout / name)
        elif present:
            self._refuse_another_recipe(make_recipe(_read_yaml(config)))
        config.write_text(
            HEADER + yaml.safe_dump(self.recipe.values, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )

    def _refuse_another_recipe(self, before: Recipe) -> None:
        old, new = before.flat(), self.recipe.flat()
        changed = [key for key in sorted({*old, *new} - set(NAMES)) if old.get(key) != new.get(key)]
        if changed:
            shown = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in changed[:5])
            more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise CommandError(
                f"{self.layout.folder} holds a run of another recipe ({shown}{more}). Start over with --overwrite, or "
                "use another folder with --output_dir."
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        try:
            self.layout.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.layout / LOCK, timeout=PATIENCE):
                yield
        except Timeout as error:
            raise CommandError(
                f"Another `trl-cwdpo run` is writing to {self.layout.folder}. Wait for it, stop it, or use another "
                "folder with --output_dir."
            ) from error
        except OSError as error:
            raise CommandError(f"The output folder {self.layout.folder} cannot be used: {error}") from error

    def _start(self, step: str) -> int:
        reading, writing = os.pipe()
        os.set_inheritable(reading, True)  # noqa: FBT003 (positional-only)
        # `-P`: a user's file, such as datasets.py, must not stand in for the package of that name
        words = [sys.executable, "-P", "-m", "trl_cwdpo.cli.pipeline_steps", step, str(self.layout.folder)]
        try:
            process = subprocess.Popen(words, pass_fds=(reading,), env={**os.environ, LIFELINE: str(reading)})
            with _passing_signals_to(process):
                code = process.wait()
        finally:
            os.close(reading)
            os.close(writing)
        if code == -signal.SIGKILL:
            print(f"  {step} was ended by SIGKILL. Being out of memory is the usual reason.", file=sys.stderr)
        return 128 - code if code < 0 else code

    def _gather_probes(self) -> None:
        records = []
        for stage in self.trainings:
            file = self.layout / stage / PROBES
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            records += [json.dumps({"stage": stage, **json.loads(line)}) for line in lines]
        if records:
            (self.layout / PROBES).write_text("\n".join(records) + "\n", encoding="utf-8")

    def _report(self) -> None:
        missing = [name for name in REPORT_NEEDS if find_spec(name) is None]
        if missing:
            print(f'\nNo report.html: {", ".join(missing)} missing. Install with: pip install "trl-cwdpo[report]"')
        elif self._start(REPORT_STEP) != DONE:
            # All results are there: a report can be made of them at any time
            print(f"\nThe report could not be written; `trl-cwdpo report {self.layout.folder}` tries again.")

    def _record(self) -> None:
        recipe = self.recipe
        write_json(
            self.layout / RECORD,
            {
                "name": recipe["name"],
                "seed": recipe["seed"],
                "data": {
                    "names": [dataset_options(recipe, stage).get("dataset_name") for stage in (STAGE1, STAGE2)],
                    "digest": self._data_digest(),
                },
                "models": {
                    "start": model_fingerprint(start_model(recipe)),
                    **{name: model_fingerprint(result_of(recipe, name)) for name in self.trainings},
                },
                "seconds": self.durations,
                "versions": versions(),
            },
        )


def _read_json(file: Path) -> Any:  # noqa: ANN401 (any JSON value)
    """What a file holds, or None where it is not there."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _read_yaml(file: Path) -> Any:  # noqa: ANN401 (any YAML value)
    import yaml  # type: ignore[import-untyped, unused-ignore]

    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _passing_signals_to(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """A step saves its checkpoint and ends; a terminal sends it Ctrl-C by itself."""

    def handle(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

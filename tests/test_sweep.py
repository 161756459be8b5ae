"""The whole path of a user: Hydra, embedded model, lmms-eval's tasks, records, tables, errors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from sweeping import Sweeps, cells

from secateur.store import read

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"COLUMNS": "200"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def sweep(results: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *overrides, f"results={results}"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=280
    )


TASKS = ("pope", "scienceqa_img", "gqa", "mme", "mmmu_val", "mmstar")
GRID = ("-m", "pruner=none,scope", "budget=16", "limit=12", f"tasks=[{','.join(TASKS)}]")


def here(results: Path, *overrides: str) -> tuple[int, str]:
    """The same in this process, which is faster: exit code, and what was printed."""
    return Sweeps(results / "data" / "shapes", ()).here(results, *overrides)


@pytest.fixture(scope="module")
def swept(results: Path) -> subprocess.CompletedProcess:
    return sweep(results, *GRID)


def test_a_multirun_fills_every_cell_and_prints_the_table(results, swept):
    assert swept.returncode == 0, swept.stderr
    assert "cells: 12 done, 0 skipped, 0 failed" in swept.stderr
    assert "suite shapes, model shapes_llava" in swept.stdout
    assert set(cells(results)) == {
        f"{task}/{cell}" for task in TASKS for cell in ("none_full", "scope_16")
    }
    (path,) = (results / "tables").glob("shapes_shapes_llava_12_*.csv")
    table = pd.read_csv(path)
    assert table["method"].tolist() == ["none", "scope"]
    assert table["tokens"].tolist() == [144, 16]
    assert table["relative %"][0] == 100
    assert table.drop(columns=["method", "budget"]).notna().all().all()


def test_a_record_stands_alone(results, swept):
    folder = cells(results)["pope/scope_16"]
    record = json.loads((folder / "record.json").read_text())
    identity = record["identity"]
    assert identity["pruner"]["alpha"] == 1.0
    assert identity["model"]["dtype"] == "float32"
    assert set(identity["versions"]) == {"torch", "transformers", "lmms-eval", "secateur"}
    assert {
        "pope_accuracy",
        "pope_f1_score",
        "pope_precision",
        "pope_recall",
        "pope_yes_ratio",
    } <= set(record["metrics"])
    rows = pd.read_parquet(folder / "samples.parquet")
    assert len(rows) == record["documents"] == 12
    assert (rows["visual_tokens"] == 144).all()
    assert (rows["kept_tokens"] == 16).all()
    assert rows["score"].mean() == pytest.approx(record["metrics"]["pope_accuracy"])
    assert rows["prompt"].str.contains("Answer the question using a single word or phrase.").all()


def test_a_second_sweep_does_nothing_and_says_so(results, swept):
    before = {path: path.stat().st_mtime_ns for path in results.rglob("record.json")}
    code, printed = here(results, *GRID)
    assert code == 0
    assert "cells: 0 done, 12 skipped, 0 failed" in printed
    assert {path: path.stat().st_mtime_ns for path in results.rglob("record.json")} == before


def test_a_failing_cell_is_recorded_and_the_others_go_on(results, swept):
    code, printed = here(results, "-m", "pruner=scope", "budget=200,16", "limit=12", "tasks=[pope]")
    assert code == 1
    assert "budget=200: the image has only 144 visual tokens" in printed
    assert "cells: 0 done, 1 skipped, 1 failed" in printed
    (failure,) = (results / "runs").rglob("*.failed.json")
    assert "Traceback" in json.loads(failure.read_text())["traceback"]
    code, printed = here(results, "pruner=scope", "budget=200", "limit=12", "tasks=[pope]")
    assert code == 1
    assert "set retry_failed=true" in printed


def test_an_edited_record_is_refused_by_name(results, swept):
    folder = cells(results)["gqa/none_full"]
    text = (folder / "record.json").read_text()
    try:
        (folder / "record.json").write_text(text.replace('"documents": 12', '"documents": 13'))
        code, printed = here(results, "pruner=none", "limit=12", "tasks=[gqa]")
    finally:
        (folder / "record.json").write_text(text)
    assert code == 1
    assert str(folder) in printed.replace(" ", "")


def test_an_unknown_method_lists_the_known_ones(results):
    code, printed = here(results, "pruner=nope")
    assert code != 0
    assert "Available options in 'pruner'" in printed
    assert "Traceback" not in printed


def test_a_missing_model_is_one_paragraph(results):
    code, printed = here(results, "model.pretrained=/nowhere/llava", "limit=2", "tasks=[pope]")
    assert code == 1
    assert "the model /nowhere/llava, revision main: this is neither a folder here" in printed
    assert "Correct model.pretrained." in printed
    assert "Traceback" not in printed


def test_a_results_folder_that_cannot_be_written_is_one_paragraph(tmp_path):
    (tmp_path / "file").write_text("")
    code, printed = here(tmp_path / "file" / "results")
    assert code == 1
    assert "cannot be written" in printed
    assert "Traceback" not in printed


@pytest.mark.faults  # a process of its own; test_faults.py interrupts a fork
def test_an_interrupt_keeps_what_is_finished(results, swept, tmp_path):
    command = Sweeps(results / "data" / "shapes", ("pruner=random", "limit=40")).command(tmp_path)
    process = subprocess.Popen(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    deadline = time.time() + 200
    while not cells(tmp_path) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Finished cells and answers are kept" in errors
    finished = cells(tmp_path)
    assert finished
    assert all(read(folder).documents == 40 for folder in finished.values())


def test_make_takes_no_value_with_a_space():
    run = subprocess.run(
        ["make", "-n", "sweep", "results=/data/a b"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"},
    )
    assert run.returncode == 2
    assert 'make takes no value with a space ("b")' in run.stderr

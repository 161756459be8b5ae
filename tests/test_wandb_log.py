"""What `logger=wandb` writes offline, read back from the files that `wandb sync` uploads."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb
from cells import cell, rows, save
from sweeping import Sweeps
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from secateur.progress import console
from secateur.reporting.wandb_log import WandbLog
from secateur.store import Store

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"project": "p", "entity": None, "mode": "offline", "samples": 5, "overlays": 0}


@pytest.fixture(autouse=True)
def _no_login(monkeypatch):
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_PROJECT",
        "WANDB_ENTITY",
        "WANDB_DIR",
        "WANDB_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def printed(monkeypatch) -> Callable[[], str]:
    """What the console has shown, in one line."""
    shown = io.StringIO()
    monkeypatch.setattr(console, "file", shown)
    return lambda: " ".join(shown.getvalue().split())


def runs(folder: Path) -> list[dict]:
    """Every offline run in the order of writing: run, config, what was logged, folder of files."""
    wandb.teardown()  # its process goes on writing until it ends
    found = []
    for path in sorted(
        folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns
    ):
        store, read = DataStore(), {"files": path.parent / "files", "logged": {}}
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                read["run"] = record.run
                read["config"] = {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            for item in record.history.item:
                read["logged"][
                    "/".join([item.key, *item.nested_key] if item.key else item.nested_key)
                ] = json.loads(item.value_json)
            if record.WhichOneof("record_type") == "exit":
                read["exit"] = record.exit.exit_code
        found.append(read)
    return found


def table(run: dict, name: str) -> dict:
    return json.loads((run["files"] / run["logged"][f"{name}/path"]).read_text())


def results(
    folder: Path,
    methods: tuple[str, ...] = ("none", "scope"),
    task: str = "gqa",
    share: float = 0.5,
) -> list[dict]:
    """Records of a results folder of made-up cells."""
    store = Store(folder)
    for method in methods:
        samples = rows(task, share if method != "none" else 0.75, 400)
        full = method == "none"
        made = cell(
            "llava_1_5_7b", method, "full" if full else "64", task, samples, 576 if full else 64
        )
        extra = {
            "kept_indices": [[[1]]] * 400,
            "layer_tokens": [[64] * 32] * 400,
            "seconds": 0.5,
            "prompt": "<script>",
        }
        extra |= {"prompt_tokens": 100, "visual_tokens": 576}
        save(folder, made._replace(rows=samples.assign(**extra)))
    return store.records()


def log(folder: Path, **options) -> WandbLog:
    suite = {"name": "hub", "revision": "main", "data_root": None}
    return WandbLog(folder, suite, "fsr_table1", folder=str(folder), **OPTIONS | options)


def test_a_sweep_is_a_run_a_cell_and_one_of_tables(shapes, tmp_path):
    sweeps = Sweeps(shapes, ("pruner=none,scope", "budget=16", "tasks=[pope]", "limit=12"))
    code, printed = sweeps.here(tmp_path, "-m", "logger=wandb", "logger.overlays=2")
    assert code == 0, printed
    assert "wandb, offline: 3 runs logged, 0 were logged before" in printed
    found = runs(tmp_path)
    assert [run["exit"] for run in found] == [0] * 3
    assert len({run["run"].run_group for run in found}) == 1
    assert Counter(run["run"].job_type for run in found) == {"cell": 2, "tables": 1}
    record = next(record for record in Store(tmp_path).records() if record.identity.budget == "16")
    scope = next(run for run in found if "method:scope" in run["run"].tags)
    assert set(scope["run"].tags) == {
        "model:shapes_llava",
        "method:scope",
        "budget:16",
        "suite:shapes",
        "task:pope",
    }
    own = record.identity.as_json()
    assert {key: scope["config"][key] for key in own} == own
    logged = scope["logged"]
    assert (
        logged["score/value"]
        == logged["pope_f1/value"]
        == pytest.approx(100 * record.metrics["pope_f1_score"])
    )
    assert logged["metrics/pope_yes_ratio"] == record.metrics["pope_yes_ratio"]
    assert logged["kept_tokens"] == record.kept_tokens == 16
    assert logged["flops/first_token"] > 0
    assert 0 < logged["answer_seconds/median"] <= logged["answer_seconds/p90"]
    assert table(scope, "samples")["columns"][0] == "doc_id"
    assert len(table(scope, "samples")["data"]) == 12
    assert len(list(scope["files"].glob("media/images/overlays*.png"))) == 2, (
        "of two scenes, what was kept"
    )
    unpruned = next(run for run in found if "method:none" in run["run"].tags)
    assert not list(unpruned["files"].glob("media/images/*")), "nothing was dropped"
    # one of its answers is wrong; without a wrong one there is no interval
    low, value, high = (unpruned["logged"][f"pope_accuracy/{k}"] for k in ("low", "value", "high"))
    assert low <= value <= high
    tables = found[-1]
    assert tables["logged"]["cells"] == 2
    assert [row[0] for row in table(tables, "accuracy")["data"]] == ["none", "scope"]
    comparison = table(tables, "comparison")
    assert {"difference_low", "p_holm", "tied_best"} <= set(comparison["columns"])
    assert {path.name.rsplit("_", 2)[0] for path in tables["files"].glob("media/images/*")} == {
        "accuracy_flops",
        "agreement",
        "tasks",
    }
    assert "| budget" in tables["run"].notes


def test_a_cell_is_logged_once_a_sweep_and_again_when_its_record_is_another(tmp_path):
    records = results(tmp_path)
    assert log(tmp_path).log(records)
    assert log(tmp_path).log(records)
    assert len(runs(tmp_path)) == 3, "two cells, one table"
    folder = Store(tmp_path).cell(records[1].identity).folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert log(tmp_path).log(results(tmp_path, ("scope",), share=0.6))
    names = [run["run"].display_name for run in runs(tmp_path)]
    assert names[3] == "gqa scope at 64"
    assert names[4].startswith("tables of fsr_table1_hub_llava_1_5_7b_all_")
    assert len(names) == 5
    assert runs(tmp_path)[3]["run"].run_id == runs(tmp_path)[1]["run"].run_id


def test_tables_of_documents_are_cut_and_hold_text_as_it_is(tmp_path):
    assert log(tmp_path).log(results(tmp_path))
    samples = table(runs(tmp_path)[0], "samples")
    assert len(samples["data"]) == 5
    assert "kept_indices" not in samples["columns"]
    assert samples["data"][0][samples["columns"].index("prompt")] == "<script>"


def test_what_cannot_be_computed_is_noted_and_the_rest_logged(tmp_path):
    assert log(tmp_path, overlays=1).log(results(tmp_path, ("scope",), share=1.0))
    found, tables = runs(tmp_path)
    assert found["logged"]["score/value"] == 100
    assert "score/low" not in found["logged"]
    assert (
        "No interval of accuracy: resampling the images does not change it." in found["run"].notes
    )
    assert "No pictures of kept tokens: the data set" in found["run"].notes
    missing = "task gqa has no unpruned cell to compare with; run it with pruner=none"
    assert missing in tables["run"].notes


def test_a_run_that_fails_is_named_and_the_others_are_logged(tmp_path, printed):
    records = results(tmp_path)
    (Store(tmp_path).cell(records[0].identity).folder / "samples.parquet").unlink()
    assert not log(tmp_path).log(records)
    assert "1 runs logged" in printed()
    assert "NOT LOGGED gqa none full, tables of fsr_table1_hub" in printed()
    assert "The records are complete; the same command logs what is missing." in printed()
    assert [run["run"].display_name for run in runs(tmp_path)] == ["gqa scope at 64"]


def test_a_service_that_refuses_is_asked_once(tmp_path, monkeypatch, printed):
    asked = []

    def refuse(**options):
        asked.append(options["name"])
        raise wandb.errors.CommError("quota exceeded")

    monkeypatch.setattr(wandb, "init", refuse)
    assert not log(tmp_path).log(results(tmp_path))
    assert asked == ["gqa none at full"]
    assert "NOT LOGGED gqa none full, gqa scope 64, tables of fsr_table1" in printed()
    assert "CommError: quota exceeded" in printed()


@pytest.mark.faults
def test_a_service_out_of_reach_ends_with_a_message_and_keeps_the_records(tmp_path):
    results(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from secateur.reporting import wandb_log, wandb_values
wandb_values.RETRIES = 1
from secateur.store import Store
folder = Path({str(tmp_path)!r})
suite = {{"name": "hub", "revision": "main", "data_root": None}}
log = wandb_log.WandbLog(folder, suite, None, "p", None, None, str(folder), 5, 0)
sys.exit(0 if log.log(Store(folder).records()) else 3)
"""
    environment = os.environ | {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.returncode == 3, done.stderr
    printed = " ".join(done.stderr.split())
    assert "wandb, online: 0 runs logged" in printed
    assert "NOT LOGGED gqa none full, gqa scope 64, tables of hub_llava_1_5_7b_all_" in printed
    assert len(Store(tmp_path).records()) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "on"}, "logger.mode='on' is not one of"),
        ({"mode": "online"}, "needs a login"),
        ({"samples": -1}, "logger.samples=-1"),
        ({"overlays": -1}, "logger.overlays=-1"),
    ],
)
def test_fields_that_make_no_sense_are_refused_before_the_sweep(
    tmp_path, monkeypatch, options, text
):
    monkeypatch.setattr(type(wandb.api), "is_authenticated", False)
    with pytest.raises(ValueError, match=text):
        log(tmp_path, **options)


def test_slow_libraries_are_imported_only_when_needed():
    code = "import sys, secateur.summary, secateur.sweep; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert not {"wandb", "transformers", "lmms_eval", "datasets", "matplotlib"} & set(
        done.stdout.split()
    )

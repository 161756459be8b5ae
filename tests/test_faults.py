"""An error in a sweep is named and fails only its own cell; nothing finished is lost."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from cells import ENVIRONMENT
from cells import identity as cell_of
from lmms_eval.api.task import ConfigurableTask
from sweeping import cells, output, tables, wait_for
from transformers import PreTrainedTokenizerBase

from secateur import cell
from secateur import sweep as engine
from secateur.model_pool import ModelPool
from secateur.progress import Interrupt, ProgressBar, console
from secateur.pruners import REGISTRY
from secateur.pruners.base import Pruner, Selection, VisualTokens
from secateur.pruners.registry import register
from secateur.store import Store, StoredCell

GRID = ("-m", "pruner=none,random")


@pytest.fixture(scope="module")
def reference(sweeps, tmp_path_factory):
    """An undisturbed sweep: its results and its tables."""
    results = tmp_path_factory.mktemp("reference")
    code, printed = sweeps.here(results, *GRID)
    assert code == 0, printed
    assert "cells: 4 done, 0 skipped, 0 failed" in printed
    return results, tables(results)


@pytest.fixture(scope="module")
def seconds(sweeps, reference):
    """What an undisturbed sweep takes once everything is loaded."""
    started = time.monotonic()
    process = sweeps.child(reference[0].with_name("warm"), *GRID)
    process.join(120)
    assert process.exitcode == 0
    return time.monotonic() - started


@pytest.fixture
def broken():
    """A pruner that goes wrong in the way its field says."""

    @register("broken")
    @dataclass(frozen=True)
    class Broken(Pruner):
        how: str = "fine"

        paper = "-"
        status = "baseline"

        def select(self, tokens: VisualTokens, keep: int) -> Selection:
            indices = torch.arange(keep).expand(tokens.shape[0], -1).clone()
            if self.how == "raises":
                raise KeyError("no such thing")
            if self.how == "shape":
                indices = indices[0]
            if self.how == "repeated":
                indices[:, 1] = 0
            if self.how == "outside":
                indices[:, -1] = tokens.shape[1]
            if self.how == "fewer":
                indices = indices[:, :-1]
            features = (
                torch.full((*indices.shape, tokens.features.shape[2]), float("nan"))
                if self.how == "infinite"
                else None
            )
            return Selection(indices, features)

    Broken.__module__ = __name__
    yield
    REGISTRY.pop("broken")


def failures(results: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(results.rglob("*.failed.json"))]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "KeyError: 'no such thing'"),
        ("shape", "returned indices of shape (16,)"),
        ("repeated", "the same token more than once"),
        ("outside", "an index outside 0..143"),
        ("fewer", "kept 15 tokens of 144; the budget is 16"),
        ("infinite", "features with NaN or infinite values"),
    ],
)
def test_a_broken_pruner_fails_its_cells_only(sweeps, broken, tmp_path, how, message):
    code, printed = sweeps.here(
        tmp_path, "-m", "pruner=none", "pruner.name=broken", f"+pruner.how={how},fine", "limit=2"
    )
    assert code == 1
    assert "cells: 2 done, 0 skipped, 2 failed" in printed
    assert "FAILED pope broken 16" in printed
    assert message in printed
    assert set(cells(tmp_path)) == {"pope/broken_16", "gqa/broken_16"}
    for failure in failures(tmp_path):
        assert message.split(": ")[-1] in failure["traceback"]
        assert "Traceback" in failure["traceback"]
        assert failure["config"]["pruner"] == {"name": "broken", "how": how}
        assert failure["environment"]["python"]
        assert failure["identity"]["task"] in ("pope", "gqa")


def test_a_model_that_answers_nothing_fails_and_recovers(sweeps, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("decode", "batch_decode"):
            given = getattr(PreTrainedTokenizerBase, name)
            patch.setattr(PreTrainedTokenizerBase, name, _silenced(given))
        code, printed = sweeps.here(tmp_path, "pruner=random", "limit=2")
    assert code == 1
    assert "all 2 answers of task pope are empty" in printed
    assert not list(tmp_path.rglob("*.answers*")), "there is nothing to go on from"
    code, printed = sweeps.here(tmp_path, "pruner=random", "limit=2")
    assert "set retry_failed=true" in printed
    assert code == 1
    code, printed = sweeps.here(tmp_path, "pruner=random", "limit=2", "retry_failed=true")
    assert code == 0
    assert "cells: 2 done" in printed
    assert not failures(tmp_path)


def _silenced(decode):
    def silent(self, ids, *rest, **more):
        text = decode(self, ids, *rest, **more)
        return [" "] * len(text) if isinstance(text, list) else " "

    return silent


def test_a_scoring_that_raises_keeps_the_answers(sweeps, tmp_path, monkeypatch):
    scored = ConfigurableTask.process_results

    def scoring(self, doc, results, *rest, **more):
        if self.config.task == "pope":
            raise ZeroDivisionError("no score")
        return scored(self, doc, results, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ConfigurableTask, "process_results", scoring)
        code, printed = sweeps.here(tmp_path, "pruner=random")
    assert code == 1
    assert "cells: 1 done, 0 skipped, 1 failed" in printed
    assert "FAILED pope random 16: ZeroDivisionError: no score" in printed
    (answers,) = tmp_path.rglob("*.answers.jsonl")
    assert len(answers.read_text().splitlines()) == 4
    code, printed = sweeps.here(tmp_path, "pruner=random", "retry_failed=true")
    assert "cells: 1 done, 1 skipped, 0 failed" in printed
    assert not list(tmp_path.rglob("*.answers*"))


def test_a_truncated_image_fails_its_task_only(sweeps, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sweeps.data, data)
    (file,) = (data / "lmms-lab-encoder" / "POPE").rglob("*.parquet")
    rows = pd.read_parquet(file)
    rows["image"] = [{**image, "bytes": image["bytes"][:200]} for image in rows["image"]]
    rows.to_parquet(file)
    code, printed = sweeps.here(tmp_path / "results", "pruner=random", f"++suite.data_root={data}")
    assert code == 1
    assert "cells: 1 done, 0 skipped, 1 failed" in printed
    assert "FAILED pope random 16" in printed
    assert "truncated" in printed


def test_an_error_of_the_harness_itself_is_shown_and_kept_to_its_job(sweeps, tmp_path, monkeypatch):
    def refuse(*_):
        raise AttributeError("not of ours")

    monkeypatch.setattr(ModelPool, "get", refuse)
    code, printed = sweeps.here(tmp_path, "-m", "pruner=random,uniform")
    assert code == 1
    assert "cells: 0 done, 0 skipped, 4 failed" in printed
    assert "AttributeError: not of ours (traceback in " in printed
    assert "refuse" in next(tmp_path.rglob("traceback.txt")).read_text()


def test_what_goes_wrong_with_a_cell_that_was_waited_for_fails_it(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("not of ours")

    path = tmp_path / "cells.json"
    path.write_text(json.dumps([{"state": "locked", "cell": "pope random 16"}]))
    held = SimpleNamespace(holder=lambda: "another process")
    job = SimpleNamespace(
        tasks=["pope"], pruner=SimpleNamespace(name="random"), budget=16, cell=lambda _: held
    )
    monkeypatch.setattr(engine.Sweep, "_run_cell", refuse)
    sweep = engine.Sweep(jobs=1)
    sweep.waiting.append((job, "pope", path))
    sweep.finish()
    (outcome,) = json.loads(path.read_text())
    assert outcome["state"] == "failed"
    assert "RuntimeError: not of ours (traceback in " in outcome["message"]
    assert "refuse" in (tmp_path / "traceback.txt").read_text()


def test_a_failing_cell_is_retried_once_a_sweep(sweeps, broken, tmp_path, monkeypatch):
    """The unpruned cell belongs to every budget's job."""
    tries = []

    def run(model, task, entry, limit, seed, files):
        tries.append(entry.name)
        raise RuntimeError("again")

    monkeypatch.setattr(cell, "run", run)
    for repeat in ("retry_failed=false", "retry_failed=true"):
        code, printed = sweeps.here(tmp_path, "-m", "pruner=none", "budget=16,32,48", repeat)
        assert code == 1
        assert "cells: 0 done, 0 skipped, 2 failed" in printed
    assert tries == ["pope", "gqa"] * 2


def test_an_odd_limit_of_mme_is_told_before_anything_runs(sweeps, tmp_path):
    code, printed = sweeps.here(tmp_path, "-m", "pruner=random", "tasks=[mme],[pope]", "limit=3")
    assert code == 1
    assert "limit=3 is odd, and MME scores pairs of questions; use limit=4" in printed
    assert "(1 of 2 jobs: random at budget 16) Nothing was run." in printed
    assert not cells(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "edited"])
def test_a_damaged_failure_is_named(sweeps, tmp_path, damage, monkeypatch):
    sweeps.here(tmp_path, "pruner=random", "budget=200", "tasks=[pope]")
    (file,) = tmp_path.rglob("*.failed.json")
    file.write_text(file.read_text()[:50] if damage == "truncated" else "[]")
    code, printed = sweeps.here(tmp_path, "pruner=random", "budget=200", "tasks=[pope]")
    assert code == 1
    assert f"{file.name} is damaged" in printed


def test_a_torn_answer_is_asked_again(sweeps, reference, tmp_path, monkeypatch):
    """Of four documents two answers are whole and the third is cut off: the last two are asked."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "advance", _interrupting(calls, after=3))
        code, printed = sweeps.here(tmp_path, "pruner=random", "tasks=[pope]")
    assert code == 130
    assert "Finished cells and answers are kept" in printed
    (file,) = tmp_path.rglob("*.answers.jsonl")
    text = file.read_text()
    assert len(text.splitlines()) == 3
    file.write_text(text[:-40])
    monkeypatch.setattr(ProgressBar, "advance", lambda _, cells: calls.append(cells))
    calls.clear()
    code, printed = sweeps.here(tmp_path, "pruner=random", "tasks=[pope]")
    assert code == 0
    assert calls == [2 / 4, 1 / 4, 1 / 4]
    assert "1 lines of" in printed
    assert _samples(tmp_path, "pope/random_16") == _samples(reference[0], "pope/random_16")


def _interrupting(calls: list, after: int):
    def advance(_: ProgressBar, cells: float) -> None:
        if cells == 1 / 4:
            calls.append(cells)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGINT)

    return advance


def _samples(results: Path, cell: str) -> str:
    return (
        pd.read_parquet(cells(results)[cell] / "samples.parquet").drop(columns="seconds").to_json()
    )


def _killed_and_resumed(sweeps, reference, results: Path, moment: float) -> None:
    process = sweeps.child(results, *GRID)
    time.sleep(moment)
    process.kill()
    process.join()
    again = sweeps.child(results, *GRID)
    again.join(120)
    assert again.exitcode == 0, output(results, again)
    assert tables(results) == reference[1]
    for own in cells(reference[0]):
        assert _samples(results, own) == _samples(reference[0], own)
    assert not list(results.rglob("*.answers*"))
    assert not list(results.glob("runs/.writing/*"))


@pytest.mark.faults  # a fork beside the threads of pytest-xdist may hang
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_killed_sweep_goes_on_to_the_same_tables(sweeps, reference, tmp_path, number, seconds):
    _killed_and_resumed(sweeps, reference, tmp_path / "results", (0.4, 0.6, 0.8)[number] * seconds)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(50))
def test_a_sweep_killed_at_any_moment_goes_on_to_the_same_tables(
    sweeps, reference, tmp_path, number, seconds
):
    _killed_and_resumed(
        sweeps, reference, tmp_path / "results", random.Random(number).uniform(0, seconds)
    )


@pytest.mark.faults  # a fork beside the threads of pytest-xdist may hang
def test_two_sweeps_at_once_share_the_cells(sweeps, reference, tmp_path):
    results = tmp_path / "results"
    processes = [sweeps.child(results, *GRID) for _ in range(2)]
    done = 0
    for process in processes:
        process.join(120)
        printed = output(results, process)
        assert process.exitcode == 0, printed
        counts = dict(zip(("done", "skipped", "failed"), _counts(printed), strict=True))
        assert counts["done"] + counts["skipped"] == 4
        done += counts["done"]
    assert done == 4
    assert tables(results) == reference[1]


def _counts(printed: str) -> list[int]:
    return [
        int(printed.split(f" {state}")[0].split()[-1]) for state in ("done", "skipped", "failed")
    ]


@pytest.mark.faults  # a fork beside the threads of pytest-xdist may hang
def test_a_cell_that_another_process_gives_up_is_taken_over(sweeps, reference, tmp_path):
    """The first sweep stops inside its first cell; the second runs the others, then that one."""
    results = tmp_path / "results"
    first = sweeps.child(results, *GRID, "tasks=[pope]")
    wait_for(lambda: list(results.rglob("*.answers.jsonl")))
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = sweeps.child(results, *GRID)
        wait_for(lambda: len(cells(results)) == 3)
        time.sleep(0.2)
        assert second.is_alive()
    finally:
        first.kill()
    second.join(60)
    assert second.exitcode == 0, output(results, second)
    assert tables(results) == reference[1]


@pytest.mark.faults  # a fork beside the threads of pytest-xdist may hang
def test_an_interrupted_sweep_goes_on_later(sweeps, reference, tmp_path):
    results = tmp_path / "results"
    process = sweeps.child(results, *GRID)
    wait_for(lambda: list(results.rglob("*.answers.jsonl")))
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
    code, printed = sweeps.here(results, *GRID)
    assert code == 0, printed
    assert tables(results) == reference[1]


def _interrupted_twice(place: Path) -> None:
    """The first is swallowed, as some libraries do; a task's output is being caught."""
    os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT), 2)
    Interrupt().catch()
    with contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGINT)
    os._exit(7)


def test_an_interrupt_twice_ends_at_once(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=_interrupted_twice, args=(tmp_path / "printed",)
    )
    process.start()
    process.join(10)
    assert process.exitcode == 130
    assert (
        "Interrupted twice. Finished cells and answers are kept"
        in (tmp_path / "printed").read_text()
    )


SHARDED = ("pruner=random", "tasks=[mmstar]")  # four documents with an image each


def test_shards_answer_apart_and_the_last_one_scores(sweeps, tmp_path):
    whole, results = tmp_path / "whole", tmp_path / "results"
    code, printed = sweeps.here(whole, *SHARDED)
    assert code == 0, printed
    code, printed = sweeps.here(results, *SHARDED, "shard=0/3")
    assert code == 0
    assert "cells: 0 done, 0 skipped, 0 failed, 1 partial" in printed
    assert not cells(results)
    code, printed = sweeps.here(results, "-m", *SHARDED, "shard=1/3,2/3")
    assert code == 0, printed
    assert "cells: 1 done, 0 skipped, 0 failed" in printed
    assert _samples(results, "mmstar/random_16") == _samples(whole, "mmstar/random_16")
    assert not list(results.rglob("*.answers*"))


def test_a_shard_without_an_image_leaves_the_cell_to_the_others(sweeps, reference, tmp_path):
    """POPE's four documents are of one image, which belongs to the first shard."""
    code, printed = sweeps.here(tmp_path, "pruner=random", "tasks=[pope]", "shard=1/2")
    assert code == 0
    assert "cells: 0 done, 0 skipped, 0 failed, 1 partial" in printed
    code, printed = sweeps.here(tmp_path, "pruner=random", "tasks=[pope]", "shard=0/2")
    assert "cells: 1 done, 0 skipped, 0 failed" in printed
    assert _samples(tmp_path, "pope/random_16") == _samples(reference[0], "pope/random_16")


@pytest.mark.faults  # a fork beside the threads of pytest-xdist may hang
def test_shards_of_several_processes_make_one_cell(sweeps, tmp_path):
    whole, results = tmp_path / "whole", tmp_path / "results"
    assert sweeps.here(whole, *SHARDED)[0] == 0
    processes = [sweeps.child(results, *SHARDED, f"shard={n}/2") for n in (0, 1)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, output(results, process)
    assert _samples(results, "mmstar/random_16") == _samples(whole, "mmstar/random_16")


def _on_a_small_disk(
    sweeps, tmp_path: Path, options: str, *overrides: str
) -> subprocess.CompletedProcess:
    """A sweep whose results folder is a file system of its own, in a mount namespace of its own."""
    results = tmp_path / "results"
    results.mkdir()
    own = ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o {options} tmpfs {results}"
    if subprocess.run([*own, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    words = [sys.executable, *sweeps.command(results, *overrides)]
    copy = f"mkdir -p {tmp_path}/left; cp -r {results}/. {tmp_path}/left"
    script = f'{mount} && "$@"; code=$?; {copy}; exit $code'
    environment = os.environ | {"COLUMNS": "300"}
    return subprocess.run(
        [*own, "sh", "-c", script, "sh", *words],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )


@pytest.mark.faults
def test_a_full_disk_ends_the_sweep_with_what_it_has(sweeps, reference, tmp_path):
    run = _on_a_small_disk(sweeps, tmp_path, "size=88k", *GRID)
    assert run.returncode == 1
    assert "No space left on device" in " ".join(run.stderr.split())
    left = tmp_path / "left"
    finished = cells(left)
    assert 1 <= len(finished) < 4
    code, printed = sweeps.here(left, *GRID)
    assert code == 0
    assert f"cells: {4 - len(finished)} done, {len(finished)} skipped, 0 failed" in printed
    assert tables(left) == reference[1]


def test_a_working_folder_per_job_is_refused(sweeps, tmp_path):
    code, printed = sweeps.here(tmp_path, "hydra.job.chdir=true")
    assert code == 1
    assert "hydra.job.chdir=true would look for results and data in another folder" in printed


def test_shards_that_fail_together_write_files_of_their_own(tmp_path, monkeypatch):
    own = cell_of("llava_1_5_7b", "scope", "64", "gqa")
    stored, names = Store(tmp_path).cell(own), set()
    rename = Path.rename

    def noted(path: Path, target: Path) -> Path:
        names.add(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", noted)
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        stored.write_failure("Traceback", ENVIRONMENT, {})
    assert len(names) == 2
    assert stored.failure() == "Traceback"


def test_brackets_in_paths_are_printed_as_they_are():
    with console.capture() as printed:
        console.print("written: /data/[a]/[/b]/table.md")
    assert "/data/[a]/[/b]/table.md" in printed.get()


def test_a_full_disk_is_one_paragraph(sweeps, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StoredCell, "write", full)
    code, printed = sweeps.here(tmp_path, "pruner=random", "tasks=[pope]")
    assert code == 1
    assert (
        "cannot be written any more ([Errno 28] No space left on device), so the sweep ends here."
        in printed
    )
    assert "Finished cells and answers are kept" in printed
    assert "Traceback" not in printed
    (answers,) = tmp_path.rglob("*.answers.jsonl")
    assert len(answers.read_text().splitlines()) == 4


@pytest.mark.faults
def test_a_read_only_folder_is_one_paragraph(sweeps, tmp_path):
    run = _on_a_small_disk(sweeps, tmp_path, "ro", "pruner=random")
    assert run.returncode == 1
    assert "cannot be written" in run.stderr
    assert "set results=/another/folder" in " ".join(run.stderr.split())
    assert "Traceback" not in run.stderr

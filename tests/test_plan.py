"""The plan of experiments: what is still to be done, once, at rates that were measured or given."""

import sys

import pytest
from cells import cell, changed, rows, save

from scripts import plan
from secateur.tasks import TASKS


def run(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    plan.main()
    return capsys.readouterr().out


def test_hours_follow_from_documents_and_the_given_rate(tmp_path, monkeypatch, capsys):
    printed = run(
        monkeypatch, capsys, "promprune_table1", "--results", str(tmp_path), "--rate", "10"
    )
    # unpruned once, four methods at three budgets, on POPE, ScienceQA-IMG, GQA, MME, TextVQA,
    # MMBench, VizWiz and VQAv2
    documents = 13 * (9000 + 2017 + 12578 + 2374 + 5000 + 4329 + 4319 + 214354)
    row = next(line for line in printed.splitlines() if "llava_1_5_7b" in line)
    assert f"{13 * 8} |" in row
    assert f"{documents:,} |" in row
    # of an image's questions, all but the first cost 0.3 of a prompt
    images = {9000: 500, 12578: 398, 2374: 1187, 214354: 40504}
    shared = sum(0.7 * (every - own) for every, own in images.items())
    assert f"{documents / 36000 - 13 * shared / 36000:.1f} |" in row


def test_questions_share_prefills_where_the_method_does_not_read_them(tmp_path):
    jobs = {job.pruner.name: job for job in plan.jobs("fsr_table1", tmp_path)}
    assert {name: plan.shares(job) for name, job in jobs.items()} == {
        **dict.fromkeys(("none", "divprune", "vispruner", "visionzip", "holov"), True),
        **dict.fromkeys(("fastv", "sparsevlm", "dart", "cdpruner", "fsr"), False),
    }
    assert not plan.shares(jobs["none"].model_copy(update={"strict": True}))
    assert plan.prompts(TASKS["mme"], 100, shared=True) == pytest.approx(50 + 0.3 * 50)
    assert plan.prompts(TASKS["mme"], 100, shared=False) == 100
    assert plan.prompts(TASKS["mmstar"], 100, shared=True) == 100
    assert plan.prompts(None, 100, shared=True) == 100


def test_experiments_share_cells_and_rates_are_never_made_up(tmp_path, monkeypatch, capsys):
    both = run(
        monkeypatch, capsys, "promprune_table1", "promprune_table1", "--results", str(tmp_path)
    )
    assert both == run(monkeypatch, capsys, "promprune_table1", "--results", str(tmp_path))
    assert "No rate for llava_1_5_7b" in both


def test_rates_come_from_finished_cells(tmp_path):
    own = cell("llava_1_5_7b", "none", "full", "gqa", rows("gqa", 0.5, 100), 576.0)
    save(tmp_path, *changed([own], {"seconds": 4.0}))
    assert plan.rates(tmp_path) == {"llava_1_5_7b": pytest.approx(25.0)}
    other = tmp_path / "shared"
    shared = {"seconds": 4.0, "environment.shared_prefixes": 100}
    save(other, *changed([own], shared))
    assert plan.rates(other) == {"llava_1_5_7b": pytest.approx((4 + 0.3 * 96) / 4)}


def test_rates_are_given_for_all_models_or_by_name():
    models = {"llava_1_5_7b", "llava_next_7b"}
    assert plan.given(["12"], models) == dict.fromkeys(models, 12.0)
    assert plan.given(["llava_next_7b=4", "12"], models) == {
        "llava_1_5_7b": 12.0,
        "llava_next_7b": 4.0,
    }
    for wrong, told in (
        ("lava=4", "lava"),
        ("0", "positive"),
        ("fast", "positive"),
        ("llava_next_7b=nan", "positive"),
    ):
        with pytest.raises(ValueError, match=told):
            plan.given([wrong], models)


def test_unknown_experiments_and_folders_are_named(tmp_path, monkeypatch, capsys):
    for arguments, told in (
        (["tabel1"], "no experiment tabel1; there are "),
        (["--results", str(tmp_path / "x")], "no such folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, capsys, *arguments)
        assert ended.value.code
        assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

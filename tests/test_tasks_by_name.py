"""Tasks that the table does not list: of lmms-eval by name, and of a local folder."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from secateur import sweep
from secateur.job import Job
from secateur.paths import CONFIGS
from secateur.reporting import tables
from secateur.reporting.comparison import compare, load
from secateur.store import Store
from secateur.tasks import by_name, canonical, find_task
from secateur.tasks.load import load_tasks

HEAD = """\
task: {name}
dataset_path: lmms-lab-encoder/POPE
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4}}
process_results: !function utils.results
metric_list:
"""
MEAN = "  - {metric: right, aggregation: mean, higher_is_better: true}\n"
WHOLE = "  - {metric: words, aggregation: !function utils.longest, higher_is_better: true}\n"
SUBMISSION = "  - {metric: submission, aggregation: !function utils.submit, higher_is_better: 1}\n"
UTILS = """\
import json

from lmms_eval.tasks._task_utils.file_utils import generate_submission_file


def visual(doc):
    return [doc["image"].convert("RGB")]


def text(doc):
    return doc["question"] + "\\nAnswer the question using a single word or phrase."


def results(doc, answers):
    said = answers[0].strip().lower()
    return {"right": float(said == doc["answer"]), "words": [said], "submission": said}


def longest(items):
    return max(len(words[0]) for words in items)


def submit(items, args):
    with open(generate_submission_file("answers.json", args), "w") as file:
        json.dump(items, file)


def judged(doc, answers):
    return {"right": ask(answers[0])}


def ask(answer):
    import requests

    return requests.post("https://localhost", headers={"key": API_KEY})


API_KEY = "none"
"""


def write(folder: Path, **definitions: str) -> Path:
    """A folder of tasks: the text of the metrics by name, or that of a whole file."""
    folder.mkdir(exist_ok=True)
    (folder / "utils.py").write_text(UTILS)
    for name, text in definitions.items():
        whole = text if text.startswith("task:") else HEAD.format(name=name) + text
        (folder / f"{name}.yaml").write_text(whole)
    return folder


def job(results: Path, *words: str) -> Job:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return Job.of(compose("sweep", [f"results={results}", *words]))


def test_local_tasks_are_answered_scored_and_reported(tmp_path, shapes, capsys):
    folder = write(tmp_path / "mine", mine=MEAN + WHOLE, longest=WHOLE, sent=SUBMISSION)
    words = [f"suite.include_path={folder}", f"suite.data_root={shapes}", "limit=8"]
    words += ["tasks=[mine,longest,sent]", "suite.name=local", "budget=16"]
    path = tmp_path / "cells.json"
    for pruner in ("none", "scope"):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            overrides = [f"results={tmp_path}", f"pruner={pruner}", *words]
            sweep.Sweep(1).run_job(compose("sweep", overrides), path)
        assert path.read_text().count('"done"') == 3, path.read_text()
    records = Store(tmp_path).records()
    by_task = {one.identity.task: one for one in records if one.identity.pruner.name == "none"}
    assert by_task["mine"].unlisted.model_dump() == {"metric": "right", "mean": True}
    assert by_task["longest"].unlisted.model_dump() == {"metric": "words", "mean": False}
    assert by_task["sent"].unlisted.model_dump() == {"metric": None, "mean": False}
    assert by_task["sent"].metrics == {}
    own = Store(tmp_path).cell(by_task["sent"].identity).folder
    assert len((own / "submissions" / "answers.json").read_text().split(",")) == 8
    assert not Path("submissions").exists()
    table = tables.accuracy(records)
    assert list(table)[3:5] == ["longest words", "mine right"]
    assert table["longest words"].max() == 3  # "yes"
    assert 50 <= table["mine right"].max() <= 100
    tables.show(records)
    assert "sent has no score here" in capsys.readouterr().out
    compared = compare(load(tmp_path), resamples=100).set_index(["task", "method"])
    assert "longest: no interval" in compared.loc[("longest", "scope"), "mark"]
    assert "mine: no interval" not in compared.loc[("mine", "scope"), "mark"]
    assert compared.loc[("mine", "none"), "images"] == 2


def test_the_code_of_a_local_task_is_part_of_a_cells_identity(tmp_path):
    folder = write(tmp_path / "mine", mine=MEAN)
    words = ["suite=hub", "suite.data_root=/data", f"suite.include_path={folder}", "tasks=[mine]"]
    before = job(tmp_path, *words).cell("mine").identity
    (folder / "utils.py").write_text(UTILS + "\n# another version\n")
    by_name._found.cache_clear()
    after = job(tmp_path, *words).cell("mine").identity
    assert before.definition != after.definition
    assert before.digest != after.digest
    assert "definition" not in job(tmp_path, "tasks=[pope]").cell("pope").identity.as_json()


def test_names_of_lmms_eval_for_listed_tasks_are_the_same_task():
    assert canonical("mmbench_en_dev_static") == "mmbench_en"
    assert find_task("vizwiz_vqa_val").name == "vizwiz"
    assert canonical("textvqa_val") == "textvqa_val"  # without the OCR words of `textvqa`
    assert find_task("ai2d_lite").metrics["exact_match"].stored == "exact_match,flexible-extract"


@pytest.mark.parametrize(
    "name", ["vqav2_test", "vizwiz_vqa_test", "mmbench_en_test", "mmbench_cn_test"]
)
def test_tasks_of_submission_servers_have_no_metric(name):
    assert find_task(name).metrics == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("textvqa_vall", "unknown task textvqa_vall; the nearest names are textvqa_val"),
        ("seedbench_ppl", "is of type multiple_choice"),
        ("videomme", "shows videos"),
        ("hrbench", "is a group of tasks; name some of them: tasks=\\[hrbench4k,hrbench8k\\]"),
        ("mmvet", "is scored by a judge model over an API, and neither OPENAI_API_KEY nor"),
        ("llava_in_the_wild", "is scored by a judge model"),
        ("mmbench_en_dev", "is scored by a judge model"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused_before_anything_is_loaded(name, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("AZURE_API_KEY", raising=False)
    with pytest.raises(ValueError, match=message):
        find_task(name)


def test_a_key_admits_a_judge_but_not_sampling(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "made up")
    by_name._found.cache_clear()
    assert find_task("llava_in_the_wild").judge
    with pytest.raises(ValueError, match=r"asks for \{'temperature': 0.2"):
        find_task("mmvet")
    by_name._found.cache_clear()


def test_judges_are_found_through_functions_and_imports(tmp_path):
    text = HEAD.format(name="judged").replace("utils.results", "utils.judged") + MEAN
    folder = write(tmp_path / "mine", judged=text, mine=MEAN)
    assert not find_task("mine", folder).judge
    with pytest.raises(ValueError, match="task judged is scored by a judge model"):
        find_task("judged", folder)


def test_two_tasks_of_one_name_are_refused(tmp_path):
    folder = write(tmp_path / "mine", pope=MEAN, realworldqa=MEAN, mine=MEAN)
    (folder / "again.yaml").write_text(HEAD.format(name="mine") + MEAN)
    for name in ("pope", "realworldqa", "mine"):
        with pytest.raises(ValueError, match=f"two tasks have the name {name}: "):
            find_task(name, folder)
    with pytest.raises(ValueError, match=r"include_path=.*nowhere is no folder"):
        find_task("pope", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MEAN.replace("right", "wright"), "lists the metrics wright, and its scoring gives right"),
        (MEAN.replace("mean", "median_of"), "unknown aggregation 'median_of' of 'right'"),
        ("  - {metric: wright}\n", "unknown metric 'wright'"),
        ("none", "shows no image in its first document"),
        ("crash", "the scoring of task mine fails on its first document: KeyError: 'reply'"),
    ],
)
def test_what_only_the_data_tell_is_refused_before_the_model_loads(tmp_path, shapes, text, message):
    folder = write(tmp_path / "mine", mine=MEAN if text in ("none", "crash") else text)
    utils = folder / "utils.py"
    if text == "none":
        utils.write_text(UTILS.replace('[doc["image"].convert("RGB")]', "[]"))
    if text == "crash":
        utils.write_text(UTILS.replace('doc["answer"]', 'doc["reply"]'))
    with pytest.raises(ValueError, match=message):
        load_tasks(["mine"], shapes, include_path=folder)


def test_the_data_set_of_a_local_task_may_be_a_folder(tmp_path, shapes):
    data = shapes / "lmms-lab-encoder" / "POPE"
    text = HEAD.format(name="mine").replace("lmms-lab-encoder/POPE", str(data)) + MEAN
    folder = write(tmp_path / "mine", mine=text)
    own = job(tmp_path, "suite=hub", f"suite.include_path={folder}", "tasks=[mine]")
    assert own.cell("mine").identity.data == ""
    task = load_tasks(["mine"], include_path=folder)["mine"]
    assert set(task.eval_docs["answer"]) == {"yes", "no"}


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    folder = write(tmp_path / "mine", mine="task: mine\n  dataset_path: [")
    with pytest.raises(ValueError, match=r"mine\.yaml is no readable YAML file"):
        find_task("mine", folder)


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError, match=r"lmms-lab-encoder/RealWorldQA of task 'realwo"):
        load_tasks(["realworldqa"], tmp_path / "data")

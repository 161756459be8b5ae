"""The table of tasks: one entry is all that the harness needs to know of a task."""

import random
import sys

import numpy as np
import pytest
import yaml
from cells import CONFIGS, cell, rows
from hydra import compose, initialize_config_dir
from lmms_eval.tasks.mmmu.utils import construct_prompt, mmmu_doc_to_messages
from lmms_eval.tasks.pope.utils import pope_process_results
from PIL import Image

from scripts import plan
from secateur.job import Job
from secateur.reporting import score_figure, tables
from secateur.reporting.comparison import compare
from secateur.tasks import TASKS, Task, find_task, metrics

TOY = Task(
    name="toy",
    title="Toy",
    folder="pope",
    dataset="nobody/toy",
    documents=1234,
    metrics={"toy_accuracy": metrics.accuracy("toy_share", suffix="accuracy")},
    score=lambda sample: sample["toy"],
    category=lambda sample: "all",
    image_field="picture",
    pairs=True,
    sums={"both": ("toy_share", "toy_rest")},
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(TASKS, "toy", TOY)
    return find_task("toy")


def test_limits_metrics_and_documents_follow_from_the_entry(toy):
    toy.check_limit(None)
    toy.check_limit(4)
    with pytest.raises(
        ValueError, match="limit=3 is odd, and Toy scores pairs of questions; use limit=4"
    ):
        toy.check_limit(3)
    with pytest.raises(ValueError, match="limit=0: at least 1"):
        toy.check_limit(0)
    results = {
        "toy_share,none": 0.5,
        "toy_rest,none": 2.0,
        "toy_share_stderr,none": 1,
        "samples": 3,
    }
    assert toy.named_metrics(results) == {"toy_share": 0.5, "toy_rest": 2.0, "both": 2.5}
    sample = {"doc": {"picture": 7}, "doc_id": 3, "toy": 1.0}
    assert (toy.image_id(sample), toy.category(sample), toy.score(sample)) == ("7", "all", 1.0)


def test_tables_intervals_and_figures_know_a_task_by_its_entry(toy):
    full, pruned = rows("toy", 0.8, 400), rows("toy", 0.6, 400)
    cells = [
        cell("llava_1_5_7b", "none", "full", "toy", full, 576),
        cell("llava_1_5_7b", "random", "64", "toy", pruned, 64),
    ]
    table = tables.accuracy([own.record for own in cells])
    assert table["Toy accuracy"].tolist() == pytest.approx([80, 60])
    compared = compare(cells, resamples=200).set_index("method")
    assert set(compared["metric"]) == {"toy_accuracy"}
    assert compared.loc["random", "low"] < 60 < compared.loc["random", "high"]
    assert np.isclose(compared.loc["random", "difference"], -20)
    figure = score_figure.scores(compared.reset_index(), "caption")
    assert figure.axes[0].get_title(loc="left") == "Toy accuracy"


def test_the_plan_counts_the_documents_of_the_entry(toy, tmp_path, monkeypatch, capsys):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = ["suite=hub", "suite.tasks=[toy]", "tasks=[toy]", f"results={tmp_path}"]
        job = Job.of(compose("sweep", overrides))
    monkeypatch.setattr(plan, "jobs", lambda experiment, results: [job])
    monkeypatch.setattr(sys, "argv", ["plan.py", "scope_llava", "--results", str(tmp_path)])
    plan.main()
    assert "1,234" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("suite/*.yaml")), ids=lambda path: path.stem)
def test_suites_name_known_tasks(path):
    names = yaml.safe_load(path.read_text())["tasks"]
    assert names
    assert set(names) <= set(TASKS)


def test_the_page_lists_every_task_with_its_documents():
    page = (CONFIGS.parent / "docs" / "TASKS.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    for task in TASKS.values():
        (row,) = (row for row in rows if f"`{task.name}`" in row[1])
        assert f"{task.documents:,}" in row[3]


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown task toy; known tasks: pope, "):
        find_task("toy")


MULTIPLE = {"question_type": "multiple-choice", "options": "['a red cube', 'a ball']"}


@pytest.mark.parametrize(
    ("task", "doc", "usable", "unusable"),
    [
        ("pope", {}, ["yes", " No\n", "YES"], ["Yes.", "yes, it is", "maybe", ""]),
        ("mme", {}, ["Yes.", "y", "No, it is not"], ["maybe", "x", "It is not", " "]),
        (
            "scienceqa_img",
            {"choices": ["a", "b"]},
            ["A", "b", "B. the ball"],
            ["C", "the ball", ""],
        ),
        ("mmstar", {}, ["A", "The answer is (B)."], ["unsure", "E", ""]),
        ("mmmu_val", MULTIPLE, ["B", "(A)", "I think that it is a ball"], ["C", "unsure", ""]),
        ("mmmu_val", {"question_type": "open", "options": "[]"}, ["42", "unsure"], [" "]),
        ("gqa", {}, ["red", "unsure"], ["", "\n"]),
    ],
)
def test_unusable_answers_are_those_that_lmms_eval_cannot_read(task, doc, usable, unusable):
    before = random.getstate()
    for texts, expected in ((usable, True), (unusable, False)):
        for text in texts:
            sample = {"doc": doc, "filtered_resps": [text]}
            if task == "pope":
                sample |= pope_process_results({"answer": "yes", "question_id": 0}, [text])
            assert find_task(task).is_usable(sample) is expected, text
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("question", "options", "rewritten"),
    [
        ("What is in <image 1>?", "['<image 2>', '<image 3>']", False),
        ("Look at <image 1>. The red part of <image 1> is larger.", "['yes']", True),
        ("Is <image 2> brighter than <image 1>?", "['yes']", True),
        ("What is in <image 1>?", "['as <image 1>', 'other']", True),
    ],
)
def test_questions_whose_placeholders_are_rewritten_are_told(question, options, rewritten):
    doc = {"question_type": "multiple-choice", "question": question, "options": options}
    doc |= {f"image_{number}": Image.new("L", (number, 1)) for number in (1, 2, 3)}
    assert find_task("mmmu_val").rewritten(doc) is rewritten
    assert find_task("pope").rewritten(doc) is False
    kwargs = {"multiple_choice_prompt": "", "open_ended_prompt": "", "prompt_type": "format"}
    (message,) = mmmu_doc_to_messages(doc, kwargs)
    parts = [
        f"<image {part['url'].width}>" if part["type"] == "image" else part["text"]
        for part in message["content"]
    ]
    faithful = "".join("".join(parts).split()) == "".join(construct_prompt(doc).split())
    assert faithful is not rewritten

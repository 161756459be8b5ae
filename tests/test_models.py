"""The lmms-eval model class: the embedded model's quality, equality with lmms-eval's own wrapper, fatal errors."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lmms_eval.models.chat.llava_hf import LlavaHf

from eval import cell
from eval.budget import Budget
from eval.models import PrunedLlava
from eval.shapes.datasets import build as build_shapes
from eval.tasks import TASKS, load_tasks
from pruners import build

WEIGHTS = Path(__file__).resolve().parents[1] / "eval" / "shapes" / "model"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = build_shapes(tmp_path_factory.mktemp("data") / "shapes")
    return load_tasks(list(TASKS), root)


@pytest.fixture(scope="module")
def model():
    return PrunedLlava(str(WEIGHTS), dtype="float32", device="cpu")


def run(model, tasks, name, limit):
    return cell.run(model, tasks[name], name, limit, 0)


def test_the_unpruned_answers_are_those_of_lmms_evals_own_wrapper(model, tasks):
    theirs = LlavaHf(pretrained=str(WEIGHTS), dtype="float32", device="cpu", device_map="cpu", attn_implementation="sdpa")
    model.use(build("none"), Budget(), "compact")
    for name in ("pope", "mmmu_val"):
        _, rows = run(model, tasks, name, 8)
        theirs.task_dict[name] = model.task_dict[name]
        answers = theirs.generate_until(tasks[name].instances)
        assert rows["answer"].tolist() == [answer.text for answer in answers]


def test_the_embedded_model_sees(model, tasks):
    """A short form of the bars on its card, on the first 40 documents."""
    model.use(build("none"), Budget(), "compact")
    record, _ = run(model, tasks, "pope", 40)
    assert record["metrics"]["pope_accuracy"] >= 0.85
    model.use(build("random"), Budget(tokens=16), "compact")
    pruned, _ = run(model, tasks, "pope", 40)
    assert pruned["metrics"]["pope_accuracy"] < record["metrics"]["pope_accuracy"]


def test_an_error_in_a_pruner_is_fatal(model, tasks):
    model.use(build("scope"), Budget(tokens=145), "compact")
    with pytest.raises(ValueError, match=r"145.*144"):
        run(model, tasks, "pope", 2)


def test_a_model_that_answers_nothing_fails_its_cell(model, tasks, monkeypatch):
    model.use(build("none"), Budget(), "compact")
    monkeypatch.setattr(model.tokenizer, "decode", lambda *_, **__: " ")
    with pytest.raises(RuntimeError, match="all 2 answers of task gqa are empty"):
        run(model, tasks, "gqa", 2)


def test_the_model_survives_lmms_evals_clean_up(model):
    model.clean()
    assert model.model is not None


def test_the_vicuna_prompt_is_the_original_llavas():
    model = PrunedLlava(str(WEIGHTS), dtype="float32", device="cpu", prompt="vicuna_v1")
    content = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    text = model._image_processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: <image>\nWhy? ASSISTANT:"
    )


def test_unknown_tasks_and_missing_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown task vqav2; known tasks: pope"):
        load_tasks(["vqav2"])
    with pytest.raises(FileNotFoundError, match=r"pope.*suite.data_root"):
        load_tasks(["pope"], tmp_path)


def test_documents_of_one_image_share_an_id():
    from eval.metrics import image_id

    sample = SimpleNamespace(doc={"image_source": "x"})
    assert image_id("pope", {"doc": sample.doc, "doc_id": 3}) == "x"
    assert image_id("mmstar", {"doc": {}, "doc_id": 3}) == "3"

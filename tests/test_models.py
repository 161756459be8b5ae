"""The lmms-eval model class: the embedded model's quality, lmms-eval's own wrapper, errors."""

import errno
import io
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas as pd
import pytest
from conftest import picture
from hydra import compose, initialize_config_dir
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.protocol import ChatMessages
from PIL import ImageFile
from safetensors.torch import load_file, save_file
from tenacity import stop_after_attempt

from scripts.training.recipe import Recipe
from scripts.training.train_shapes import train
from secateur import cell, models, prefixes
from secateur.answers import Answers
from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.families import contract
from secateur.injection import selftest
from secateur.job import Job
from secateur.model_pool import ModelPool
from secateur.models import Answer, DocumentError, PrunedModel
from secateur.paths import CONFIGS
from secateur.pruners import build
from secateur.shapes.datasets import SIZES
from secateur.shapes.datasets import build as build_shapes
from secateur.tasks import TASKS
from secateur.tasks.load import load_tasks, manager_of

WEIGHTS = Path(__file__).resolve().parents[1] / "eval" / "shapes" / "model"


@pytest.fixture(scope="module")
def tasks(shapes):
    return load_tasks(list(SIZES), shapes)


@pytest.fixture(scope="module")
def model():
    return PrunedModel(str(WEIGHTS), dtype="float32", device="cpu")


def run(model, tasks, name, limit):
    return cell.run(model, tasks[name], TASKS[name], limit, 0)


@pytest.mark.lmms_classes
def test_the_unpruned_answers_are_those_of_lmms_evals_own_wrapper(model, tasks):
    from lmms_eval.models.chat.llava_hf import LlavaHf

    theirs = LlavaHf(
        pretrained=str(WEIGHTS),
        dtype="float32",
        device="cpu",
        device_map="cpu",
        attn_implementation="sdpa",
    )
    model.use(build("none"), Budget(), "compact")
    for name in ("pope", "mmmu_val"):
        _, rows = run(model, tasks, name, 8)
        theirs.task_dict[name] = model.task_dict[name]
        answers = theirs.generate_until(tasks[name].instances)
        assert rows["answer"].tolist() == [answer.text for answer in answers]


def test_the_embedded_model_sees(model, tasks):
    """A short form of the bars on its card, on the first 40 documents."""
    model.use(build("none"), Budget(), "compact")
    record, rows = run(model, tasks, "pope", 40)
    assert record.metrics["pope_accuracy"] >= 0.85
    # the answers' own time: pauses, other processes and set clocks do not count
    assert record.seconds == pytest.approx(rows["seconds"].sum())
    model.use(build("random"), Budget(tokens=16), "compact")
    pruned, _ = run(model, tasks, "pope", 40)
    assert pruned.metrics["pope_accuracy"] < record.metrics["pope_accuracy"]


def test_the_same_cell_twice_gives_the_same_answers(model, tasks):
    model.use(build("random"), Budget(tokens=16), "compact")
    first, second = (run(model, tasks, "mmmu_val", 8)[1].drop(columns="seconds") for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert (first["kept_tokens"] == 16).all()


def test_records_tell_the_kept_tokens_from_the_mean_over_the_layers(model, tasks):
    for pruner, kept, layers in (
        (build("fastv", layer=1), 48, [144, 48, 48, 48]),
        (build("random"), 72, [72] * 4),
    ):
        model.use(pruner, Budget(tokens=72), "compact")
        record, rows = run(model, tasks, "pope", 2)
        assert (record.kept_tokens, record.average_tokens) == (kept, 72)
        assert rows["layer_tokens"].tolist() == [layers] * 2
        assert [len(indices) for (indices,) in rows["kept_indices"]] == [kept] * 2


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_weights_are_named(tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS, folder)
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(
        FileNotFoundError, match="could not be loaded: a file is missing or damaged"
    ):
        PrunedModel(str(folder), dtype="float32", device="cpu")


def test_weights_that_are_missing_are_no_random_numbers(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(WEIGHTS, folder)
    tensors = load_file(folder / "model.safetensors")
    without = {name: value for name, value in tensors.items() if "lm_head" not in name}
    save_file(without, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for lm_head\.weight, which transformers"):
        PrunedModel(str(folder), dtype="float32", device="cpu")


def test_an_unknown_prompt_is_refused():
    with pytest.raises(ValueError, match=r"model\.prompt='llama_3' is not one of hub, vicuna_v1"):
        PrunedModel(str(WEIGHTS), prompt="llama_3")


def test_the_training_recipe_runs_and_its_model_answers(tasks, tmp_path):
    """All stages, a few steps each: what they save loads and fits the repository."""
    short = Recipe(
        scenes=80, tower_steps=2, tower_batch=8, align_steps=2, shown_scenes=80, steps=2, batch=2
    )
    train(short, tasks, WEIGHTS, tmp_path / "model")
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) < 8 * 2**20
    fresh = PrunedModel(str(tmp_path / "model"), dtype="float32", device="cpu")
    assert fresh.model.num_parameters() == 1_852_032
    assert fresh.tokenizer.tokenize(" yes purple circle") == ["Ġyes", "Ġpurple", "Ġcircle"]


def test_an_error_in_a_pruner_is_fatal(model, tasks):
    model.use(build("scope"), Budget(tokens=145), "compact")
    with pytest.raises(DocumentError, match=r"^pope/0: \w*Error: .*145.*144"):
        run(model, tasks, "pope", 2)


class TestErrorsNameTheirDocuments:
    """Every error while documents are prepared or answered."""

    @pytest.fixture
    def batched(self, model, monkeypatch):
        monkeypatch.setattr(model, "batch_tokens", 2000)
        return model

    def test_one_row_of_the_head_that_is_nan(self, model, tasks):
        model.use(build("random"), Budget(tokens=16), "compact")
        weight = model.model.lm_head.weight.data
        own = weight[5].clone()
        weight[5] = float("nan")
        message = (
            r"^pope/0: FloatingPointError: the logits of pope/0 are NaN .*'random' at budget 16"
        )
        try:
            with pytest.raises(DocumentError, match=message):
                run(model, tasks, "pope", 2)
        finally:
            weight[5] = own

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_logits_of_some_rows_at_a_later_step(self, batched, tasks, value):
        def spoil(_module, _args, logits):
            if logits.shape[1] == 1 and not spoilt:  # a decoding step, or the last of the prompt
                spoilt.append(True)
                logits[1::2, -1, 7] = value
            return logits

        spoilt: list[bool] = []
        batched.use(build("none"), Budget(), "compact")
        handle = batched.model.lm_head.register_forward_hook(spoil)
        try:
            with pytest.raises(DocumentError, match="the logits of pope/1, pope/3 are NaN"):
                run(batched, tasks, "pope", 4)
        finally:
            handle.remove()
        assert not batched.model._forward_hooks

    @pytest.mark.parametrize("method", ["none", "random"])  # with shared prefixes, and without
    def test_an_error_while_answering_names_the_batch(self, batched, tasks, monkeypatch, method):
        def fail(*_, **__):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(batched.model, "generate", fail)
        monkeypatch.setattr(prefixes, "answer", fail)
        batched.use(build(method), Budget.parse("50%"), "compact")
        with pytest.raises(DocumentError, match=r"^pope/0, pope/1: RuntimeError: CUDA error"):
            run(batched, tasks, "pope", 2)

    def test_an_error_of_the_processor(self, model, tasks, monkeypatch):
        def fail(_inputs, _prompt):
            raise KeyError("pixels")

        monkeypatch.setattr(type(model.inputs), "__call__", fail)
        monkeypatch.setattr(model.documents, "tensors", EncodeCache(0))
        model.use(build("none"), Budget(), "compact")
        with pytest.raises(DocumentError, match=r"^gqa/0: KeyError: 'pixels'"):
            run(model, tasks, "gqa", 2)


def test_a_model_that_answers_nothing_fails_its_cell(model, tasks, monkeypatch):
    model.use(build("none"), Budget(), "compact")
    monkeypatch.setattr(model.tokenizer, "decode", lambda *_, **__: " ")
    with pytest.raises(RuntimeError, match="all 2 answers of task gqa are empty"):
        run(model, tasks, "gqa", 2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_half_an_image_fails_and_names_its_document(model, kind):
    """lmms-eval sets Pillow to fill the missing half with grey."""
    file = io.BytesIO()
    picture(0).resize((300, 300)).save(file, kind)
    whole = file.getvalue()
    images = [{"bytes": whole, "path": None}, {"bytes": whole[: len(whole) // 2], "path": None}]
    data = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    requests = [
        SimpleNamespace(args=("", image_alone, {"max_new_tokens": 1}, doc_id, "toy", "test"))
        for doc_id in range(2)
    ]
    model.use(build("none"), Budget(), "compact")
    model.task_dict["toy"] = {"test": data}
    model.generate_until(requests[:1])
    message = r"^toy/1: ValueError: an image of the document is truncated.* download them again"
    with pytest.raises(DocumentError, match=message):
        model.generate_until(requests)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def image_alone(doc):
    return [{"role": "user", "content": [{"type": "image", "url": doc["image"]}]}]


def test_unusable_and_cut_off_answers_are_counted(model, tasks, monkeypatch):
    model.use(build("none"), Budget(), "compact")
    record, rows = run(model, tasks, "pope", 4)
    assert (record.unusable_answers, record.cut_off_answers) == (0, 0)
    assert not rows[["unusable", "cut_off"]].to_numpy().any()
    model.use(build("none"), Budget(), "compact")
    monkeypatch.setattr(model, "_most", 1)  # the end token does not fit
    texts = iter(["maybe", "yes", "Yes.", "no"])
    monkeypatch.setattr(model.tokenizer, "decode", lambda *_, **__: next(texts))
    record, rows = run(model, tasks, "pope", 4)
    assert rows["unusable"].tolist() == [True, False, True, False]
    assert (record.unusable_answers, record.cut_off_answers) == (2, 4)
    assert record.empty_answers == 0


def test_a_lone_surrogate_in_an_answer_is_kept_and_stored(model, tasks, monkeypatch, tmp_path):
    model.use(build("none"), Budget(), "compact")
    model.answers = Answers(tmp_path / "answers.jsonl", Answer, "cell")
    texts = iter(["yes\udc80", "yes"])
    monkeypatch.setattr(model.tokenizer, "decode", lambda *_, **__: next(texts))
    _, rows = run(model, tasks, "pope", 2)
    rows.to_parquet(tmp_path / "samples.parquet")
    assert pd.read_parquet(tmp_path / "samples.parquet")["answer"].tolist() == [
        "yes\\udc80",
        "yes",
    ]
    assert rows["unusable"].tolist() == [True, False]
    resumed = Answers(tmp_path / "answers.jsonl", Answer, "cell")
    assert resumed["pope", 0].text == "yes\udc80"


def test_a_field_decides_on_the_generation_defaults_of_a_checkpoint(model, tasks, tmp_path):
    def answers(model):
        record, rows = run(model, tasks, "mmmu_val", 4)
        return rows["answer"].tolist(), record.generation_defaults

    model.use(build("none"), Budget(), "compact")
    own, defaults = answers(model)
    assert defaults == {}
    folder = shutil.copytree(WEIGHTS, tmp_path / "model")
    changed = {
        "repetition_penalty": 1.05,
        "suppress_tokens": model.tokenizer(own[0], add_special_tokens=False)["input_ids"],
    }
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    found = {
        generation: answers(
            PrunedModel(str(folder), dtype="float32", device="cpu", generation=generation)
        )
        for generation in ("checkpoint", "greedy")
    }
    assert found["greedy"] == (own, {})
    assert found["checkpoint"][0] != own
    assert found["checkpoint"][1] == changed


def test_the_model_survives_lmms_evals_clean_up(model):
    model.clean()
    assert model.model is not None


def test_the_vicuna_prompt_is_the_original_llavas():
    model = PrunedModel(str(WEIGHTS), dtype="float32", device="cpu", prompt="vicuna_v1")
    content = [{"type": "image", "url": picture(0)}, {"type": "text", "text": "Why?"}]
    text = model.inputs.prompt(ChatMessages(messages=[{"role": "user", "content": content}])).text
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhy? ASSISTANT:"
    )


def test_unknown_tasks_and_missing_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown task qqqq; known tasks: pope"):
        load_tasks(["qqqq"])
    with pytest.raises(FileNotFoundError, match=r"pope.*suite.data_root"):
        load_tasks(["pope"], tmp_path)
    (tmp_path / "data[1]").mkdir()
    with pytest.raises(FileNotFoundError, match=r"its path has \[ \], which the library datasets"):
        load_tasks(["pope"], tmp_path / "data[1]")


@pytest.mark.parametrize("token", [None, "hf_mine"])
def test_data_sets_of_the_hub_are_pinned_and_public_ones_need_no_login(monkeypatch, token):
    asked = []

    def load_dataset(*, path, revision, token, **_):
        asked.append((path, revision, token))
        raise FileNotFoundError("not here")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("secateur.tasks.load.get_token", lambda: token)
    monkeypatch.setattr(ConfigurableMessagesTask.download.retry, "stop", stop_after_attempt(1))
    with pytest.raises(FileNotFoundError, match=r"pope.*was looked for in the Hugging Face hub"):
        load_tasks(["pope"], revision="a" * 40)
    assert asked == [("lmms-lab-encoder/POPE", "a" * 40, True if token else None)]


def test_a_full_disk_is_no_missing_data_set(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manager_of(TASKS["pope"]), "load_task_or_group", full)
    with pytest.raises(OSError, match="No space left") as caught:
        load_tasks(["pope"])
    assert caught.value.errno == errno.ENOSPC


def test_a_model_whose_code_was_edited_meanwhile_is_never_given_out(tmp_path, monkeypatch):
    """Every cell asks anew, and every one is refused."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        job = Job.of(compose("sweep", [f"results={tmp_path}"]))
    pool = ModelPool()

    def edited():
        raise ValueError("models.py changed")

    monkeypatch.setattr("secateur.source.check_unchanged", edited)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"models\.py changed"):
            pool.get(job.model, job.engine)


def test_an_untested_transformers_is_told_before_the_first_cell(monkeypatch):
    monkeypatch.setattr(contract, "TESTED", ("4.0.0", "4.1.0"))
    selftest.check.cache_clear()
    selftest._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"tested on \(4\.0, 4\.1\); it passed a self-test"):
        PrunedModel(str(WEIGHTS), dtype="float32", device="cpu")


def test_one_model_is_loaded_at_a_time_and_only_when_its_settings_change(monkeypatch, tmp_path):
    alive = []

    class Held:
        def __init__(self, **_):
            assert not [other for other in alive if other() is not None], (
                "the model before is still there"
            )
            alive.append(weakref.ref(self))

        def expect(self, captures):
            pass

    monkeypatch.setattr(models, "PrunedModel", Held)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        job = Job.of(compose("sweep", [f"results={tmp_path}"]))
    pool, settings, engine = ModelPool(), job.model, job.engine
    first = id(pool.get(settings, engine))
    other = settings.model_copy(update={"positions": "original", "budgets": [2]})
    assert id(pool.get(other, engine)) == first
    other = settings.model_copy(update={"name": "b"})
    pool.get(other, engine)
    pool.get(other, engine.model_copy(update={"batch_tokens": 8}))
    assert len(alive) == 3


def test_another_folder_of_the_same_data_sets_is_read_anew(tmp_path):
    """The cache of `datasets` has the data set's name as key, which both folders share."""
    seen = []
    for name, count in (("one", 4), ("two", 6)):
        seen.append(
            len(
                load_tasks(["pope"], build_shapes(tmp_path / name, {"pope": count}))[
                    "pope"
                ].eval_docs
            )
        )
    assert seen == [4, 6]


def test_documents_of_one_image_share_an_id():
    assert TASKS["pope"].image_id({"doc": {"image_source": "x"}, "doc_id": 3}) == "x"
    assert TASKS["mmstar"].image_id({"doc": {}, "doc_id": 3}) == "3"

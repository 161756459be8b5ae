"""One prefill for all questions about an image: the answers and audits of each prompt alone."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import picture
from datasets import Dataset
from test_families import WITHOUT_CLIP, options_of, pairs, refused_by
from transformers.cache_utils import DynamicSlidingWindowLayer

from secateur import prefixes
from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.documents import by_image
from secateur.geometry import random_model, random_processor, tiny
from secateur.models import PrunedModel
from secateur.pruners import REGISTRY, Pruner, build
from secateur.tasks import TASKS

SETTINGS = {  # name -> family, fields
    "llava": ("llava", {}),
    "llava pad": ("llava", {"geometry": "pad", "prompt": "vicuna_v1"}),
    "anyres": ("llava_next", {"layout": "anyres"}),
    "crops": ("llava_next", {"layout": "crops", "unpruned_layout": "anyres"}),
    "fixed2880": ("llava_next", {"layout": "fixed2880"}),
    "llava_onevision": ("llava_onevision", {}),
    "qwen2_vl": ("qwen2_vl", {}),
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "qwen3_vl": ("qwen3_vl", {}),
    "internvl": ("internvl", {}),
}
SIZES = [(112, 112), (70, 120), (140, 84)]
# images of a document and its question; the same image comes back out of order
DOCS = [
    ((0,), "is it red?"),
    ((1,), "what is this, and what is behind it?"),
    ((0,), "why?"),
    ((), "what is two and two?"),
    ((0, 1), "which of them is larger?"),
    ((2,), "how many?"),
    ((1,), "is it red?"),
    ((0, 1), "and which is smaller?"),
    ((1, 0), "which is smaller?"),
    ((0,), "is it  red?"),
]


def loaded(tmp_path_factory, family, **fields):
    folder, config = tmp_path_factory.mktemp(family), tiny(family)
    model = random_model(config, "cpu", torch.float32, "sdpa", seed=0, std=0.2)
    model.save_pretrained(folder)
    random_processor(config).save_pretrained(folder)
    return PrunedModel(
        str(folder),
        dtype="float32",
        device="cpu",
        max_new_tokens=5,
        cache=EncodeCache(2**30),
        **fields,
    )


@pytest.fixture(scope="module", params=SETTINGS)
def model(request, tmp_path_factory):
    family, fields = SETTINGS[request.param]
    return loaded(tmp_path_factory, family, **fields)


def messages(doc):
    images = [{"type": "image", "url": picture(n).resize(SIZES[n])} for n in doc["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": doc["question"]}]}]


def requests_of(model, docs=DOCS):
    data = Dataset.from_dict(
        {"images": [list(images) for images, _ in docs], "question": [text for _, text in docs]}
    )
    model.task_dict["toy"] = {"test": data}
    return [
        SimpleNamespace(args=("", messages, {"max_new_tokens": 5}, doc_id, "toy", "test"))
        for doc_id in range(len(docs))
    ]


def answered(model, requests, method, batch_tokens, budget="50%", **options):
    """The answers as (text, audit without its id), and how many shared a prefix."""
    model.batch_tokens = batch_tokens
    model.use(build(method, **options), Budget.parse(budget), None)
    model.generate_until(requests)
    answers = [model.answers["toy", number] for number in range(len(requests))]
    assert [answer.audit.id for answer in answers] == [f"toy/{n}" for n in range(len(answers))]
    found = [dataclasses.replace(answer, seconds=0.0, shared=False) for answer in answers]
    return found, sum(answer.shared for answer in answers)


AGNOSTIC = [
    name
    for name, method in sorted(REGISTRY.items())
    if issubclass(method, Pruner) and name != "prunesid_dyn" and name not in WITHOUT_CLIP
]


# unpruned, plain, with an order of its own, over the packed sequence of crops, merging
KINDS = ("none", "scope", "promprune", "divprune", "visionzip")


@pytest.mark.parametrize(("model", "method"), pairs(SETTINGS, AGNOSTIC, KINDS), indirect=["model"])
def test_shared_answers_and_audits_are_those_of_every_prompt_alone(model, method):
    if method in refused_by(model.family):
        pytest.skip("the family does not have what the method reads")
    options = options_of(model.family, method)
    budget = "25%" if method == "pooling" else "50%"
    requests = requests_of(model)
    alone, none = answered(model, requests, method, 0, budget, **options)
    shared, count = answered(model, requests, method, 100_000, budget, **options)
    assert shared == alone
    assert none == 0
    # all but the text alone and, in batches, no prompt whose images come once
    assert count == (9 if build(method, **options).question_agnostic else 0)


def test_a_group_larger_than_a_batch_is_answered_in_pieces(model, monkeypatch):
    requests = requests_of(model, [((0,), f"question {'x' * n}?") for n in range(7)])
    alone, _ = answered(model, requests, "scope", 0)
    prefilled, pieces = [], []
    fill, answer = prefixes.prefill, prefixes.answer
    monkeypatch.setattr(prefixes, "prefill", lambda *a: prefilled.append(1) or fill(*a))
    monkeypatch.setattr(
        prefixes, "answer", lambda m, p, q, *a: pieces.append(len(q)) or answer(m, p, q, *a)
    )
    longest = 3 * max(answer.audit.prompt_tokens for answer in alone)
    shared, count = answered(model, requests, "scope", longest)
    assert (shared, count) == (alone, 7)
    assert prefilled == [1]
    assert len(pieces) > 1
    assert sum(pieces) == 7


def test_the_tensors_of_a_repeated_image_are_those_of_the_processor(model):
    for requests in (requests_of(model), requests_of(model)):  # prepared, then kept
        for request, data in ((one, model.task_dict["toy"]["test"]) for one in requests):
            made = model.documents.request(request, data, model.inputs, None)
            direct = model.inputs(model.inputs.prompt(chat(messages(data[request.args[3]]))))
            assert set(made.inputs) == set(direct)
            for name, value in direct.items():
                assert torch.equal(made.inputs[name], value), name


def chat(content):
    from lmms_eval.protocol import ChatMessages

    return ChatMessages(messages=content)


def test_an_image_is_encoded_and_pruned_once_in_a_cell(tmp_path_factory, monkeypatch):
    model = loaded(tmp_path_factory, "llava")
    pruned, plain = [], REGISTRY["scope"].select

    def select(self, tokens, keep):
        pruned.append(tokens.shape[0])
        return plain(self, tokens, keep)

    monkeypatch.setattr(REGISTRY["scope"], "select", select)
    docs = [((number % 3,), f"question {number}?") for number in range(12)]
    answered(model, requests_of(model, docs), "scope", 100_000)
    counts = model.documents.tensors.counts
    assert sum(pruned) == 3
    assert model.images.cache.counts.misses == 3
    assert counts.misses == 3 + 12  # of images and texts
    answered(model, requests_of(model, docs), "scope", 0)
    assert model.documents.tensors.counts.misses == 2 * 12 + 3  # another data set: texts anew


def test_methods_to_come_are_known_when_an_image_is_encoded(tmp_path_factory):
    model, methods = loaded(tmp_path_factory, "llava"), ("random", "fastervlm", "visionzip")
    for expected, times in ((False, 3), (True, 1)):
        model.images.cache.clear()
        model.images.asked = frozenset()
        before = model.images.cache.counts.misses
        if expected:
            model.expect({need for method in methods for need in build(method).needs})
        for method in methods:
            answered(model, requests_of(model, [((0,), "why?")]), method, 0)
        assert model.images.cache.counts.misses - before == times


def test_penalties_of_a_checkpoint_are_applied(tmp_path_factory):
    model = loaded(tmp_path_factory, "llava")
    requests = requests_of(model)
    plain, _ = answered(model, requests, "none", 0)
    model.model.generation_config.repetition_penalty = 4.0
    alone, _ = answered(model, requests, "none", 0)
    shared, count = answered(model, requests, "none", 100_000)
    assert alone != plain
    assert (shared, count) == (alone, 9)


@pytest.mark.parametrize("obstacle", ["windows", "default"])
def test_what_hinders_sharing_is_told_once(tmp_path_factory, monkeypatch, caplog, obstacle):
    model = loaded(tmp_path_factory, "llava")
    requests = requests_of(model)
    if obstacle == "default":
        model.model.generation_config.no_repeat_ngram_size = 2
        message = "generation default no_repeat_ngram_size=2"
    else:
        monkeypatch.setattr(prefixes, "DynamicLayer", DynamicSlidingWindowLayer)
        message = "a cache with DynamicLayer"
    with caplog.at_level(logging.WARNING, "secateur.models"):
        for method in ("none", "scope"):
            _, count = answered(model, requests, method, 100_000)
            assert count == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"questions about one image do not share a prefill: {message}"
        if obstacle == "windows"
        else f"questions about one image do not share a prefill: the checkpoint's {message}"
    ]


def test_questions_before_the_image_are_not_shared(tmp_path_factory):
    """What differs between prompts has to come after the last image."""
    model = loaded(tmp_path_factory, "qwen2_5_vl")  # its template keeps places
    requests = requests_of(model, [((0,), "one?"), ((0,), "two?")])
    for request in requests:
        request.args = (*request.args[:1], question_first, *request.args[2:])
    alone, _ = answered(model, requests, "scope", 0)
    shared, count = answered(model, requests, "scope", 100_000)
    assert (shared, count) == (alone, 0)


def question_first(doc):
    (message,) = messages(doc)
    return [{"role": "user", "content": message["content"][::-1]}]


def test_out_of_memory_halves_a_shared_batch(tmp_path_factory, monkeypatch):
    model = loaded(tmp_path_factory, "llava")
    requests = requests_of(model, [((n // 4,), f"question {n}?") for n in range(8)])
    alone, _ = answered(model, requests, "scope", 0)
    answer, sizes = prefixes.answer, []

    def scarce(owner, prefix, questions, *rest):
        sizes.append(len(questions))
        if len(questions) > 3:
            raise torch.cuda.OutOfMemoryError
        return answer(owner, prefix, questions, *rest)

    monkeypatch.setattr(prefixes, "answer", scarce)
    shared, count = answered(model, requests, "scope", 100_000)
    assert (shared, count) == (alone, 8)
    assert sizes[0] == 8
    assert max(sizes[-3:]) <= 3


def test_requests_are_ordered_by_the_data_sets_own_names_of_images():
    data = Dataset.from_dict({"image_source": ["b", "a", "b", "c", "a"]})
    requests = [SimpleNamespace(args=("", None, {}, doc_id, "pope", "test")) for doc_id in range(5)]
    order = [[one.args[3] for one in group] for group in by_image(requests, data)]
    assert order == [[0, 2], [1, 4], [3]]
    assert TASKS["mmstar"].image_field is None
    for request in requests:
        request.args = (*request.args[:4], "mmstar", "test")
    assert len(by_image(requests, data)) == 5


def test_a_shard_has_whole_images(tmp_path_factory):
    model = loaded(tmp_path_factory, "llava")
    data = Dataset.from_dict({"image_source": list("abcabcabc")})
    model.task_dict["pope"] = {"test": data}
    requests = [SimpleNamespace(args=("", None, {}, doc_id, "pope", "test")) for doc_id in range(9)]
    seen = []
    model.documents.request = lambda request, *_: request.args[3]
    for number in range(2):
        model.shard = (number, 2)
        seen.append(list(model._missing(requests)))
    assert seen == [[0, 3, 6, 2, 5, 8], [1, 4, 7]]

"""Every family through lmms-eval: all six tasks, all methods.

The models are tiny real ones, loaded from their folders as a user's would be.
"""

import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import picture
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.protocol import ChatMessages
from PIL import Image

from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.geometry import config_of, random_model, random_processor, tiny
from secateur.injection import inject
from secateur.models import DocumentError, PrunedModel
from secateur.pruners import REGISTRY, InLLMPruner, build
from secateur.shapes.datasets import SIZES, SWEEP_TASKS
from secateur.shapes.datasets import build as build_shapes
from secateur.tasks import TASKS
from secateur.tasks.load import load_tasks, manager_of

FAMILIES = {
    "llava": {},
    "llava_next": {"layout": "fixed2880"},
    "llava_onevision": {},
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {},
    "internvl": {},
}
PATCHES_OF_14 = ["qwen2_vl", "qwen2_5_vl"]
QWEN = [*PATCHES_OF_14, "qwen3_vl"]
# fields that a tiny model needs, and those that a family without CLS and CLIP needs
OPTIONS = {
    "cdpruner": {"relevance_space": "llm_embed"},
    "sppruner": {"relevance_space": "llm_embed"},
    "fsr": {"relevance_space": "none"},
    "fastv": {"layer": 1},
    "pact": {"layer": 1},
    "dart": {"layer": 1, "image_pivots": 2, "text_pivots": 2},
    "pyramiddrop": {"stages": (1, 2, 3)},
    "sparsevlm": {"stages": (1, 2, 3), "kept": (9, 5, 3)},
}
WITHOUT_CLS = {
    "prunesid": {"variant": "qwen"},
    "prunesid_dyn": {"variant": "qwen"},
    "visionzip": {"keep_cls": False},
}
# no model here has CLIP's text tower beside it
WITHOUT_CLIP = {"trim": "compares with the question in CLIP's space"}
# what Qwen's models cannot have: scores of a CLS row, blocks of 2 x 2 in a grid of 3 x 3
REFUSED = {
    "hired": "do not provide first_saliency",
    "prumerge": "do not provide",
    "prumerge_plus": "do not provide",
    "pooling": "sides have to be even",
    "tome": "tokens cannot be merged inside the image encoder of qwen.* models",
}
REFUSED_BY = {  # by the other families without what the method reads
    "internvl": {
        "prumerge": "do not provide last_keys, last_queries",
        "prumerge_plus": "do not provide last_keys, last_queries",
        "tome": "tokens cannot be merged inside the image encoder of InternVL models",
    },
    "llava_onevision": {
        "hired": "do not provide first_saliency",
        "prumerge": "do not provide",
        "prumerge_plus": "do not provide",
        "tome": "tokens cannot be merged inside the image encoder of llava_onevision models",
    },
}


def options_of(family: str, method: str) -> dict:
    """The fields of a method for a tiny model of a family."""
    with_cls = family in ("llava", "llava_next")
    return OPTIONS.get(method, {}) | ({} if with_cls else WITHOUT_CLS.get(method, {}))


def refused_by(family: str) -> dict[str, str]:
    """The methods before the language model that a family refuses, and parts of its messages."""
    return REFUSED if family in QWEN else REFUSED_BY.get(family, {})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = build_shapes(tmp_path_factory.mktemp("data") / "shapes", dict.fromkeys(SIZES, 4))
    return load_tasks(list(SWEEP_TASKS), root)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        made[family], config = tmp_path_factory.mktemp(family), tiny(family)
        random_model(config, "cpu", torch.float32, "sdpa", seed=0, std=0.2).save_pretrained(
            made[family]
        )
        random_processor(config).save_pretrained(made[family])
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, folders):
    return PrunedModel(
        str(folders[request.param]),
        dtype="float32",
        device="cpu",
        max_new_tokens=4,
        **FAMILIES[request.param],
    )


@pytest.fixture(scope="module")
def requests(model, tasks):
    """One document of every task, after lmms-eval has asked the model all six.

    They are scored with the unpruned model.
    """
    model.use(build("none"), Budget(), None)
    results = simple_evaluate(
        model=model,
        tasks=list(tasks.values()),
        limit=2,
        task_manager=manager_of(TASKS["pope"]),
        bootstrap_iters=0,
        process_docs_parallel=1,
    )
    assert set(results["results"]) == set(tasks)
    return [task.instances[0] for task in tasks.values()]


# every method in a family with CLS and in one without; elsewhere one of each kind here, and all in
# `make test-matrix`
WHOLE = ("llava", "qwen2_5_vl")
KINDS = ("none", "scope", "promprune", "divprune", "visionzip", "fsr", "fastv", "sparsevlm")


def pairs(settings, methods, kinds):
    """(setting, method): those that run in every test run, and the others marked `matrix`."""
    return [
        pytest.param(
            setting,
            method,
            marks=[] if setting in WHOLE or method in kinds else pytest.mark.matrix,
        )
        for setting in settings
        for method in methods
    ]


@pytest.mark.parametrize(
    ("model", "method"), pairs(FAMILIES, sorted(REGISTRY), KINDS), indirect=["model"]
)
def test_every_method_answers_every_task(model, requests, method):
    options = options_of(model.family, method)
    budget = Budget.parse("25%" if method == "pooling" else "50%")
    model.use(build(method, **options), budget, None)
    refused = WITHOUT_CLIP | refused_by(model.family)
    if method in refused:
        with pytest.raises((DocumentError, ValueError), match=refused[method]):
            model.generate_until(requests)
        return
    answers = model.generate_until(requests)
    assert len(answers) == len(requests)
    for answer in model.answers.values():
        assert answer.new_tokens
        before, kept, *between = (
            sum(answer.audit.visual_tokens),
            answer.audit.layer_tokens[-1],
            answer.audit.layer_tokens[0],
        )
        assert before
        if method == "none":
            assert kept == before
        elif isinstance(build(method, **options), InLLMPruner):
            assert kept < between[0] == before
        elif not build(method, **options).adaptive:
            # newlines between rows of tiles stay beside the budget
            lines = sum(rows for rows, _ in answer.audit.sections[1:])
            more = kept - (before - lines) * budget.retention
            images = len(answer.audit.visual_tokens)
            assert -images <= more <= images + lines


def test_an_unknown_layout_and_fields_of_other_families_are_refused(folders):
    for family, fields, message in [
        ("llava", {"layout": "anyres"}, "model.layout='anyres' is not one of null"),
        ("llava", {"unpruned_layout": "anyres"}, "model.layout='anyres' is not one of null"),
        ("llava_next", {"geometry": "pad"}, "model.geometry='pad' is not one of processor"),
        ("llava", {"image_side": 112}, "model.image_side=112"),
        ("llava", {"max_pixels": 10_000}, "are for Qwen's models, not for the family"),
        ("qwen2_5_vl", {"prompt": "vicuna_v1"}, "model.prompt='vicuna_v1' is not one of hub"),
        ("qwen2_5_vl", {"family": "llava"}, "model.family=llava but"),
        (
            "qwen2_vl",
            {"family": "qwen2_5_vl"},
            "model.family=qwen2_5_vl but .* type 'qwen2_vl'",
        ),
        ("qwen2_vl", {"geometry": "pad"}, "model.geometry='pad' is not one of processor"),
        ("llava", {"resize": "cv2"}, "model.resize='cv2' is not one of pil, torchvision"),
        (
            "llava",
            {"text_scope": "words"},
            "model.text_scope='words' is not one of question, question_stripped, all_text",
        ),
        ("llava", {"weights": "tiny"}, "weights='tiny'"),
    ]:
        with pytest.raises(ValueError, match=message):
            PrunedModel(str(folders[family]), dtype="float32", device="cpu", **fields)


def test_the_unpruned_model_has_its_own_layout(folders, tasks):
    model = PrunedModel(
        str(folders["llava_next"]),
        dtype="float32",
        device="cpu",
        max_new_tokens=1,
        layout="crops",
        unpruned_layout="anyres",
    )
    tokens = {}
    for method in ("none", "scope", "none"):
        model.use(build(method), Budget.parse("50%"), None)
        simple_evaluate(
            model=model,
            tasks=[tasks["pope"], tasks["mmmu_val"]],
            limit=2,
            task_manager=manager_of(TASKS["pope"]),
            bootstrap_iters=0,
            process_docs_parallel=1,
        )
        tokens.setdefault(method, []).append(
            [sum(answer.audit.visual_tokens) for answer in model.answers.values()]
        )
    grid, crops = 4, 5  # square images: 4 newlines or more a mosaic
    assert tokens["none"][0] == tokens["none"][1]
    assert all(count % (crops * grid**2) == 0 for count in tokens["scope"][0])
    for unpruned, pruned in zip(tokens["none"][0], tokens["scope"][0], strict=True):
        images = pruned // (crops * grid**2)
        assert unpruned == pruned + images * 2 * grid


@pytest.mark.parametrize("family", PATCHES_OF_14)
class TestLimits:
    """Limits of pixels that leave an image fewer tokens than the budget are refused."""

    def made(self, folders, family, **fields):
        return PrunedModel(str(folders[family]), dtype="float32", device="cpu", **fields)

    @pytest.mark.parametrize("method", ["scope", "fastv"])
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"max_pixels": 16 * 28 * 28},
                r"budget=17: model\.max_pixels=12544 leaves an image at most 16 visual tokens; .* "
                "at least 13328",
            ),
            ({"image_side": 112}, r"budget=17: model\.image_side=112 leaves every image 16 visual"),
            (
                {"image_side": 500, "min_pixels": 28 * 28, "max_pixels": 20 * 28 * 28},
                r"budget=17: model\.image_side=500 leaves every image 16 visual",
            ),
        ],
    )
    def test_before_the_first_document_where_no_image_has_enough(
        self, folders, family, fields, message, method
    ):
        model, pruner = self.made(folders, family, **fields), build(method)
        for fits in (Budget(tokens=16), Budget(retention=0.5), Budget()):
            model.use(pruner, fits, None)
        model.use(build("none"), Budget(tokens=17), None)
        with pytest.raises(ValueError, match=message):
            model.use(pruner, Budget(tokens=17), None)

    def test_at_the_first_image_that_is_too_small(self, folders, family):
        model = self.made(folders, family)
        content = [
            {"type": "image", "url": picture(0)},
            {"type": "image", "url": Image.new("RGB", (30, 30), "red")},
            {"type": "text", "text": "Why?"},
        ]
        model.task_dict["toy"] = {"test": [[{"role": "user", "content": content}]]}
        request = SimpleNamespace(args=("", lambda doc: doc, {}, 0, "toy", "test"))
        model.use(build("scope"), Budget(tokens=5), None)
        message = (
            r"^toy/0: ValueError: budget=5: an image has only 4 visual tokens with "
            r"model\.min_pixels=3136; lower the budget to at most 4, or set "
            r"model\.min_pixels to 3920$"
        )
        with pytest.raises(DocumentError, match=message):
            model.generate_until([request])
        model.use(build("scope"), Budget(tokens=4), None)
        model.generate_until([request])

    def test_limits_that_contradict_each_other(self, folders, family):
        with pytest.raises(ValueError, match=r"min_pixels=9000 is above model\.max_pixels=8000"):
            self.made(folders, family, min_pixels=9000, max_pixels=8000)
        with pytest.raises(ValueError, match=r"min_pixels=3136 is above model\.max_pixels=784"):
            self.made(folders, family, max_pixels=784)


class TestInputs:
    """The fields of the input change what the model sees, as the original codes did it."""

    def chat(self, image: Image.Image, text: str = "Why?") -> ChatMessages:
        return ChatMessages(
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image", "url": image}, {"type": "text", "text": text}],
                }
            ]
        )

    def made(self, folders, family, **fields):
        return PrunedModel(str(folders[family]), dtype="float32", device="cpu", **fields).inputs

    def test_pad_puts_the_image_into_a_square_of_the_mean_colour(self, folders):
        inputs, white = (
            self.made(folders, "llava", geometry="pad", resize="pil"),
            Image.new("RGB", (56, 28), "white"),
        )
        prompt = inputs.prompt(self.chat(white))
        assert prompt.images[0].size == (56, 56)
        pixels = inputs(prompt)["pixel_values"][0]
        assert (
            pixels[:, :13].abs().max() < 0.02
        )  # the mean colour, rounded down, is about 0 once normalised
        assert pixels[:, 20:36].min() > 1.5
        cropped = self.made(folders, "llava")
        assert cropped(cropped.prompt(self.chat(white)))["pixel_values"].min() > 1.5

    def test_backends_of_the_resize_are_not_quite_the_same(self, folders):
        tensors = []
        for resize in ("pil", "torchvision"):
            inputs = self.made(folders, "llava", resize=resize)
            tensors.append(inputs(inputs.prompt(self.chat(picture(0))))["pixel_values"])
        assert tensors[0].shape == tensors[1].shape
        assert 0 < (tensors[0] - tensors[1]).abs().max() < 0.5

    @pytest.mark.parametrize("family", QWEN)
    def test_qwen_images_get_a_fixed_side(self, folders, family):
        inputs = self.made(folders, family, image_side=112 if family in PATCHES_OF_14 else 128)
        for image in (picture(0), picture(1).resize((90, 31))):
            assert inputs(inputs.prompt(self.chat(image)))["image_grid_thw"].tolist() == [[1, 8, 8]]

    @pytest.mark.parametrize("family", QWEN)
    def test_qwen_images_keep_to_the_limits_of_pixels(self, folders, family):
        inputs = self.made(folders, family, max_pixels=56 * 56, min_pixels=28 * 28)
        batch = inputs(inputs.prompt(self.chat(picture(0).resize((300, 300)))))
        assert int(batch["image_grid_thw"].prod()) * 14 * 14 <= 56 * 56

    @pytest.mark.parametrize(
        ("size", "grid"), [((202, 100), (12, 23)), ((100, 202), (23, 12)), ((1000, 1000), (36, 36))]
    )
    @pytest.mark.parametrize("family", PATCHES_OF_14)
    def test_qwen_images_are_resized_once_by_the_limits(self, folders, family, size, grid):
        inputs = self.made(folders, family, min_pixels=200704, max_pixels=1605632)
        batch = inputs(inputs.prompt(self.chat(Image.new("RGB", size, "red"))))
        assert tuple((batch["image_grid_thw"][0, 1:] // 2).tolist()) == grid

    def test_qwen3s_images_are_resized_by_patches_of_16(self, folders):
        inputs = self.made(folders, "qwen3_vl", min_pixels=65536, max_pixels=1605632)
        for size, grid in [((202, 100), (6, 12)), ((640, 480), (15, 20)), ((2000, 2000), (39, 39))]:
            batch = inputs(inputs.prompt(self.chat(Image.new("RGB", size, "red"))))
            assert tuple((batch["image_grid_thw"][0, 1:] // 2).tolist()) == grid

    def test_the_question_is_what_the_scope_says(self, folders):
        text = "Is it red?\nAnswer the question using a single word or phrase."
        for scope, question in [("question", text), ("question_stripped", "Is it red?")]:
            inputs = self.made(folders, "llava", text_scope=scope)
            assert inputs.prompt(self.chat(picture(0), text)).question == question
        whole = (
            self.made(folders, "llava", text_scope="all_text")
            .prompt(self.chat(picture(0), text))
            .question
        )
        assert "USER" in whole
        assert "<image>" not in whole

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_text_of_a_placeholder_in_a_question_is_refused(self, folders, family):
        inputs = self.made(folders, family)
        with pytest.raises(ValueError, match="the question contains the literal text '<"):
            inputs.prompt(self.chat(picture(0), f"What is {inputs.processor.image_token}?"))

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("size", [(1, 1), (1, 150), (150, 1), (3, 40), (1, 201)])
    def test_tiny_and_narrow_images_are_answered_or_named(self, folders, family, size):
        model = PrunedModel(str(folders[family]), dtype="float32", device="cpu", **FAMILIES[family])
        prompt = self.chat(Image.new("RGB", size, "red"))
        if family in QWEN and max(size) / min(size) > 200:  # what its own processor refuses
            model.task_dict["toy"] = {"test": [prompt.model_dump()["messages"]]}
            request = SimpleNamespace(args=("", lambda doc: doc, {}, 0, "toy", "test"))
            with pytest.raises(DocumentError, match=r"^toy/0: ValueError: .*aspect ratio"):
                model.generate_until([request])
            return
        batch = model.inputs(model.inputs.prompt(prompt))
        for method in ("none", "scope"):
            with inject(model.model, build(method), "50%", layout=FAMILIES[family].get("layout")):
                assert (
                    len(model.model.generate(**batch, max_new_tokens=2)[0])
                    > batch["input_ids"].shape[1]
                )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["none", "scope", "fastv"])
def test_prompts_without_and_with_two_images(folders, family, method):
    model = PrunedModel(str(folders[family]), dtype="float32", device="cpu", **FAMILIES[family])
    text, batches = {"type": "text", "text": "Which one?"}, []
    for count in (0, 2):
        content = [*({"type": "image", "url": picture(number)} for number in range(count)), text]
        prompt = model.inputs.prompt(ChatMessages(messages=[{"role": "user", "content": content}]))
        batches.append(model.inputs(prompt))
    unpruned = model.model.generate(**batches[0], max_new_tokens=2, min_new_tokens=2)
    with inject(
        model.model,
        build(method, **OPTIONS.get(method, {})),
        "50%",
        layout=FAMILIES[family].get("layout"),
    ) as trace:
        outputs = [
            model.model.generate(**batch, max_new_tokens=2, min_new_tokens=2) for batch in batches
        ]
    assert torch.equal(outputs[0], unpruned)  # without an image there is nothing to prune
    assert outputs[1].shape[1] == batches[1]["input_ids"].shape[1] + 2
    assert [len(record.visual_tokens) for record in trace.audits[-2:]] == [0, 2]


@pytest.mark.lmms_classes
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_unpruned_answers_are_those_of_lmms_evals_own_classes(
    folders, tasks, family, monkeypatch
):
    from lmms_eval.models.chat import qwen2_5_vl
    from lmms_eval.models.chat.llava_hf import LlavaHf

    options = {
        "pretrained": str(folders[family]),
        "device": "cpu",
        "device_map": "cpu",
        "attn_implementation": "sdpa",
    }
    fields = {}
    if family == "qwen2_5_vl":  # its class knows bfloat16 alone, and limits of its own
        theirs = qwen2_5_vl.Qwen2_5_VL(**options)
        limits = {"min_pixels": 256 * 28 * 28, "max_pixels": 1605632}
        fields = {"dtype": "bfloat16"} | limits
        # the one difference: it resizes an image twice, first without the limits
        resize = qwen2_5_vl.process_vision_info

        def once(conversations, **rest):
            for message in (part for conversation in conversations for part in conversation):
                for part in message["content"]:
                    if part["type"] == "image":
                        part |= limits
            return resize(conversations, **rest)

        monkeypatch.setattr(qwen2_5_vl, "process_vision_info", once)
    else:
        theirs = LlavaHf(**options, dtype="float32")
        fields = {"dtype": "float32"}
    ours = PrunedModel(str(folders[family]), device="cpu", **fields)
    task = tasks["scienceqa_img"]
    simple_evaluate(
        model=ours,
        tasks=[task],
        limit=2,
        task_manager=manager_of(TASKS["pope"]),
        bootstrap_iters=0,
        process_docs_parallel=1,
    )
    theirs.task_dict["scienceqa_img"] = ours.task_dict["scienceqa_img"]
    expected = [answer.text for answer in theirs.generate_until(task.instances)]
    assert [ours.answers["scienceqa_img", i].text for i in range(2)] == expected
    if family == "qwen2_5_vl":
        return
    # and their class runs pruned, within the same block
    ours.use(build("scope"), Budget.parse("50%"), None)
    mine = [answer.text for answer in ours.generate_until(task.instances)]
    with inject(theirs.model, build("scope"), "50%") as trace:
        assert [answer.text for answer in theirs.generate_until(task.instances)] == mine
    assert len(trace.audits) == 2


def test_random_weights_need_no_checkpoint(monkeypatch):
    monkeypatch.setattr("secateur.loading.config_of", lambda name: tiny(name))
    model = PrunedModel(
        "nowhere/at-all", name="llava", weights="random", dtype="float32", device="cpu"
    )
    assert model.family == "llava"
    assert config_of("llava_1_5_7b").text_config.hidden_size == 4096


class TestBatches:
    """Batches and the cache change no answer, no audit and no order."""

    def made(self, family, folders, tasks, **engine):
        """A model that lmms-eval has put two tasks to."""
        fields = {"dtype": "float32", "device": "cpu", "max_new_tokens": 6} | FAMILIES[family]
        model = PrunedModel(str(folders[family]), **fields, **engine)
        some, manager = [tasks["pope"], tasks["mmmu_val"]], manager_of(TASKS["pope"])
        simple_evaluate(
            model=model,
            tasks=some,
            limit=4,
            task_manager=manager,
            bootstrap_iters=0,
            process_docs_parallel=1,
        )
        return model

    @pytest.fixture(scope="class", params=FAMILIES)
    def plain(self, request, folders, tasks):
        return self.made(request.param, folders, tasks)

    @pytest.fixture(scope="class")
    def quick(self, plain, folders, tasks):
        """The same in batches of all that fit, with a cache that has to evict."""
        return self.made(
            plain.family, folders, tasks, batch_tokens=2000, cache=EncodeCache(300_000)
        )

    def answers(self, model, tasks, method, **options):
        """The answers to every document of two tasks, by task and document.

        One of the tasks has several images per prompt.
        """
        model.use(build(method, **options), Budget.parse("50%"), None)
        requests = [request for name in ("pope", "mmmu_val") for request in tasks[name].instances]
        given = [result.text for result in model.generate_until(requests)]
        audits = {key: answer.audit for key, answer in model.answers.items()}
        return given, audits, {key: answer.new_tokens for key, answer in model.answers.items()}

    @pytest.mark.parametrize("method", ["none", "scope", "random", "zspaprune", "fastv", "pact"])
    def test_they_equal_one_prompt_at_a_time(self, plain, quick, tasks, method):
        options = OPTIONS.get(method, {})
        assert self.answers(plain, tasks, method, **options) == self.answers(
            quick, tasks, method, **options
        )
        assert quick.images.cache.counts.memory_hits
        assert quick.images.cache.bytes <= 300_000

    def test_what_is_answered_is_not_asked_again(self, plain, tasks, monkeypatch):
        first = self.answers(plain, tasks, "none")
        monkeypatch.setattr(plain.model, "generate", None)
        requests = [request for name in ("pope", "mmmu_val") for request in tasks[name].instances]
        assert [result.text for result in plain.generate_until(requests)] == first[0]

    def test_a_batch_that_does_not_fit_is_halved(self, quick, tasks, monkeypatch):
        expected, generate, sizes = self.answers(quick, tasks, "random"), quick.model.generate, []
        failed = []

        def short_of_memory(**inputs):
            assert all(held() is None for held in failed), (
                "the tensors of a failed call are still held"
            )
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 1:
                activations = torch.zeros(1)
                failed.append(weakref.ref(activations))
                raise torch.cuda.OutOfMemoryError("no room")
            return generate(**inputs)

        monkeypatch.setattr(quick.model, "generate", short_of_memory)
        monkeypatch.setattr(quick, "batch_tokens", 2000)
        assert self.answers(quick, tasks, "random") == expected
        assert max(sizes) > 1
        assert quick.batch_tokens < 2000

    def test_sampling_and_beams_are_refused(self, plain, tasks, monkeypatch):
        request = tasks["pope"].instances[0]
        for option in ({"temperature": 0.7}, {"num_beams": 2}):
            monkeypatch.setitem(request.args[2], *next(iter(option.items())))
            plain.use(build("none"), Budget(), None)
            with pytest.raises(ValueError, match="generate greedily"):
                plain.generate_until([request])
            monkeypatch.undo()

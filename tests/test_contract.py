"""The names in transformers that injection reads.

They are found under every known name and refused under others; untested releases are self-tested.
"""

import functools
import inspect
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from conftest import picture, tiny_model
from packaging.requirements import Requirement
from packaging.version import Version

from secateur.families.contract import (
    SPELLINGS,
    TESTED,
    Arguments,
    ContractError,
    is_tested,
    require,
)
from secateur.geometry import random_processor, tiny
from secateur.injection import Sample, inject
from secateur.injection import selftest as selftest_module
from secateur.injection.session import adapter_for
from secateur.pruners import build

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    "llava": "USER: <image>\nWhat is this? ASSISTANT:",
    "llava_next": "USER: <image>\nWhat is this? ASSISTANT:",
    "llava_onevision": "USER: <image>\nWhat is this? ASSISTANT:",
    "qwen2_vl": "USER: <|vision_start|><|image_pad|><|vision_end|>What is this? ASSISTANT:",
    "qwen2_5_vl": "USER: <|vision_start|><|image_pad|><|vision_end|>What is this? ASSISTANT:",
    "qwen3_vl": "USER: <|vision_start|><|image_pad|><|vision_end|>What is this? ASSISTANT:",
    "internvl": "USER: <IMG_CONTEXT>\nWhat is this? ASSISTANT:",
}
STEPS = {
    "do_sample": False,
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "output_logits": True,
    "return_dict_in_generate": True,
}
METHODS = [("uniform", {}), ("fastv", {"layer": 2, "budget": "after"})]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(family, "sdpa")


@pytest.fixture(scope="module")
def inputs(family):
    return random_processor(tiny(family))(
        text=[FAMILIES[family]], images=[picture(0)], return_tensors="pt"
    )


@pytest.fixture
def untested(monkeypatch):
    """The installed transformers says that it is a release nobody has tested."""
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    selftest_module.check.cache_clear()
    selftest_module._warn.cache_clear()
    yield
    selftest_module.check.cache_clear()


def renamed(monkeypatch, owner: type, argument: str, new: str, told: bool) -> None:
    """`owner` gets `argument` under the name `new` from now on; its signature says so if `told`."""
    own, call = owner.forward, owner.__call__
    spellings = SPELLINGS.get(argument, (argument,))
    parameters = inspect.signature(own).parameters
    theirs = next(name for name in spellings if name in parameters)

    def called(self, *args, **kwargs):
        return call(
            self,
            *args,
            **{new if name in spellings else name: value for name, value in kwargs.items()},
        )

    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        return own(
            self,
            *args,
            **{theirs if name == new else name: value for name, value in kwargs.items()},
        )

    if told:
        changed = [
            parameter.replace(name=new) if parameter.name == theirs else parameter
            for parameter in parameters.values()
        ]
        forward.__signature__ = inspect.Signature(changed)
    monkeypatch.setattr(owner, "__call__", called)
    monkeypatch.setattr(owner, "forward", forward)


def generated(model, inputs, method, options, budget=0.5):
    with inject(model, build(method, **options), budget) as trace:
        trace.announce([Sample("one")])
        output = model.generate(**inputs, **STEPS)
    return output.sequences, torch.cat(output.logits), [record.id for record in trace.audits]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_the_cache_is_found_under_every_known_name(model, inputs, monkeypatch, method, options):
    sequences, logits, records = generated(model, inputs, method, options)
    assert records == ["one"], "one prompt, one record"
    text_model = type(model.model.language_model)
    for name in SPELLINGS["cache"]:
        with monkeypatch.context() as patch:
            renamed(patch, text_model, "cache", name, told=True)
            again = generated(model, inputs, method, options)
        assert torch.equal(again[0], sequences)
        assert torch.equal(again[1], logits)
        assert again[2] == ["one"]


def test_an_unknown_name_of_the_cache_is_an_error(model, monkeypatch):
    renamed(monkeypatch, type(model.model.language_model), "cache", "kv_store", told=True)
    message = (
        r"\w+\.forward has no argument cache or past_key_values, which injection reads.* "
        rf"transformers {transformers.__version__} names it otherwise: install a tested release "
        r"\(5\.0, .*\), with pip install "
        r"'transformers==5\.24\.\*'"
    )
    with pytest.raises(ContractError, match=message), inject(model, build("uniform"), 0.5):
        pass


def test_a_cache_that_the_hooks_miss_is_an_error(model, inputs, monkeypatch):
    renamed(monkeypatch, type(model.model.language_model), "cache", "kv_store", told=False)
    for method, options in METHODS:
        with pytest.raises(
            ValueError, match="a decoding step needs the cache that the prompt filled"
        ):
            generated(model, inputs, method, options)


class TestUntestedReleases:
    @pytest.mark.parametrize(("method", "options"), METHODS)
    def test_they_work_with_one_warning_where_the_contract_holds(
        self, model, inputs, monkeypatch, recwarn, request, method, options
    ):
        want = generated(model, inputs, method, options)
        request.getfixturevalue("untested")
        seed = torch.get_rng_state()
        recwarn.clear()
        for _ in range(2):
            got = generated(model, inputs, method, options)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
        assert torch.equal(torch.get_rng_state(), seed)
        (warning,) = recwarn
        assert "transformers 5.99.0 is not among" in str(warning.message)
        assert "it passed a self-test" in str(warning.message)

    @pytest.mark.parametrize(
        ("owner", "argument"), [("language_model", "cache"), ("layer", "position_embeddings")]
    )
    def test_they_are_refused_where_it_is_broken(
        self, family, model, inputs, monkeypatch, untested, owner, argument
    ):
        module = model.model.language_model
        renamed(
            monkeypatch,
            type(module if owner == "language_model" else module.layers[0]),
            argument,
            "unheard_of",
            told=False,
        )
        with (
            pytest.raises(ValueError, match="self-test") as caught,
            inject(model, build("uniform"), 0.5),
        ):
            pass
        said = str(caught.value)
        assert said.startswith(
            "transformers 5.99.0 is not among the releases that injection is tested on "
            "(5.0, 5.17, 5.23, 5.24)"
        )
        assert f"tiny random {family} model failed" in said
        assert "pip install 'transformers==5.24.*'" in said
        assert "`make test-matrix MATRIX=5.99.0`" in said
        assert "\n" not in said

    def test_they_are_refused_where_positions_are_read_otherwise(
        self, model, monkeypatch, untested
    ):
        """Nothing fails and no name is missed: only the numbers tell."""
        language = type(model.model.language_model)
        forward = language.forward

        @functools.wraps(forward)
        def other(self, *args, **kwargs):
            mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
            if mask is not None and positions is not None:  # as injection calls it
                kwargs["position_ids"] = positions + torch.arange(positions.shape[-1])
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(language, "forward", other)
        with (
            pytest.raises(ValueError, match=r"failed: .*logits .* apart"),
            inject(model, build("uniform"), 0.5),
        ):
            pass

    def test_the_self_test_leaves_defaults_alone_and_needs_none_of_them(
        self, family, untested, recwarn
    ):
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            selftest_module.check(family, "5.99.0")
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(before)
        assert len(recwarn) == 1

    def test_tested_ones_go_without(self, model, monkeypatch):
        def check(*_):
            raise AssertionError("the self-test ran")

        monkeypatch.setattr(selftest_module, "check", check)
        for version in TESTED:
            monkeypatch.setattr(transformers, "__version__", version)
            with inject(model, build("uniform"), 0.5):
                pass
        monkeypatch.setattr(transformers, "__version__", "5.25.0.dev0")
        with pytest.raises(AssertionError, match="ran"), inject(model, build("uniform"), 0.5):
            pass


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("5.24.0", True),
        ("5.24.7", True),
        ("5.24.0.dev0", False),
        ("5.25.0rc1", False),
        ("5.25.0", False),
        ("5.18.0", False),
    ],
)
def test_patch_releases_of_a_tested_minor_version_count_as_tested(version, tested):
    assert is_tested(version) is tested


def test_the_bound_of_the_package_and_the_makefile_name_the_tested_releases():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = (
        need
        for text in project["dependencies"]
        if (need := Requirement(text)).name == "transformers"
    )
    major, minor = Version(TESTED[-1]).release[:2]
    assert all(version in bound.specifier for version in (*TESTED, f"{major}.{minor}.99"))
    assert f"{major}.{minor + 1}.0" not in bound.specifier
    assert f"MATRIX := {' '.join(TESTED)}\n" in (ROOT / "Makefile").read_text()
    *others, last = (version.rpartition(".")[0] for version in TESTED)
    assert f"transformers {', '.join(others)} and {last}." in (ROOT / "README.md").read_text()


def test_parts_of_the_layers_are_for_methods_inside_the_language_model(model, monkeypatch):
    kind = type(adapter_for(model))
    monkeypatch.setattr(kind, "LANGUAGE_PARTS", ("layers.0.self_attn.qkv_proj",))
    with inject(model, build("uniform"), 0.5):
        pass
    with (
        pytest.raises(ContractError, match=r"has no `layers\.0\.self_attn\.qkv_proj`"),
        inject(model, build("fastv"), 0.5),
    ):
        pass


class TestArguments:
    @staticmethod
    def step(hidden, mask=None, *, cache=None, **options):
        return hidden, mask, cache, options

    def test_by_position_by_keyword_and_under_an_older_name(self):
        arguments = Arguments(self.step, "hidden", "mask", "cache")
        read = arguments.read((1, 2), {"past_key_values": 3, "more": 4})
        assert read == {"hidden": 1, "mask": 2, "cache": 3, "more": 4}
        assert self.step(**arguments.write(read)) == (1, 2, 3, {"more": 4})

    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [((1, 2, 3), {}), ((1,), {"hidden": 2}), ((1,), {"cache": 2, "past_key_values": 3})],
    )
    def test_a_call_that_does_not_fit_is_an_error(self, args, kwargs):
        with pytest.raises(ValueError, match="does not fit the signature"):
            Arguments(self.step, "hidden", "cache").read(args, kwargs)

    def test_a_missing_name_and_a_missing_part_are_errors(self, model):
        with pytest.raises(
            ContractError, match=r"TestArguments\.step has no argument pixel_values"
        ):
            Arguments(self.step, "pixel_values")
        with pytest.raises(
            ContractError,
            match=r"ForConditionalGeneration has no `model\.language_model\.layers\.0\.qkv`",
        ):
            require(model, "model.language_model.layers.0.qkv")


class TestWhatIsAPrompt:
    """A step without its cache is not taken for a prompt."""

    def test_one_token_may_be_the_first_prompt_of_a_block_and_no_later_one(self, model, inputs):
        one = {"input_ids": inputs["input_ids"][:, -1:]}
        plain = model.generate(**one, **STEPS)
        for method, options in METHODS:
            with inject(model, build(method, **options), 0.5) as trace:
                assert torch.equal(model.generate(**one, **STEPS).sequences, plain.sequences)
                assert len(trace.audits) == 1
                with pytest.raises(ValueError, match="open a block of its own"):
                    model.generate(**one, **STEPS)

    @pytest.mark.parametrize(("method", "options"), METHODS)
    def test_generating_without_a_cache_is_refused(self, family, model, inputs, method, options):
        text = random_processor(tiny(family))(text=["USER: hello ASSISTANT:"], return_tensors="pt")
        for prompt in (inputs, text):
            with (
                inject(model, build(method, **options), 0.5),
                pytest.raises(ValueError, match="use_cache=False"),
            ):
                model.generate(**prompt, **STEPS, use_cache=False)

    def test_a_prompt_with_one_token_more_is_a_prompt_where_there_is_a_cache(self, model, inputs):
        longer = {
            name: torch.cat([value, value[:, -1:]], 1)
            if value.shape == inputs["input_ids"].shape
            else value
            for name, value in inputs.items()
        }
        with inject(model, build("uniform"), 0.5):
            want = model.generate(**longer, **STEPS)
        with inject(model, build("uniform"), 0.5) as trace:
            model.generate(**inputs, **STEPS)
            assert torch.equal(model.generate(**longer, **STEPS).sequences, want.sequences)
        assert len(trace.audits) == 2

    def test_one_call_without_a_cache_is_a_prompt(self, model, inputs):
        with inject(model, build("uniform"), 0.5) as trace, torch.no_grad():
            logits = [model(**inputs, use_cache=cached).logits[:, -1] for cached in (False, True)]
        assert torch.equal(*logits)
        assert len(trace.audits) == 2

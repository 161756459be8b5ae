"""Methods inside the language model, on a tiny real LLaVA.

The reference runs layer by layer, without cache, mask or hooks.
"""

import copy
import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
from conftest import picture, tiny_model
from test_inject import QUESTIONS, STEPS, N, encode, hooks, logits
from torch import Tensor
from transformers import DynamicCache

from secateur.injection import Sample, inject
from secateur.pruners import InLLMPruner, LayerTokens, PrunerError, Selection, build
from secateur.pruners.base import EXTRA

# every method with schedules for four layers, the budget, and the visual tokens that each of the
# four layers then processes
METHODS = {
    "fastv": ("fastv", {"layer": 1}, 8, (16, 5, 5, 5)),
    "fastv after 2": ("fastv", {"layer": 2, "budget": "after"}, 6, (16, 16, 6, 6)),
    "fastv reindexed": ("fastv", {"layer": 1, "positions": "reindex"}, 8, (16, 5, 5, 5)),
    "pyramiddrop": ("pyramiddrop", {"stages": (1, 2, 3)}, 8, (16, 8, 4, 2)),
    "pyramiddrop original": (
        "pyramiddrop",
        {"stages": (1, 3), "positions": "original"},
        10,
        (16, 9, 9, 5),
    ),
    "dart": ("dart", {"layer": 1, "image_pivots": 2, "text_pivots": 2}, 8, (16, 6, 6, 6)),
    "dart reindexed": (
        "dart",
        {"layer": 2, "image_pivots": 1, "text_pivots": 1, "positions": "reindex"},
        12,
        (16, 16, 9, 9),
    ),
    "sparsevlm": ("sparsevlm", {"stages": (1, 2, 3), "kept": (9, 5, 3)}, 8, (16, 10, 6, 4)),
    "sparsevlm original": (
        "sparsevlm",
        {"stages": (1, 3), "kept": (4, 1), "positions": "original"},
        8,
        (16, 5, 5, 2),
    ),
    "sparsevlm unmerged": (
        "sparsevlm",
        {"stages": (1, 2, 3), "kept": (9, 5, 3), "merge": False},
        8,
        (16, 9, 5, 3),
    ),
}


@dataclass(frozen=True)
class Spy(InLLMPruner):
    """Passes everything on to another method and keeps what it was shown."""

    inner: InLLMPruner
    seen: list = field(default_factory=list)

    name = "spy"
    paper = "-"
    status = "baseline"
    needs = property(lambda self: self.inner.needs)  # type: ignore[assignment]
    positions = property(lambda self: self.inner.positions)  # type: ignore[assignment]
    attention_of = property(lambda self: self.inner.attention_of)  # type: ignore[assignment]
    apply_final_norm = property(lambda self: self.inner.apply_final_norm)  # type: ignore[assignment]

    def schedule(self, tokens: int, layers: int, keep: int) -> dict[int, int]:
        return self.inner.schedule(tokens, layers, keep)

    def tokens_after(self, tokens: int, keep: int) -> int:
        return self.inner.tokens_after(tokens, keep)

    def queries(self, embeddings: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        return self.inner.queries(embeddings, visual, text)

    def prune(self, tokens: LayerTokens, keep: int) -> Selection:
        self.seen.append((tokens, keep))
        return self.inner.prune(tokens, keep)


@dataclass(frozen=True)
class Planned(InLLMPruner):
    """Keeps given visual tokens before one layer."""

    layer: int = 1
    rows: tuple[tuple[int, ...], ...] = ((0, 2, 5),)
    count: int = 3
    answer: dict = field(default_factory=dict)

    name = "planned"
    paper = "-"
    status = "baseline"
    needs = frozenset({"hidden"})

    def schedule(self, tokens: int, layers: int, keep: int) -> dict[int, int]:
        return {self.layer: self.count}

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        return Selection(torch.tensor(self.rows), **self.answer)


@pytest.fixture(scope="module")
def eager(model):
    """The same weights, with attention that shows its maps."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def causal(length: int) -> Tensor:
    return torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]


@torch.no_grad()
def prompts(model, inputs) -> list[tuple[Tensor, Tensor]]:
    """Each row's prompt as the language model gets it.

    [L, D] without padding, and a mask [L] of the visual tokens.
    """
    visual = inputs["input_ids"] == model.config.image_token_id
    images = {
        name: inputs[name]
        for name in ("pixel_values", "image_sizes", "batch_num_images")
        if name in inputs
    }
    features = torch.cat(list(model.model.get_image_features(**images).pooler_output))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(
        visual[..., None], features
    )
    reals = inputs["attention_mask"].bool()
    return [
        (row[real], place[real]) for row, place, real in zip(embeds, visual, reals, strict=True)
    ]


@torch.no_grad()
def reference(
    eager, rows_in, pruner: InLLMPruner, budget: int, new: Tensor
) -> tuple[Tensor, list[list[int]]]:
    """Logits of every row, and the tokens that it kept.

    One row at a time; every layer gets the prompt and the generated tokens at once.
    """
    language, lookup = eager.model.language_model, eager.get_input_embeddings()
    rows, survivors = [], []
    for b, (embeds, places_seen) in enumerate(rows_in):
        hidden = torch.cat([embeds, lookup(new[b, :-1])])[None]
        prompt = len(embeds)
        visual = places_seen.nonzero()[:, 0].tolist()
        tokens, text = list(range(len(visual))), set(range(visual[-1] + 1, prompt))
        position = list(range(hidden.shape[1]))
        plan = pruner.schedule(len(visual), len(language.layers), budget)
        is_text = torch.tensor([[i in text for i in range(prompt)]])
        asked = pruner.queries(hidden[:, :prompt], torch.tensor([visual]), is_text)[0]
        # query positions are counted from the end of the prompt, where the text does not move
        distance = prompt
        asked = [int(i) - distance for i in asked.nonzero()[:, 0]]
        entered: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        for number, layer in enumerate(language.layers):
            if number in plan:
                length = hidden.shape[1] - (len(new[b]) - 1)
                rotary = language.rotary_emb(hidden, torch.tensor([position]))
                shown = number - 1 if pruner.attention_of == "previous" else number
                state, turn = [*entered, (hidden, rotary)][shown]
                weights = language.layers[shown].self_attn(
                    language.layers[shown].input_layernorm(state),
                    position_embeddings=turn,
                    attention_mask=causal(state.shape[1]),
                )[1]
                cache = DynamicCache()
                state, turn = entered[-1]
                language.layers[number - 1].self_attn(
                    language.layers[number - 1].input_layernorm(state),
                    position_embeddings=turn,
                    attention_mask=causal(state.shape[1]),
                    past_key_values=cache,
                )
                selection = pruner.select(
                    LayerTokens(
                        visual=torch.tensor([visual]),
                        text=torch.tensor([[i > visual[-1] for i in range(length)]]),
                        hidden=(language.norm(hidden) if pruner.apply_final_norm else hidden)[
                            :, :length
                        ],
                        attention=weights[:, :, [length + i for i in asked], :length],
                        keys=cache.layers[number - 1].keys[:, :, :length],
                    ),
                    plan[number],
                )
                chosen = selection.indices[0].tolist()
                merged = [i for i, index in enumerate(chosen) if index == EXTRA]
                stays = [i for i in range(length) if i not in visual or visual.index(i) in chosen]
                before, after = (
                    [i for i in stays if i <= visual[-1]],
                    [i for i in stays if i > visual[-1]],
                )
                after += range(length, hidden.shape[1])
                parts = [hidden[0, before], hidden[0, after]]
                if merged:
                    parts.insert(1, selection.features[0, merged])
                hidden = torch.cat(parts)[None]
                position = [
                    *(position[i] for i in before),
                    *[position[visual[-1]]] * len(merged),
                    *(position[i] for i in after),
                ]
                if pruner.positions == "reindex":
                    position = list(range(hidden.shape[1]))
                places = [before.index(visual[index]) for index in chosen if index != EXTRA]
                tokens = [EXTRA if index == EXTRA else tokens[index] for index in chosen]
                visual = places + list(range(len(before), len(before) + len(merged)))
            rotary = language.rotary_emb(hidden, torch.tensor([position]))
            entered.append((hidden, rotary))
            hidden = layer(
                hidden, attention_mask=causal(hidden.shape[1]), position_embeddings=rotary
            )
        rows.append(eager.lm_head(language.norm(hidden[0, -len(new[b]) :])))
        survivors.append([token for token in tokens if token != EXTRA])
    return torch.stack(rows), survivors


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_equals_the_layer_by_layer_reference(model, eager, processor, method, batch):
    name, options, budget, layer_tokens = METHODS[method]
    pruner, inputs = build(name, **options), encode(processor, batch)
    if batch == 2:
        assert (
            int(inputs["attention_mask"].sum(1).min()) < inputs["attention_mask"].shape[1]
        )  # one row is padded
    with inject(model, pruner, budget) as trace:
        pruned = model.generate(**inputs, **STEPS)
    length = inputs["input_ids"].shape[1]
    want, survivors = reference(
        eager, prompts(eager, inputs), pruner, budget, pruned.sequences[:, length:]
    )
    assert (logits(pruned) - want).abs().max() < 1e-4
    assert (
        logits(pruned) - logits(model.generate(**inputs, **STEPS))
    ).abs().max() > 0.1  # it does matter
    cache = pruned.past_key_values
    assert [cache.get_seq_length(layer) for layer in range(4)] == [
        length - N + count + 7 for count in layer_tokens
    ]
    for row, record in enumerate(trace.audits):
        assert record.visual_tokens == (N,)
        assert record.layer_tokens == layer_tokens
        assert record.kept_tokens == (layer_tokens[-1],)
        assert record.kept_indices == (tuple(survivors[row]),)
        assert record.prompt_tokens == int(inputs["attention_mask"][row].sum())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastv", {"layer": 1}),
        ("fastv", {"layer": 2, "positions": "reindex"}),
        ("dart", {"layer": 2}),
        ("pyramiddrop", {"stages": (1, 2, 3)}),
        ("pyramiddrop", {"stages": (1, 3), "positions": "original"}),
    ],
)
def test_keeping_all_changes_no_bit(model, processor, name, options, batch):
    inputs = encode(processor, batch)
    plain = model.generate(**inputs, **STEPS)
    with inject(model, build(name, **options), "full") as trace:
        kept = model.generate(**inputs, **STEPS)
    assert torch.equal(kept.sequences, plain.sequences)
    assert torch.equal(logits(kept), logits(plain))
    assert trace.audits[0].layer_tokens == (N,) * 4
    assert trace.audits[0].kept_indices == (tuple(range(N)),)


@pytest.mark.parametrize("method", ["sparsevlm", "dart", "pyramiddrop"])
def test_rows_of_a_batch_equal_the_rows_alone(model, processor, method):
    """The answers, and what the method is shown: a row's padding is neither ranked nor counted."""
    name, options, budget, _ = METHODS[method]
    inputs, spy = encode(processor, 3), Spy(build(name, **options))
    with inject(model, spy, budget):
        together = model.generate(**inputs, **STEPS)
        shown = [tokens for tokens, _ in spy.seen]
        for row in range(3):
            spy.seen.clear()
            alone = processor(
                text=[f"USER: <image>\n{QUESTIONS[row]} ASSISTANT:"],
                images=[picture(row)],
                return_tensors="pt",
            )
            assert (
                logits(model.generate(**alone, **STEPS))[0] - logits(together)[row]
            ).abs().max() < 1e-4
            for (one, _), many in zip(spy.seen, shown, strict=True):
                real = one.text.shape[1]
                assert torch.equal(one.visual[0], many.visual[row])
                assert torch.equal(one.text[0], many.text[row, :real])
                assert not many.text[row, real:].any()
                for axis, capture in ((0, "hidden"), (2, "attention"), (1, "keys")):
                    if (value := getattr(one, capture)) is not None:
                        part = getattr(many, capture)[row].narrow(axis, 0, real)
                        part = (
                            part[:, : value.shape[2]] if capture == "attention" else part
                        )  # rows of other prompts follow
                        assert (value[0] - part).abs().max() < 1e-4


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("name", "shown"), [("fastv", 1), ("pyramiddrop", 2)])
def test_score_rows_equal_those_of_an_eager_model(model, eager, processor, name, shown, padding):
    spy = Spy(build(name, **({"layer": 2} if name == "fastv" else {"stages": (2,)})))
    texts = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS[:2]]
    images = [picture(0), picture(1)]
    inputs = processor(
        text=texts, images=images, padding=True, padding_side=padding, return_tensors="pt"
    )
    with inject(model, spy, 9), torch.no_grad():
        model(**inputs)
    with torch.no_grad():
        maps = eager(**inputs, output_attentions=True).attentions[shown]
    ((tokens, _),) = spy.seen
    last = (inputs["attention_mask"] * torch.arange(maps.shape[-1])).argmax(1)
    assert tokens.attention.shape == (2, 4, 1, maps.shape[-1])
    for row, real in enumerate(inputs["attention_mask"].bool()):
        want = maps[row, :, last[row]][:, real]
        assert (tokens.attention[row, :, 0, : want.shape[1]] - want).abs().max() < 1e-5
        assert not tokens.attention[row, :, 0, want.shape[1] :].any()
    behind = [
        processor.tokenizer(text.split("<image>")[1], add_special_tokens=False)["input_ids"]
        for text in texts
    ]
    assert tokens.text.sum(1).tolist() == [len(ids) for ids in behind]


def test_grouped_keys_are_those_of_an_eager_model(processor, eager):
    model = tiny_model("llava", "sdpa")
    for layer in model.model.language_model.layers:  # two groups of two heads each
        attention = layer.self_attn
        for projection in (attention.k_proj, attention.v_proj):
            projection.weight = torch.nn.Parameter(projection.weight[:32].clone())
        attention.num_key_value_groups = 2
    inputs, spy = encode(processor, 2), Spy(build("fastv", layer=1))
    spy_keys = Spy(build("dart", layer=1, image_pivots=1, text_pivots=1))
    for pruner in (spy, spy_keys):
        with inject(model, pruner, 8), torch.no_grad():
            model(**inputs)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, use_cache=True)
    keys = spy_keys.seen[0][0].keys
    assert keys.shape[1] == 2
    for row, real in enumerate(inputs["attention_mask"].bool()):
        rows, count = spy.seen[0][0].attention[row, :, 0], int(real.sum())
        assert (rows[:, :count] - output.attentions[0][row, :, -1][:, real]).abs().max() < 1e-5
        assert (
            keys[row, :, :count] - output.past_key_values.layers[0].keys[row][:, real]
        ).abs().max() < 1e-5


def test_what_a_method_does_not_need_is_not_computed(model, processor):
    spy = Spy(build("dart", layer=1))
    with inject(model, spy, 8):
        model.generate(**encode(processor, 1), max_new_tokens=1)
    assert spy.seen[0][0].attention is None
    spy = Spy(build("fastv", layer=1))
    with inject(model, spy, 8):
        model.generate(**encode(processor, 1), max_new_tokens=1)
    assert spy.seen[0][0].hidden is None
    assert spy.seen[0][0].keys is None


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "sparsevlm original"])
def test_images_of_a_prompt_are_ranked_together(model, eager, processor, method):
    name, options, _, _ = METHODS[method]
    if name == "sparsevlm":
        options = options | {"kept": (20, 11, 5)[: len(options["stages"])]}
    pruner = build(name, **options)
    text = "USER: look <image> and then <image>\nwhich is it? ASSISTANT:"
    inputs = processor(text=[text], images=[picture(0), picture(1)], return_tensors="pt")
    with inject(model, pruner, "50%") as trace:
        pruned = model.generate(**inputs, **STEPS)
    new = pruned.sequences[:, inputs["input_ids"].shape[1] :]
    want, ((*survivors,),) = reference(eager, prompts(eager, inputs), pruner, N, new)
    assert (logits(pruned) - want).abs().max() < 1e-4
    (record,) = trace.audits
    assert record.visual_tokens == (N, N)
    assert [*record.kept_indices[0], *(N + index for index in record.kept_indices[1])] == survivors
    assert sum(record.kept_tokens) == record.layer_tokens[-1]
    assert record.kept_tokens[0] == len(record.kept_indices[0])


def test_a_count_is_meant_per_image(model, processor):
    with inject(model, build("fastv", layer=1, budget="after"), 5) as trace:
        model.generate(**encode(processor, 1, images_each=2), max_new_tokens=1)
    assert trace.audits[0].layer_tokens == (2 * N, 10, 10, 10)


def test_a_prompt_without_image_passes_through(model, processor):
    inputs = processor(text=["USER: hello ASSISTANT:"], return_tensors="pt")
    plain = model.generate(**inputs, **STEPS)
    with inject(
        model, build("sparsevlm"), 192
    ) as trace:  # no layer to match: its schedule is never asked
        model.generate(**inputs, **STEPS)
        pruned = model.generate(**inputs, **STEPS)
    assert torch.equal(logits(pruned), logits(plain))
    assert trace.audits[0].visual_tokens == ()
    assert trace.audits[0].layer_tokens == (0,) * 4


def test_a_plan_without_layers_is_recorded(model, processor):
    class Nothing(Planned):
        def schedule(self, tokens: int, layers: int, keep: int) -> dict[int, int]:
            return {}

    inputs = encode(processor, 1)
    with inject(model, Nothing(), 3) as trace:
        output = model.generate(**inputs, **STEPS)
    assert torch.equal(logits(output), logits(model.generate(**inputs, **STEPS)))
    assert trace.audits[0].layer_tokens == (N,) * 4


def test_prompts_follow_one_another(model, processor):
    """What one prompt leaves in the block does not reach the next: image, none, image."""
    inputs, text = (
        encode(processor, 2),
        processor(text=["USER: hello ASSISTANT:"], return_tensors="pt"),
    )
    with inject(model, build("fastv", layer=1), 8) as trace:
        trace.announce([Sample("a"), Sample("b")])
        first = model.generate(**inputs, **STEPS)
        between = model.generate(**text, **STEPS)
        second = model.generate(**inputs, **STEPS)
    assert torch.equal(logits(first), logits(second))
    assert torch.equal(logits(between), logits(model.generate(**text, **STEPS)))
    assert [record.id for record in trace.audits] == ["a", "b", "2", "3", "4"]


def test_nothing_is_left_behind(model, processor):
    inputs = encode(processor, 1)
    before, state = (
        model.generate(**inputs, **STEPS),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    count = hooks(model)
    with inject(model, build("pyramiddrop", stages=(1, 2)), 8):
        assert hooks(model) > count
        model.generate(**inputs, **STEPS)
    with pytest.raises(KeyboardInterrupt), inject(model, build("fastv", layer=1), 8):
        raise KeyboardInterrupt
    assert hooks(model) == count
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(logits(model.generate(**inputs, **STEPS)), logits(before))


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        (Planned(rows=((0, 0, 1),)), "more than once"),
        (Planned(rows=((0, 1, N),)), "outside 0..15"),
        (Planned(rows=((0, 1),)), "let 2 of 16 tokens pass before layer 1; its schedule says 3"),
        (Planned(rows=((0, 5, 2),), answer={"custom_order": True}), "do not ascend"),
        (Planned(rows=((0, 2, 5),), answer={"counts": torch.tensor([2])}), "its schedule says 3"),
        (Planned(rows=((0, 2, 5),), answer={"features": torch.zeros(1, 3, 64)}), "'projected'"),
        (Planned(count=N + 1), "cannot keep 17 of 16"),
        (Planned(layer=4), r"before layers \[4\]"),
        (Planned(layer=0), r"before layers \[0\]"),
        (build("fastv", layer=3), "cannot average 3 tokens over 4 layers"),
        (build("fastv", layer=4), "layer=4 is not between the layers"),
        (build("sparsevlm"), "has no counts for 3 of 16 tokens"),
    ],
)
def test_errors_reach_the_caller(model, processor, pruner, message):
    model.generate(
        **encode(processor, 1), max_new_tokens=1
    )  # transformers adds hooks of its own at the first call
    before = hooks(model)
    with inject(model, pruner, 3), pytest.raises(PrunerError, match=message):
        model.generate(**encode(processor, 1), max_new_tokens=1)
    assert hooks(model) == before


def test_calls_that_cannot_be_pruned_are_errors(model, processor):
    fastv = build("fastv", layer=1)
    one_and_two = ["USER: <image>\nwhat? ASSISTANT:", "USER: <image><image>\nwhat? ASSISTANT:"]
    for texts in (one_and_two, ["USER: hello ASSISTANT:", one_and_two[1]]):
        pictures = [picture(i) for i in range(sum(text.count("<image>") for text in texts))]
        inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        with inject(model, fastv, 8), pytest.raises(ValueError, match="use batch size 1"):
            model.generate(**inputs, max_new_tokens=1)
    with inject(model, fastv, 8), pytest.raises(ValueError, match="text after the image"):
        model.generate(
            **processor(text=["USER: <image>"], images=[picture(0)], return_tensors="pt"),
            max_new_tokens=1,
        )
    with inject(model, fastv, 17), pytest.raises(ValueError, match=r"17.*16"):
        model.generate(**encode(processor, 1), max_new_tokens=1)
    with inject(model, fastv, 8), pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 64))
    with inject(model, fastv, 8), pytest.raises(ValueError, match="a dynamic cache"):
        model.generate(**encode(processor, 2), max_new_tokens=2, cache_implementation="static")
    inputs = encode(processor, 1)
    cache = model(**inputs, use_cache=True).past_key_values
    with inject(model, fastv, 8), pytest.raises(ValueError, match="filled outside this block"):
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=cache)
    with inject(model, fastv, 8):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="in one piece"):
            model(**inputs | {"attention_mask": None}, past_key_values=cache)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_positions_of_a_block_are_for_methods_before_the_language_model(model, positions):
    message = (
        rf"positions='{positions}' .* 'pyramiddrop' .* its field `positions`, .* \('reindex' here\)"
    )
    with (
        pytest.raises(ValueError, match=message),
        inject(model, build("pyramiddrop", stages=(1,)), 8, positions),
    ):
        pass


def test_a_method_without_positions_keeps_them(model, processor):
    inputs, kept = encode(processor, 1), (0, 2, 5)
    with inject(model, Planned(), 3):
        own = model.generate(**inputs, **STEPS)

    @dataclass(frozen=True)
    class Says(Planned):
        positions: str = "original"

    with inject(model, Says(), 3):
        said = model.generate(**inputs, **STEPS)
    with inject(model, Says(positions="reindex"), 3) as trace:
        other = model.generate(**inputs, **STEPS)
    assert torch.equal(logits(own), logits(said))
    assert not torch.equal(logits(own), logits(other))
    assert trace.audits[0].kept_indices == (kept,)
    assert dataclasses.replace(Says(), rows=(kept,)) == Says()

"""Methods inside the language model of a tiny real Qwen2.5-VL, Qwen2-VL and Qwen3-VL.

The reference runs layer by layer, without cache or hooks.
"""

import pytest
import torch
from test_inject import STEPS, logits
from test_inject_layers import METHODS, Spy, causal
from test_inject_qwen import SIZES, Row, encode, prompts
from torch import Tensor
from transformers import DynamicCache

from secateur.injection import inject
from secateur.pruners import InLLMPruner, LayerTokens, build
from secateur.pruners.base import EXTRA

SIXTEEN = [(112, 112), (224, 56)]  # 4 x 4 and 2 x 8


@torch.no_grad()
def layered(
    eager, rows: list[Row], pruner: InLLMPruner, budget: int, new: Tensor
) -> tuple[Tensor, list[list[int]]]:
    """Logits of every row, and the tokens that it kept.

    One row at a time; every layer gets the prompt and the generated tokens at once.
    """
    language, answers, survivors = eager.model.language_model, [], []
    for row, generated in zip(rows, new, strict=True):
        steps = len(generated) - 1
        hidden = torch.cat([row.embeds, eager.get_input_embeddings()(generated[:-1])])[None]
        position = torch.cat([row.positions, row.end + torch.arange(steps).expand(3, -1)], 1)
        visual = torch.cat(row.visual)
        tokens, prompt = torch.arange(len(visual)), len(row.embeds)
        plan = pruner.schedule(len(visual), len(language.layers), budget)
        behind = torch.arange(prompt) > visual[-1]
        # counted from the end of the prompt, where the text does not move
        asked = (
            pruner.queries(hidden[:, :prompt], visual[None], behind[None])[0].nonzero()[:, 0]
            - prompt
        )
        entered: list[tuple[Tensor, Tensor]] = []

        def attend(number: int, state: Tensor, place: Tensor, **options) -> Tensor:
            layer = language.layers[number]
            turn, mask = language.rotary_emb(state, place[:, None]), causal(state.shape[1])
            return layer.self_attn(
                layer.input_layernorm(state),
                position_embeddings=turn,
                attention_mask=mask,
                **options,
            )[1]

        for number, layer in enumerate(language.layers):
            if number in plan:
                length = hidden.shape[1] - steps
                shown = number - 1 if pruner.attention_of == "previous" else number
                weights = attend(shown, *[*entered, (hidden, position)][shown])
                cache = DynamicCache()
                attend(number - 1, *entered[-1], past_key_values=cache)
                selection = pruner.select(
                    LayerTokens(
                        visual=visual[None],
                        text=(torch.arange(length) > visual[-1])[None],
                        hidden=(language.norm(hidden) if pruner.apply_final_norm else hidden)[
                            :, :length
                        ],
                        attention=weights[:, :, length + asked, :length],
                        keys=cache.layers[number - 1].keys[:, :, :length],
                    ),
                    plan[number],
                )
                chosen, last = selection.indices[0], int(visual[-1])
                merged = chosen == EXTRA
                stays = torch.ones(hidden.shape[1], dtype=torch.bool)
                stays[visual] = False
                stays[visual[chosen[~merged]]] = True
                before, after = (
                    stays[: last + 1].nonzero()[:, 0],
                    last + 1 + stays[last + 1 :].nonzero()[:, 0],
                )
                places = (stays.cumsum(0) - 1)[visual[chosen[~merged]]]
                source = torch.cat([before, torch.full((int(merged.sum()),), last), after])
                visual = torch.cat([places, len(before) + torch.arange(int(merged.sum()))])
                hidden = hidden[:, source]
                if merged.any():
                    hidden[0, visual[merged]] = selection.features[0, merged]
                position = position[:, source]
                if pruner.positions == "reindex":
                    position = torch.arange(len(source)).expand(3, -1)
                tokens = torch.where(merged, EXTRA, tokens[chosen.clamp_min(0)])
            entered.append((hidden, position))
            turn = language.rotary_emb(hidden, position[:, None])
            output = layer(hidden, attention_mask=causal(hidden.shape[1]), position_embeddings=turn)
            hidden = (
                output[0] if isinstance(output, tuple) else output
            )  # a tuple in transformers 5.0
            if number < len(row.deep):
                own = tokens != EXTRA
                hidden[0, visual[own]] += row.deep[number][tokens[own]]
        answers.append(eager.lm_head(language.norm(hidden[0, -len(generated) :])))
        survivors.append([token for token in tokens.tolist() if token != EXTRA])
    return torch.stack(answers), survivors


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_equals_the_layer_by_layer_reference(
    qwen_model, qwen_eager, qwen_processor, method, batch
):
    name, options, budget, layer_tokens = METHODS[method]
    pruner, inputs = (
        build(name, **options),
        encode(qwen_processor, [[size] for size in SIXTEEN[-batch:]]),
    )
    with inject(qwen_model, pruner, budget) as trace:
        pruned = qwen_model.generate(**inputs, **STEPS)
    length = inputs["input_ids"].shape[1]
    want, survivors = layered(
        qwen_eager, prompts(qwen_eager, inputs), pruner, budget, pruned.sequences[:, length:]
    )
    assert (logits(pruned) - want).abs().max() < 1e-4
    assert (
        logits(pruned) - logits(qwen_model.generate(**inputs, **STEPS))
    ).abs().max() > 0.1  # it does matter
    cache = pruned.past_key_values
    assert [cache.get_seq_length(layer) for layer in range(4)] == [
        length - 16 + count + 7 for count in layer_tokens
    ]
    for row, record in enumerate(trace.audits):
        assert record.layer_tokens == layer_tokens
        assert record.kept_indices == (tuple(survivors[row]),)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastv", {"layer": 1}),
        ("dart", {"layer": 2}),
        ("pyramiddrop", {"stages": (1, 3), "positions": "original"}),
    ],
)
def test_keeping_all_inside_changes_no_bit(qwen_model, qwen_processor, name, options, batch):
    inputs = encode(qwen_processor, [[size] for size in SIXTEEN[-batch:]])
    plain = qwen_model.generate(**inputs, **STEPS)
    with inject(qwen_model, build(name, **options), "full"):
        kept = qwen_model.generate(**inputs, **STEPS)
    assert torch.equal(kept.sequences, plain.sequences)
    assert torch.equal(logits(kept), logits(plain))


@pytest.mark.parametrize("name", ["fastv", "sparsevlm"])
def test_images_of_a_prompt_are_ranked_together(qwen_model, qwen_eager, qwen_processor, name):
    options = {"fastv": {"layer": 1}, "sparsevlm": {"stages": (1, 3), "kept": (20, 8)}}[name]
    pruner, inputs = build(name, **options), encode(qwen_processor, [[SIZES[1], SIZES[2]]])
    with inject(qwen_model, pruner, "50%") as trace:
        pruned = qwen_model.generate(**inputs, **STEPS)
    new = pruned.sequences[:, inputs["input_ids"].shape[1] :]
    want, ((*survivors,),) = layered(qwen_eager, prompts(qwen_eager, inputs), pruner, 28, new)
    assert (logits(pruned) - want).abs().max() < 1e-4
    (record,) = trace.audits
    assert record.visual_tokens == (24, 32)
    assert [*record.kept_indices[0], *(24 + index for index in record.kept_indices[1])] == survivors


def test_score_rows_equal_those_of_an_eager_model(qwen_model, qwen_eager, qwen_processor):
    inputs = encode(qwen_processor, [[size] for size in SIXTEEN])
    with torch.no_grad():
        output = qwen_eager(**inputs, output_attentions=True, use_cache=True)
    rows, keys = (
        Spy(build("fastv", layer=2)),
        Spy(build("dart", layer=2, image_pivots=1, text_pivots=1)),
    )
    for spy in (rows, keys):
        with inject(qwen_model, spy, 9), torch.no_grad():
            qwen_model(**inputs)
    attention, cached = rows.seen[0][0].attention, keys.seen[0][0].keys
    assert attention.shape[1] == 4
    assert cached.shape[1] == 2  # four heads of queries share two of keys
    for row, real in enumerate(inputs["attention_mask"].bool()):
        count = int(real.sum())
        assert (
            attention[row, :, 0, :count] - output.attentions[1][row, :, -1][:, real]
        ).abs().max() < 1e-5
        assert (
            cached[row, :, :count] - output.past_key_values.layers[1].keys[row][:, real]
        ).abs().max() < 1e-5


def test_a_batch_of_different_sizes_is_refused_inside(qwen_model, qwen_processor):
    inputs = encode(qwen_processor, [[SIZES[0]], [SIZES[1]]])
    with (
        inject(qwen_model, build("fastv", layer=1), "50%"),
        pytest.raises(ValueError, match="use batch size 1"),
    ):
        qwen_model.generate(**inputs, max_new_tokens=1)

"""Published FLOPs, and the conventions of `secateur.efficiency.flops` that give them."""

import contextlib
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import pandas as pd
from scipy.optimize import brentq
from transformers import AutoConfig, PreTrainedConfig

from secateur.efficiency.flops import Crops, conventions
from secateur.geometry import config_of
from secateur.paths import SHAPES_MODEL
from secateur.pruners import REGISTRY, InLLMPruner, PrunerError, build

# crops of one image; an image of Qwen2-VL and Qwen2.5-VL has 1008 x 1008 pixels, as in PromPrune
CROPS: dict[str, Crops] = {
    "llava_1_5_7b": [(24, 24)],
    "llava_1_5_13b": [(24, 24)],
    "llava_next_7b": [(24, 24)] * 5,
    "llava_next_13b": [(24, 24)] * 5,
    "qwen2_vl_7b": [(36, 36)],
    "qwen2_5_vl_7b": [(36, 36)],
    "qwen2_5_vl_3b": [(36, 36)],
    "shapes_llava": [(12, 12)],
}
LONGEST = 400  # most text tokens that a paper's prompt may have had
Span = tuple[float, float]  # the fewest and the most text tokens


def model_config(model: str) -> PreTrainedConfig:
    """The configuration of a model of `CROPS`."""
    return AutoConfig.from_pretrained(SHAPES_MODEL) if model == "shapes_llava" else config_of(model)


def visual_tokens(model: str) -> int:
    """Visual tokens of one unpruned image."""
    return sum(rows * columns for rows, columns in CROPS[model])


def layer_tokens(method: str, model: str, keep: int) -> list[int]:
    """Visual tokens that each layer of the LLM processes.

    A method that this project does not have is taken to act before the LLM.

    Raises:
        PrunerError: no schedule of the method has this budget as its mean.
    """
    layers, tokens = model_config(model).get_text_config().num_hidden_layers, visual_tokens(model)
    if not issubclass(REGISTRY.get(method, object), InLLMPruner):
        return [keep] * layers
    return build(method).layer_tokens(tokens, layers, keep)


def explain(reported: pd.DataFrame) -> pd.DataFrame:
    """Find the conventions that explain published FLOPs and MACs.

    A convention explains a table if it gives the printed numbers, as rounded, for the most budgets
    of the table, with one number of text tokens. The lengths of a paper's prompts are not known.
    So a convention with text counts only if one number of text tokens (a mean, which need not be
    whole) fits rows of several budgets: a single row would fit any convention.

    Args:
        reported: rows of results/reported/efficiency.csv.

    Returns:
        The rows of FLOPs and MACs with a column `explained by`, empty if no convention explains it.
    """
    frame = reported[reported["quantity"].isin(["flops", "macs"]) & (reported["unit"] == "T")]
    tables: dict[tuple[str, ...], list[dict[Hashable, Any]]] = defaultdict(list)
    for row in frame.to_dict("records"):
        tables[row["paper"], row["table"], row["model"], row["quantity"]].append(
            {**row, "explained by": ""}
        )
    for (*_, model, quantity), rows in tables.items():
        if model in CROPS:
            _explain(model, 2 if quantity == "macs" else 1, rows)
    columns = [
        "paper",
        "table",
        "model",
        "method",
        "budget_tokens",
        "quantity",
        "value",
        "explained by",
    ]
    return pd.DataFrame([row for rows in tables.values() for row in rows], columns=columns)


def _explain(model: str, factor: int, rows: list[dict[Hashable, Any]]) -> None:
    """Fill in `explained by` for one table; its numbers times `factor` are in 10^12 FLOPs."""
    config, plans = model_config(model), {}
    for number, row in enumerate(rows):
        if pd.notna(row["budget_tokens"]):
            with contextlib.suppress(PrunerError):  # no such schedule, nothing to compare
                plans[number] = layer_tokens(row["method"], model, int(row["budget_tokens"]))
    found: dict[str, list[int]] = {}
    for convention in conventions(
        config, [0] * config.get_text_config().num_hidden_layers, 0, CROPS[model]
    ):
        spans = {}
        for number, plan in plans.items():
            printed = rows[number]["value"]
            half = 0.5 * 10.0 ** -len(f"{printed:g}".partition(".")[2])
            low, high = ((printed + side) * factor * 1e12 for side in (-half, half))
            if (span := _text_span(config, convention, plan, CROPS[model], low, high)) is not None:
                spans[number] = span
        members = _rows_of_one_text(spans, plans)
        if "visual" in convention:
            found[convention] = members
        elif _budget_count(members, plans) > 1:
            low, high = (
                max(spans[number][0] for number in members),
                min(spans[number][1] for number in members),
            )
            text = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
            found[f"{convention} with {text} text tokens"] = members
    most = max((_budget_count(members, plans) for members in found.values()), default=0)
    for words, members in found.items():
        if _budget_count(members, plans) == most:
            for number in members:
                rows[number]["explained by"] += "; " * bool(rows[number]["explained by"]) + words


def _text_span(
    config: PreTrainedConfig,
    convention: str,
    plan: list[int],
    crops: Crops,
    low: float,
    high: float,
) -> Span | None:
    """The numbers of text tokens with which a convention gives `low` to `high` FLOPs, if any."""

    def excess(text: float, target: float) -> float:
        return conventions(config, plan, text, crops)[convention] - target

    def at(target: float) -> float:
        if excess(0, target) >= 0:
            return 0
        return (
            LONGEST if excess(LONGEST, target) <= 0 else brentq(excess, 0, LONGEST, args=(target,))
        )

    if excess(0, high) > 0 or excess(LONGEST, low) < 0:
        return None
    return at(low), at(high)


def _rows_of_one_text(spans: dict[int, Span], plans: dict[int, list[int]]) -> list[int]:
    """The rows that one number of text tokens fits: most budgets first, then most rows."""
    candidates = [
        [row for row, (low, high) in spans.items() if low <= start <= high]
        for start, _ in spans.values()
    ]
    return max(candidates, key=lambda rows: (_budget_count(rows, plans), len(rows)), default=[])


def _budget_count(rows: list[int], plans: dict[int, list[int]]) -> int:
    """Number of different budgets among the rows."""
    return len({tuple(plans[row]) for row in rows})

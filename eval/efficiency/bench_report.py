"""Statistics, tables beside published numbers, and figures from raw samples of the benchmark."""

import os
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from secateur.efficiency.latency import PHASES
from secateur.reporting.reported import load_efficiency

SETTING = ["model", "kind", "method", "pruner", "budget"]
# columns that must be equal in samples that are compared
SAME = [
    "geometry",
    "weights",
    "device",
    "dtype",
    "attn_implementation",
    "new_tokens",
    "seed",
    "prompts",
    "torch",
    "transformers",
]
TIMES = [*PHASES, "first_token", "decode"]
RESAMPLES, LEVEL = 2000, 0.95
COLOURS = {
    "vision": "#4c72b0",
    "captures": "#dd8452",
    "selection": "#c44e52",
    "prefill": "#55a868",
    "rest": "#bbbbbb",
}


def summarise(samples: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: facts, median, quartiles and p95 of every time, and comparisons.

    `speed_up`: median first token of the unpruned model over that of the setting.
    `of_ceiling`: the same for the ceiling over the setting. Both have intervals by resampling of
    rounds; all settings have the same rounds.
    `ceiling_speed_up`: the same for the unpruned model over the ceiling.
    `prefill_to_ceiling`: median prefill of the setting over that of the ceiling.
    `pruner_share`: captures and selection, in percent of the unpruned model's prefill.

    Raises:
        ValueError: samples of a model differ in kernel, dtype, device or the like, or settings have
            other rounds.
    """
    tables = []
    for model, rows in samples.groupby("model", sort=False):
        for column in SAME:
            if len(values := rows[column].unique()) > 1:
                raise ValueError(
                    f"{model}: samples of {column} {' and '.join(map(str, values))} cannot be "
                    f"compared; all must have one {column}"
                )
        tables.append(_summarise(str(model), rows))
    return pd.concat(tables, ignore_index=True)


def _summarise(model: str, rows: pd.DataFrame) -> pd.DataFrame:
    groups = {key: group.sort_values("round") for key, group in rows.groupby(SETTING)}
    rounds = rows["round"].nunique()
    for key, group in groups.items():
        if len(group) != rounds or group["round"].nunique() != rounds:
            raise ValueError(
                f"{model}: {key[2]} {key[4]} has {len(group)} samples of {rounds} rounds; every "
                "round measures all once"
            )
    kinds = ["unpruned", "ceiling", "pruned"]
    unpruned = next((group for key, group in groups.items() if key[1] == "unpruned"), None)
    ceilings = {key[4]: group for key, group in groups.items() if key[1] == "ceiling"}
    if unpruned is None or not {key[4] for key in groups if key[1] == "pruned"} <= ceilings.keys():
        raise ValueError(
            f"{model}: no samples of the unpruned model, or of the ceiling of a budget: nothing to "
            "compare with"
        )
    found: list[dict[str, Any]] = []
    for key, group in groups.items():
        first = group.iloc[0]
        facts = {
            name: first[name]
            for name in (*SETTING, *SAME, "tokens_in", "tokens", "text_tokens", "masked", "asked")
        }
        line: dict[str, Any] = facts | {"samples": rounds}
        for name in TIMES:
            low, middle, high, late = np.quantile(group[name], [0.25, 0.5, 0.75, 0.95])
            line |= {name: middle, f"{name}_q1": low, f"{name}_q3": high, f"{name}_p95": late}
        ceiling = unpruned if key[1] == "unpruned" else ceilings[key[4]]
        for name, other in (("speed_up", unpruned), ("of_ceiling", ceiling)):
            line[name], line[f"{name}_low"], line[f"{name}_high"] = ratio(
                other["first_token"], group["first_token"]
            )
        line["ceiling_speed_up"] = (
            unpruned["first_token"].median() / ceiling["first_token"].median()
        )
        line["prefill_to_ceiling"] = line["prefill"] / ceiling["prefill"].median()
        line["pruner_share"] = (
            100 * (line["captures"] + line["selection"]) / unpruned["prefill"].median()
        )
        line["macs_visual"], line["flops_first_token"] = (
            first["macs_visual"] / 1e12,
            first["flops_first_token"] / 1e12,
        )
        line["kv_mb"] = sum(first["kv_bytes"]) / 2**20
        line["peak_gb"], line["peak_delta_gb"] = (
            _gb(first["peak_bytes"]),
            _gb(first["peak_delta_bytes"]),
        )
        found.append(line)
    found.sort(key=lambda row: (-row["budget"], kinds.index(row["kind"]), row["method"]))
    return pd.DataFrame(found)


def ratio(above: pd.Series, below: pd.Series) -> tuple[float, float, float]:
    """Ratio of medians with its interval: value, low, high; both are in the order of rounds."""

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    x, y = above.to_numpy(), below.to_numpy()
    options: dict[str, Any] = {
        "paired": True,
        "vectorized": True,
        "method": "percentile",
        "n_resamples": RESAMPLES,
    }
    interval = bootstrap(
        (x, y), statistic, confidence_level=LEVEL, rng=np.random.default_rng(0), **options
    ).confidence_interval
    return float(np.median(x) / np.median(y)), float(interval.low), float(interval.high)


def _gb(size: Any) -> float:
    return float("nan") if pd.isna(size) else size / 1e9


def published(summary: pd.DataFrame) -> pd.DataFrame:
    """Published times and sizes, with their hardware, beside ours of the same method and tokens.

    Ours are given at true geometry only, and not where the published budget counts the layers after
    a cut.
    """
    printed = load_efficiency()
    quantities = [
        "vision",
        "pruner",
        "prefill",
        "first_token",
        "decode",
        "kv_cache",
        "gpu_memory",
        "speed_up",
    ]
    printed = printed[
        printed["quantity"].isin(quantities) & printed["model"].isin(summary["model"])
    ]
    ours = {}
    for row in summary[(summary["geometry"] == "true") & (summary["kind"] != "ceiling")].to_dict(
        "records"
    ):
        ours[row["model"], row["pruner"], row["budget"]] = {
            ("pruner", "ms"): row["captures"] + row["selection"],
            ("first_token", "s"): row["first_token"] / 1e3,
            ("decode", "ms/token"): row["decode"],
            ("kv_cache", "MB"): row["kv_mb"],
            ("gpu_memory", "GB"): row["peak_gb"],
            ("speed_up", "x"): row["speed_up"],
            **{(name, "ms"): row[name] for name in ("vision", "prefill", "first_token")},
        }
    images = printed["budget_scope"] == "image"
    keys = printed[["model", "method", "budget_tokens", "quantity", "unit"]].itertuples(index=False)
    own = [
        ours.get(key[:3], {}).get(key[3:], float("nan")) if image else float("nan")
        for key, image in zip(keys, images, strict=True)
    ]
    names = ["model", "method", "budget", "quantity", "unit", "value", "hardware", "paper", "table"]
    table = printed[names].rename(columns={"value": "printed"}).assign(ours=own)
    return table[[*names[:5], "printed", "ours", *names[6:]]].sort_values(
        ["model", "quantity", "unit"], kind="stable"
    )


def markdown(summary: pd.DataFrame, samples: pd.DataFrame) -> str:
    """One table per model, the settings that were left out and why, and the published numbers."""
    first = samples.iloc[0]
    lines = ["# Latency and memory", ""]
    lines += [f"{_where(first)}; batch 1, random weights."]
    lines += [
        f"torch {first['torch']}, transformers {first['transformers']}, commit {first['commit']}, "
        f"{first['finished']}."
    ]
    lines += [
        f"{first['prompts']}; {first['warm_up']} rounds of warm-up. Generated by "
        "`scripts/bench.py`.",
        "",
        LEGEND,
        "",
    ]
    if first["geometry"] != "true":
        lines += [
            "**Reduced geometry: these times show that the benchmark runs, and say nothing about "
            "the full models.**",
            "",
        ]
    for model, rows in summary.groupby("model", sort=False):
        asked, done = rows["asked"].iloc[0], rows["samples"].iloc[0]
        short = (
            ""
            if done >= asked
            else f" **Only {done} of the {asked} rounds asked for: the time limit was reached.**"
        )
        state = samples.loc[samples["model"] == model, ["state_before", "state_after"]].iloc[0]
        lines += [
            f"## {model}",
            "",
            f"{done} rounds, {rows['text_tokens'].iloc[0]} text tokens.{short}",
        ]
        lines += [
            f"The device before: {state['state_before']}; after: {state['state_after']}.",
            "",
        ]
        if rows["masked"].nunique() > 1:
            names = ", ".join(rows.loc[rows["masked"], "method"].unique())
            lines += [
                f"**Attention got a mask, which may select another kernel, for {names} only.**",
                "",
            ]
        lines += [
            _shown(rows).to_markdown(
                index=False, disable_numparse=True, colalign=("left", *["right"] * 16)
            ),
            "",
        ]
    if left_out := samples.attrs.get("left_out"):
        lines += ["Left out:", "", *(f"- {name}: {why}" for name, why in left_out.items()), ""]
    table = published(summary)
    table[["printed", "ours"]] = table[["printed", "ours"]].map(
        lambda value: "–" if pd.isna(value) else f"{value:.4g}"
    )
    lines += ["## What papers print", "", PAPERS, ""]
    lines += [table.fillna("not stated").to_markdown(index=False, disable_numparse=True), ""]
    return "\n".join(lines)


LEGEND = (
    "Medians in ms; the first token also with quartiles and p95. `pruner`: captures, selection, "
    "pruned prompt and audit, for methods inside the LLM also their cuts, which `prefill` leaves "
    "out; `pruner %` is its share of the unpruned prefill. `ceiling`: the unpruned model that "
    "receives that many tokens. Speed-ups are of the first token, with 95 % intervals; "
    "`prefill / ceiling` compares the LLM's prefill. MACs: of the visual tokens in the LLM, as "
    "papers count; FLOPs: everything up to the first token; both in 10^12."
)

PAPERS = (
    "These are on the papers' hardware and by the papers' own definitions, which few of them "
    "state: caches hold the visual tokens alone, some prefills include the tower. `ours`: at true "
    "geometry only, caches with the text."
)


def _where(row: pd.Series) -> str:
    parts = row["device"], row["dtype"], row["attn_implementation"], f"geometry: {row['geometry']}"
    return ", ".join(parts)


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    def number(name: str, digits: int) -> pd.Series:
        return rows[name].map(lambda value: "–" if pd.isna(value) else f"{value:.{digits}f}")

    interval = [
        f"{a:.2f} ({b:.2f}–{c:.2f})"
        for a, b, c in rows[["speed_up", "speed_up_low", "speed_up_high"]].to_numpy()
    ]
    quartiles = rows[
        ["first_token", "first_token_q1", "first_token_q3", "first_token_p95"]
    ].to_numpy()
    return pd.DataFrame(
        {
            "method": rows["method"],
            "budget": rows["budget"].astype(str),
            "tokens in": rows["tokens_in"].astype(str),
            "mean": number("tokens", 1),
            "MACs": rows["macs_visual"].map("{:.3g}".format),
            "FLOPs": rows["flops_first_token"].map("{:.3g}".format),
            "vision": number("vision", 2),
            "pruner": (rows["captures"] + rows["selection"]).map("{:.2f}".format),
            "pruner %": number("pruner_share", 1),
            "prefill": number("prefill", 2),
            "first token": [f"{a:.2f} ({b:.2f}–{c:.2f}; {d:.2f})" for a, b, c, d in quartiles],
            "decode": number("decode", 2),
            "speed-up": interval,
            "ceiling": number("ceiling_speed_up", 2),
            "prefill / ceiling": number("prefill_to_ceiling", 2),
            "KV MB": number("kv_mb", 1),
            "peak GB (+)": number("peak_gb", 2).str.cat(number("peak_delta_gb", 2), " (+") + ")",
        }
    )


def figure(summary: pd.DataFrame) -> Figure:
    """One model: the phases of each setting, and latency against tokens with the ceiling."""
    drawn, (left, right) = plt.subplots(
        1, 2, figsize=(16, 1.5 + 0.24 * len(summary)), layout="constrained"
    )
    names = [
        method if kind == "unpruned" else f"{method} {budget}"
        for kind, method, budget in summary[["kind", "method", "budget"]].to_numpy()
    ]
    start = np.zeros(len(summary))
    for phase in PHASES:
        left.barh(names, summary[phase], left=start, label=phase, color=COLOURS[phase])
        start += summary[phase].to_numpy()
    left.invert_yaxis()
    left.set(xlabel="ms to the first token, medians of the phases")
    left.tick_params(axis="y", labelsize=7)
    left.legend(fontsize=8)
    line = summary[summary["kind"] != "pruned"].sort_values("tokens")
    step = 0.003 * line["tokens"].max()  # bars at the same number of tokens stand side by side
    right.plot(
        line["tokens"], line["first_token"], "k.--", label="ceiling: unpruned model with as many"
    )
    for number, (name, rows) in enumerate(
        summary[summary["kind"] == "pruned"].groupby("method", sort=False)
    ):
        spread = (
            rows["first_token"] - rows["first_token_q1"],
            rows["first_token_q3"] - rows["first_token"],
        )
        style = "osD^v<>pPX*"[number % 11]
        right.errorbar(
            rows["tokens"] + (number - 5) * step,
            rows["first_token"],
            yerr=spread,
            fmt=style,
            markersize=5,
            linewidth=1,
            label=name,
        )
    right.set(
        xlabel="visual tokens, mean over the layers",
        ylabel="ms to the first token, median and quartiles",
        ylim=(0, None),
    )
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    first = summary.iloc[0]
    drawn.suptitle(f"{first['model']}, {_where(first)}", fontsize=9)
    return drawn


def write(samples: pd.DataFrame, stem: Path, figures: Path) -> None:
    """Write raw samples (.parquet), statistics (.csv), tables (.md) and one figure per model.

    Args:
        stem: path of the first three files without suffix; each is written whole and then renamed.
        figures: folder of the figures.
    """
    summary = summarise(samples)
    stem.parent.mkdir(parents=True, exist_ok=True)
    figures.mkdir(parents=True, exist_ok=True)
    for suffix, store in (
        (".parquet", lambda path: samples.to_parquet(path, index=False)),
        (".csv", lambda path: summary.to_csv(path, index=False, float_format="%.6g")),
        (".md", lambda path: path.write_text(markdown(summary, samples), encoding="utf-8")),
    ):
        part = stem.with_suffix(".part")
        store(part)
        os.replace(part, stem.with_suffix(suffix))
    for model, rows in summary.groupby("model", sort=False):
        drawn = figure(rows)
        drawn.savefig(figures / f"{stem.name.replace('-', '_')}_{model}.png", dpi=90)
        plt.close(drawn)
    print(
        f"written: {stem}.parquet, .csv, .md, and {summary['model'].nunique()} figures in {figures}"
    )

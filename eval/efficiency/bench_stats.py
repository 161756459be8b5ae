"""Statistics of the benchmark's raw samples, and published numbers beside them."""

from typing import Any

import numpy as np
import pandas as pd
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

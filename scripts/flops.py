"""FLOPs of every supported model by phase, budget and convention.

python scripts/flops.py [--text-tokens 62]     the same as `make flops`

It prints the tables, also of the convention that explains each published number, and writes
results/tables/flops.{md,csv} and flops_published.csv.
"""

import argparse
from pathlib import Path

import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

from secateur.budget import Budget
from secateur.efficiency.flops import conventions, count
from secateur.efficiency.flops_published import (
    CROPS,
    explain,
    layer_tokens,
    model_config,
    visual_tokens,
)
from secateur.paths import CONFIGS, ROOT
from secateur.pruners import REGISTRY, PrunerError, build
from secateur.reporting.reported import load_efficiency

INSIDE = ("fastv", "pyramiddrop")  # schedules inside the LLM, beside one cut before it
PHASES = ["tower", "projector", "prefill", "head", "step", "first_token"]


def budgets(model: str) -> list[Budget]:
    """Those of the model's papers, from configs/model."""
    return [
        Budget.parse(text)
        for text in yaml.safe_load((CONFIGS / f"model/{model}.yaml").read_text())["budgets"]
    ]


def costs(text_tokens: int) -> pd.DataFrame:
    """One row per model, budget and place of the cut, in 10^12 FLOPs, without the pruner's own."""
    rows = []
    for model, crops in CROPS.items():
        config, visual = model_config(model), visual_tokens(model)
        for budget in [Budget(), *budgets(model)]:
            keep = budget.resolve(visual)
            for method in ("none",) if keep == visual else ("before the LLM", *INSIDE):
                try:
                    tokens = layer_tokens(method, model, keep)
                except PrunerError:
                    continue  # too small a budget for a schedule that begins with all tokens
                flops = count(config, layer_tokens=tokens, text_tokens=text_tokens, crops=crops)
                phases = flops.record() | {"step": flops.step}
                named = {name: phases[name] for name in PHASES} | conventions(
                    config, tokens, text_tokens, crops
                )
                rows.append(
                    {
                        "model": model,
                        "method": method,
                        "budget": str(budget),
                        "tokens": sum(tokens) / len(tokens),
                    }
                    | {name: (value or 0) / 1e12 for name, value in named.items()}
                )
    return pd.DataFrame(rows)


def pruner_costs(text_tokens: int) -> pd.DataFrame:
    """10^9 FLOPs of the pruners themselves at each model's middle budget; None: not counted."""
    rows = []
    for method in sorted(REGISTRY):
        row: dict[str, object] = {"method": method}
        for model, crops in CROPS.items():
            keep = budgets(model)[1].resolve(visual_tokens(model))
            try:
                flops = count(
                    model_config(model),
                    layer_tokens=layer_tokens(method, model, keep),
                    text_tokens=text_tokens,
                    crops=crops,
                    pruner=build(method),
                ).pruner
            except PrunerError:  # no schedule for this budget, or not for this model
                continue
            row[f"{model} {keep}"] = None if flops is None else flops / 1e9
        rows.append(row)
    return pd.DataFrame(rows)


def show(console: Console, title: str, table: pd.DataFrame) -> str:
    """Print a table; return it as Markdown."""
    text = table.map(
        lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    ).where(table.notna(), "-")
    shown = Table(title=title, title_justify="left", box=None, header_style="bold")
    for name, column in table.items():
        justify = "right" if pd.api.types.is_numeric_dtype(column) else "left"
        shown.add_column(str(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for line in text.itertuples(index=False):
        shown.add_row(*line)
    console.print(shown, "")
    return f"{title}\n\n{text.to_markdown(index=False, disable_numparse=True)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=62,
        help="positions of the prompt besides the image (default: 62)",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results/tables", help="folder (default: results/tables)"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    table, published = costs(options.text_tokens), explain(load_efficiency())
    found = published["explained by"] != ""
    prompt = f"one image and {options.text_tokens} text tokens"
    console = Console(width=None if Console().is_terminal else 180)
    parts = [
        show(
            console,
            f"FLOPs by phase, 10^12, {prompt}; step: one decoding step.",
            table[["model", "method", "budget", "tokens", *PHASES]],
        ),
        show(console, f"What papers print as FLOPs, 10^12, {prompt}.", table.drop(columns=PHASES)),
        show(
            console,
            "FLOPs of the pruners themselves, 10^9, each model at the tokens named: "
            "the products that dominate; - not counted.",
            pruner_costs(options.text_tokens),
        ),
        show(console, "Published numbers that a convention explains, 10^12.", published[found]),
        show(
            console,
            "Published numbers that none explains, 10^12.",
            published[~found].drop(columns="explained by"),
        ),
    ]
    (options.out / "flops.md").write_text("\n".join(parts), encoding="utf-8")
    table.to_csv(options.out / "flops.csv", index=False, float_format="%.6g")
    published.to_csv(options.out / "flops_published.csv", index=False)
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()

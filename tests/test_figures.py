"""Figures: what is drawn is what was computed, and what is missing is marked."""

import numpy as np
import pandas as pd
import pytest
from cells import altered, changed, identity
from PIL import Image
from stored import FULL, SPPRUNER, grid, store

from secateur.reporting import figures, gallery
from secateur.reporting.comparison import compare, load
from secateur.reporting.costs import first_token_flops, prefill_times
from secateur.settings import ModelIdentity


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cells = grid(random=0.4, scope=0.75, sppruner=0.7, promprune=0.7)
    return store(tmp_path_factory.mktemp("results"), cells)


@pytest.fixture(scope="module")
def compared(results):
    cells = load(results)
    return cells, compare(cells, 300)


def titles(figure):
    return {panel.get_title(): panel for panel in figure.axes}


@pytest.mark.parametrize(
    ("cost", "value", "front"),
    [
        ([1, 2, 3], [1, 2, 3], [True, True, True]),
        ([1, 2, 3], [3, 2, 1], [True, False, False]),
        ([1, 1, 2], [1, 2, 2], [False, True, False]),
        ([1, 1], [2, 2], [True, True]),  # equal points beat neither
        ([5], [0], [True]),
    ],
)
def test_the_pareto_front_is_what_no_other_point_beats(cost, value, front):
    assert figures.pareto(cost, value).tolist() == front


def test_accuracy_against_cost_draws_values_intervals_and_the_front(compared):
    _, table = compared
    cost = table.set_index(["task", "method", "budget"])["tokens"]
    figure = figures.accuracy_against(table, cost, "tokens", "suite shapes: a demonstration")
    assert "suite shapes: a demonstration" in figure.get_suptitle()
    panel = titles(figure)["POPE F1"]
    own = table[table["task"] == "pope"].set_index("method")
    drawn = {
        (x, round(y, 6))
        for line in panel.lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    for method, row in own.iterrows():
        assert (row["tokens"], round(row["value"], 6)) in drawn, method
        ends = [
            segment[:, 1]
            for bars in panel.containers
            for segment in bars.lines[2][0].get_segments()
        ]
        assert any(np.allclose(end, [row["low"], row["high"]]) for end in ends), method
    front = panel.lines[0]
    assert front.get_xdata().tolist() == [16, FULL]
    assert front.get_ydata() == pytest.approx([own.loc["scope", "value"], own.loc["none", "value"]])
    assert any("(reconstruction)" in text.get_text() for text in figure.legends[0].get_texts())


def test_rows_without_a_cost_are_not_drawn_and_without_any_refused(compared):
    _, table = compared
    cost = table.set_index(["task", "method", "budget"])["tokens"]
    panel = titles(
        figures.accuracy_against(table, cost.drop("scope", level="method"), "tokens", "x")
    )["POPE F1"]
    scope = table[(table["task"] == "pope") & (table["method"] == "scope")]["value"].iloc[0]
    assert not any(np.isclose(line.get_ydata(), scope).any() for line in panel.lines)
    with pytest.raises(ValueError, match="no row has a cost"):
        figures.accuracy_against(table, cost[:0], "tokens", "x")


def test_bars_are_the_values_and_the_tied_best_are_framed(compared):
    _, table = compared
    panel = titles(figures.bars(table, "x"))["GQA"]
    own = table[(table["task"] == "gqa") & (table["method"] != "none")].set_index("method")
    look = figures.looks(table)
    assert [
        bar.get_height() for bar in panel.patches if bar.get_height() < 100 and bar.get_width() < 1
    ] == pytest.approx([own.loc[method, "value"] for method in own.index])
    by_color = {bar.get_facecolor()[:3]: bar for bar in panel.patches}
    framed = {method for method in own.index if by_color[look[method].color].get_linewidth() == 1.2}
    assert framed == set(own.index[own["tied_best"]]) < set(own.index)


def test_what_has_no_interval_is_hatched_and_hollow():
    table = compare(grid(tasks=("gqa",), documents=10, scope=0.5), 100)  # one image
    assert table["mark"].str.contains("single image").all()
    bars = figures.bars(table, "x")
    assert [bar.get_hatch() for bar in bars.axes[0].patches] == ["///"]
    assert "hatched: no interval" in [text.get_text() for text in bars.legends[0].get_texts()]
    points = figures.accuracy_against(
        table, table.set_index(["task", "method", "budget"])["tokens"], "tokens", "x"
    )
    assert "hollow: no interval" in [text.get_text() for text in points.legends[0].get_texts()]
    assert not any(bars.has_yerr for bars in points.axes[0].containers)


def test_agreement_is_the_share_of_equal_answers():
    cells = grid(tasks=("gqa",), documents=200, scope=0.75, random=0.4)
    shares = figures.agreement(cells)["16"]
    answers = {own.method: own.rows.set_index("doc_id")["answer"] for own in cells}
    assert list(shares) == ["none", "random", "scope"]
    assert shares.loc["random", "scope"] == pytest.approx(
        (answers["random"] == answers["scope"]).mean()
    )
    assert np.diag(shares).tolist() == [1, 1, 1]
    figure = figures.agreement_matrices({"16": shares}, "suite shapes")
    assert f"{100 * shares.loc['random', 'scope']:.0f}" in [
        text.get_text() for text in figure.axes[0].texts
    ]


def test_agreement_over_other_tasks_or_documents_is_missing():
    cells = grid(documents=200, scope=0.75, random=0.4)
    without = [own for own in cells if (own.method, own.task) != ("random", "pope")]
    shares = figures.agreement(without)["16"]
    assert np.isnan(shares.loc["random", "scope"])
    assert shares.loc["none", "scope"] > 0.5
    shortened = [
        own._replace(rows=own.rows[:100]) if own.method == "scope" else own for own in cells
    ]
    assert np.isnan(figures.agreement(shortened)["16"].loc["none", "scope"])


def test_flops_are_the_records_own(results):
    cells = load(results)
    costs = first_token_flops(cells)
    assert costs.mean["pope", "scope", "16"] == costs.mean["average", "scope", "16"] == 1.016e9
    assert costs.mean["average", "none", "full"] == 1.144e9
    assert costs.uncounted == [SPPRUNER]
    partly = first_token_flops(
        [own for own in cells if (own.method, own.task) != ("scope", "gqa")]
    ).mean
    assert ("average", "scope", "16") not in partly
    (older,) = changed(cells[:1], {"flops": ...})
    with pytest.raises(ValueError, match=f"1 cells, such as {older.key}, have no FLOPs"):
        first_token_flops([older, *cells[1:]])


def test_prefill_is_the_benchs_median_for_the_same_method_and_tokens(results, tmp_path):
    sample = {
        "model": "shapes_llava",
        "geometry": "true",
        "device": "gpu",
        "dtype": "bfloat16",
        "attn_implementation": "sdpa",
    }
    settings = [
        ("unpruned", "unpruned", FULL, 9.0),
        ("pruned", "scope", 16, 3.0),
        ("pruned", "random", 32, 4.0),
    ]
    settings += [("ceiling", "ceiling", 16, 2.0)]
    timed = [
        sample | {"kind": kind, "method": method, "budget": budget, "prefill": time + spread}
        for kind, method, budget, time in settings
        for spread in (-1, 0, 5)
    ]
    timed += [row | {"geometry": "2 layers, widths / 8", "prefill": 0.1} for row in timed]
    (tmp_path / "bench").mkdir()
    pd.DataFrame(timed).to_parquet(tmp_path / "bench" / "bench-gpu.parquet")
    (axis, times), *others = prefill_times(load(results), tmp_path).items()
    assert axis == "prefill, ms (gpu, bfloat16, sdpa)"
    assert others == []
    assert times.xs("pope").to_dict() == {("none", "full"): 9, ("scope", "16"): 3}
    assert times.xs("average").to_dict() == {("none", "full"): 9, ("scope", "16"): 3}
    assert prefill_times(load(results), tmp_path / "elsewhere") == {}

    several = [
        one
        for own in load(results)
        for one in changed([own], {"images": 1.05, "average_tokens": own.tokens * 1.05})
    ]
    assert (
        prefill_times(several, tmp_path)[axis].to_dict() == times.to_dict()
    )  # the bench counts tokens per image
    blind = changed(load(results), {"images": 0.0, "average_tokens": 0.0})
    assert prefill_times(blind, tmp_path) == {}


def test_the_gallery_counts_where_exactly_one_is_right(compared, results):
    cells, table = compared
    pair = gallery.rivals(table)
    assert pair.budget == "16"
    assert pair.methods[0] == "scope"
    pair = gallery.rivals(table, ["random", "scope"])
    counts, shown = gallery.disagreements(cells, pair, results)
    right = {(own.task, own.method): own.rows["score"] == 1 for own in cells}
    for task in ("pope", "gqa"):
        scope, random = right[task, "scope"], right[task, "random"]
        assert counts[task] == {"scope": (scope & ~random).sum(), "random": (random & ~scope).sum()}
    assert len(shown) == sum(
        min(gallery.PER_SIDE, number) for own in counts.values() for number in own.values()
    )
    for item in shown:
        other = next(method for method in pair.methods if method != item.right)
        assert right[item.task, item.right][item.row["doc_id"]]
        assert not right[item.task, other][item.row["doc_id"]]
        assert item.answers[item.right] == item.row["target"] != item.answers[other]
        assert item.kept["scope"] == tuple(range(0, FULL, 9))


def test_rivals_must_be_two_of_the_table(compared):
    _, table = compared
    for names in (["scope", "nobody"], ["scope", "scope"], ["scope"]):
        with pytest.raises(ValueError, match="choose two of promprune, random, scope"):
            gallery.rivals(table, names)
    assert gallery.rivals(table[table["method"].isin(["none", "scope"])]) is None


def test_rivals_are_the_best_of_a_task_that_both_ran(compared):
    _, table = compared
    apart = ((table["method"] != "scope") | (table["task"] == "pope")) & (
        table["task"] != "average"
    )
    table = table[
        apart & table["method"].isin(["none", "scope", "random"])
    ]  # scope ran POPE only, random GQA too
    assert gallery.rivals(table) == gallery.Rivals("16", ("scope", "random"))
    disjoint = table[(table["method"] != "random") | (table["task"] == "gqa")]
    assert gallery.rivals(disjoint) is None
    with pytest.raises(ValueError, match="share no budget of a task"):
        gallery.rivals(disjoint, ["scope", "random"])


def model_identity(**values: object) -> ModelIdentity:
    own = identity("llava_1_5_7b", "none", "full", "gqa")
    return altered(own, {f"model.{name}": value for name, value in values.items()}).model


def test_the_image_is_cut_as_the_encoder_sees_it():
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (0, 0, 10, 40))
    row = pd.Series({"visual_tokens": FULL})
    seen, grid_of = gallery.as_seen(model_identity(geometry="processor"), [image], row)
    assert (seen.size, grid_of, seen.getpixel((0, 20))) == (
        (40, 40),
        (12, 12),
        (255, 0, 0),
    )  # the middle square
    seen, _ = gallery.as_seen(model_identity(geometry="pad"), [image], row)
    assert (seen.size, seen.getpixel((0, 0)), seen.getpixel((0, 30))) == (
        (60, 60),
        (128, 128, 128),
        (0, 0, 255),
    )
    seen, _ = gallery.as_seen(model_identity(family="qwen2_5_vl", image_side=336), [image], row)
    assert (seen.size, seen.getpixel((0, 30))) == ((60, 60), (0, 0, 255))
    for model, images in (
        (model_identity(family="llava_next"), [image]),
        (model_identity(family="qwen2_5_vl"), [image]),
        (model_identity(), [image] * 2),
    ):
        assert gallery.as_seen(model, images, row) is None
    assert gallery.as_seen(model_identity(), [image], pd.Series({"visual_tokens": 143})) is None


def test_images_come_from_the_tasks_own_documents(shapes, tmp_path):
    documents = gallery.Documents("shapes", ["gqa"], shapes)
    prompt = (
        "USER: <image>\nIs there a cross in the image?\n"
        "Answer the question using a single word or phrase. ASSISTANT:"
    )
    row = pd.Series({"doc_id": 3, "prompt": prompt})
    (image,) = documents.images("gqa", row)
    assert image.size == (96, 96)
    with pytest.raises(ValueError, match="asks another question"):
        documents.images("gqa", row.replace(3, 4))
    with pytest.raises(ValueError, match="no document 300"):
        documents.images("gqa", row.replace(3, 300))
    with pytest.raises(FileNotFoundError, match="gqa"):
        gallery.Documents("hub", ["gqa"], tmp_path)

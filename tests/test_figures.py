"""Figures: what is drawn is what was computed, and what is missing is marked."""

import itertools

import numpy as np
import pandas as pd
import pytest
from cells import changed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from stored import FULL, SPPRUNER, grid, store

from secateur.reporting import figures, gallery, images
from secateur.reporting.agreement import agreement, agreement_matrices
from secateur.reporting.charts import charts
from secateur.reporting.comparison import compare, load
from secateur.reporting.cost_figures import accuracy_against, one_by_one, pareto
from secateur.reporting.costs import first_token_flops, prefill_times
from secateur.reporting.score_figure import scores


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cells = grid(random=0.4, scope=0.75, sppruner=0.7, promprune=0.7)
    return store(tmp_path_factory.mktemp("results"), cells)


@pytest.fixture(scope="module")
def compared(results):
    cells = load(results)
    return cells, compare(cells, 300)


def titles(figure):
    return {panel.get_title(loc="left").replace("\n", " "): panel for panel in figure.axes}


def drawn(panel):
    """The points of every line that has a name."""
    return {
        line.get_gid(): list(zip(line.get_xdata(), np.round(line.get_ydata(), 6), strict=True))
        for line in panel.lines
        if line.get_gid()
    }


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
    assert pareto(cost, value).tolist() == front


def tokens_of(table):
    return table.set_index(["task", "method", "budget"])["tokens"]


def test_accuracy_against_cost_draws_values_labels_and_the_front(compared):
    _, table = compared
    figure = accuracy_against(table, tokens_of(table), "tokens", "suite shapes: a demonstration")
    assert "suite shapes: a demonstration" in figure.get_suptitle()
    assert next(iter(titles(figure))) == "average, % of unpruned"
    panel = titles(figure)["POPE F1"]
    own = table[table["task"] == "pope"].set_index("method")
    lines = drawn(panel)
    for method in set(own.index) - {"none"}:
        assert lines[method] == [(16, round(own.loc[method, "value"], 6))]
    best = [(x, round(own.loc[name, "value"], 6)) for x, name in ((FULL, "none"), (16, "scope"))]
    assert lines["front"] == best
    labels = {text.get_text() for text in panel.texts}
    assert labels == {"random", "scope", "promprune", "sppruner (reconstruction)"}
    assert panel.get_xscale() == "log"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["16", "144"]
    assert panel.get_xlim()[0] > panel.get_xlim()[1]  # cheaper to the right


def test_rows_without_a_cost_are_not_drawn_and_without_any_refused(compared):
    _, table = compared
    cost = tokens_of(table)
    panel = titles(accuracy_against(table, cost.drop("scope", level="method"), "tokens", "x"))
    assert "scope" not in drawn(panel["POPE F1"])
    with pytest.raises(ValueError, match="no row of a method has a cost"):
        accuracy_against(table, cost[:0], "tokens", "x")


def test_each_method_by_itself_has_its_interval(compared):
    _, table = compared
    figure = one_by_one(table, tokens_of(table), "tokens", "x")
    own = table[table["task"] == "average"].set_index("method")
    assert [*titles(figure)] == ["scope", "promprune", "sppruner (reconstruction)", "random"]
    (bars,) = titles(figure)["scope"].collections
    (segment,) = bars.get_segments()
    assert segment[:, 1] == pytest.approx(own.loc["scope", ["low", "high"]].tolist())


def many(table, count=12):
    """The table with more methods, each worse than the one before."""
    scope = table[table["method"] == "scope"]
    copies = [scope.assign(method=f"m{i:02}", value=scope["value"] - 1 - i) for i in range(count)]
    return pd.concat([table, *copies], ignore_index=True)


def test_at_most_eight_methods_have_a_colour_and_the_chosen_ones_come_first(compared):
    _, table = compared
    look = figures.looks(many(table))
    named = {label for label, own in look.items() if own.named}
    assert len(named) == 9  # with random, which is black
    assert {"scope", "random", "promprune", "m00"} <= named
    assert "m11" not in named
    assert len({own.color for label, own in look.items() if own.named}) == 9
    chosen = figures.looks(many(table), ["m11"])
    assert chosen["m11"].named
    assert chosen["m11"].color not in (figures.GREY, figures.BLACK)
    with pytest.raises(ValueError, match="no rows of nobody"):
        figures.looks(table, ["nobody"])
    with pytest.raises(ValueError, match="9 methods to highlight, but 8 colours"):
        figures.looks(many(table), [f"m{i:02}" for i in range(9)])


def test_labels_beside_lines_stand_apart_and_near_their_ends():
    places = figures.apart([1, 1, 1.05, 5], 1, 0, 10)
    assert np.diff(places).min() >= 1 - 1e-9
    assert places == pytest.approx([0.0166, 1.0166, 2.0166, 5], abs=1e-3)
    assert figures.apart([9.9, 10], 1, 0, 10) == [9, 10]
    assert figures.apart([0, 0.2], 1, 0, 10) == [0, 1]


def unseen(panel):
    """Labels of ticks outside the limits of a panel, which matplotlib keeps and does not draw."""
    for axis, limits in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
        for tick in axis.get_major_ticks():
            if not min(limits) <= tick.get_loc() <= max(limits):
                yield from (tick.label1, tick.label2)


@pytest.mark.parametrize("count", [0, 12])
def test_no_texts_of_a_figure_overlap(compared, count):
    _, table = compared
    table = many(table, count)
    for figure in (
        accuracy_against(table, tokens_of(table), "tokens", "A caption of many words " * 12),
        one_by_one(table, tokens_of(table), "tokens", "A caption of many words " * 12),
        scores(table, "A caption of many words " * 12),
    ):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        ticks = {id(text) for panel in figure.axes for text in unseen(panel)}
        texts = [text for text in texts if id(text) not in ticks]
        # of a label, without its line
        boxes = [Text.get_window_extent(text, renderer) for text in texts]
        for (one, box), (other, second) in itertools.combinations(
            zip(texts, boxes, strict=True), 2
        ):
            wide = min(box.x1, second.x1) - max(box.x0, second.x0)
            high = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert wide <= 1 or high <= 2, (one.get_text(), other.get_text())
        page = figure.bbox
        assert min(box.x0 for box in boxes) >= 0
        assert max(box.x1 for box in boxes) <= page.x1
        assert max(box.y1 for box in boxes) <= page.y1


def test_scores_are_the_values_and_the_tied_best_have_a_rim(compared):
    _, table = compared
    panel = titles(scores(table, "x"))["GQA"]
    own = table[(table["task"] == "gqa") & (table["method"] != "none")].set_index("method")
    dots = {line.get_gid(): line for line in panel.lines if str(line.get_gid()).startswith("16 ")}
    values = {name: dot.get_xdata()[0] for name, dot in dots.items()}
    assert values == pytest.approx({f"16 {name}": own.loc[name, "value"] for name in own.index})
    rims = {
        name for name in own.index if dots[f"16 {name}"].get_markeredgecolor() == figures.BLACK
    } - {"random"}
    assert rims == set(own.index[own["tied_best"]]) < set(own.index)


def test_what_was_not_run_is_said_and_what_has_no_interval_is_hollow(compared):
    _, table = compared
    gap = table[(table["task"] != "gqa") | (table["method"] != "scope")]
    panel = titles(scores(gap, "x"))["GQA"]
    assert [text.get_text() for text in panel.texts] == ["not run"]
    alone = compare(grid(tasks=("gqa",), documents=10, scope=0.5), 100)  # one image
    assert alone["mark"].str.contains("single image").all()
    figure = scores(alone, "x")
    (dot,) = [line for line in figure.axes[0].lines if line.get_gid() == "16 scope"]
    assert dot.get_markerfacecolor() == "none"
    assert "hollow: no interval" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_agreement_is_the_share_of_equal_answers():
    cells = grid(tasks=("gqa",), documents=200, scope=0.75, random=0.4)
    shares = agreement(cells)["16"]
    answers = {own.method: own.rows.set_index("doc_id")["answer"] for own in cells}
    assert list(shares) == ["none", "random", "scope"]
    assert shares.loc["random", "scope"] == pytest.approx(
        (answers["random"] == answers["scope"]).mean()
    )
    assert np.diag(shares).tolist() == [1, 1, 1]
    figure = agreement_matrices({"16": shares}, "suite shapes")
    assert f"{100 * shares.loc['random', 'scope']:.0f}" in [
        text.get_text() for text in figure.axes[0].texts
    ]


def test_agreement_over_other_tasks_or_documents_is_missing():
    cells = grid(documents=200, scope=0.75, random=0.4)
    without = [own for own in cells if (own.method, own.task) != ("random", "pope")]
    shares = agreement(without)["16"]
    assert np.isnan(shares.loc["random", "scope"])
    assert shares.loc["none", "scope"] > 0.5
    shortened = [
        own._replace(rows=own.rows[:100]) if own.method == "scope" else own for own in cells
    ]
    assert np.isnan(agreement(shortened)["16"].loc["none", "scope"])


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
    assert pair.budgets == ("16",)
    assert pair.methods[0] == "scope"
    pair = gallery.rivals(table, ["random", "scope"])
    counts, shown = gallery.disagreements(cells, pair, "16", results)
    right = {(own.task, own.method): own.rows["score"] == 1 for own in cells}
    for task in ("pope", "gqa"):
        scope, random = right[task, "scope"], right[task, "random"]
        assert counts[task] == {"scope": (scope & ~random).sum(), "random": (random & ~scope).sum()}
    assert len(shown) == sum(
        min(gallery.PER_SIDE, number) for own in counts.values() for number in own.values()
    )
    for item in shown:
        other = next(method for method in pair.methods if method != item.right)
        row = item.rows[item.right]
        assert right[item.task, item.right][row["doc_id"]]
        assert not right[item.task, other][row["doc_id"]]
        assert row["answer"] == row["target"] != item.rows[other]["answer"]
        assert list(item.rows["scope"]["kept_indices"][0]) == list(range(0, FULL, 9))


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
    assert gallery.rivals(table) == gallery.Rivals(("16",), ("scope", "random"))
    disjoint = table[(table["method"] != "random") | (table["task"] == "gqa")]
    assert gallery.rivals(disjoint) is None
    with pytest.raises(ValueError, match="share no budget of a task"):
        gallery.rivals(disjoint, ["scope", "random"])


def test_images_come_from_the_tasks_own_documents(shapes, tmp_path):
    documents = images.Documents("shapes", ["gqa"], shapes)
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
        images.Documents("hub", ["gqa"], tmp_path)


def test_prefill_is_drawn_and_what_was_not_timed_is_named(compared, tmp_path):
    cells, table = compared
    cells, table = [own for own in cells if own.task == "gqa"], table[table["task"] == "gqa"]
    timed = {"model": "shapes_llava", "geometry": "true", "device": "gpu", "dtype": "bfloat16"}
    timed |= {"attn_implementation": "sdpa", "budget": 16, "prefill": 3.0}
    for method, drawn in (("scope", True), ("dart", False)):
        (tmp_path / method / "bench").mkdir(parents=True)
        one = pd.DataFrame([timed | {"kind": "pruned", "method": method}])
        one.to_parquet(tmp_path / method / "bench" / "bench-gpu.parquet")
        found = {chart.name: chart for chart in charts(cells, table, tmp_path / method, "t", [])}
        assert ("accuracy_prefill_0" in found) == drawn
        if drawn:
            assert "random at 16" in found["accuracy_prefill_0"].caption.split("Not timed: ")[1]

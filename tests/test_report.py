"""The report: one page that needs nothing else, runs no script, and says what is missing."""

import base64
import hashlib
import io
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cells import CONFIGS, changed
from lxml import html as lxml_html
from matplotlib.figure import Figure
from PIL import Image
from stored import SPPRUNER, Pictures, grid, store

from secateur.reporting import images
from secateur.reporting.charts import Chart
from secateur.reporting.report import Report, published
from secateur.reporting.report_page import page, write
from secateur.reporting.report_parts import DEMONSTRATION

SCRIPT = CONFIGS.parent / "scripts" / "report.py"
CHARTS = [
    *("scores", "accuracy_tokens", "accuracy_tokens_single", "accuracy_flops", "agreement"),
]
ATTACK = "<script>alert(1)</script>"
TARGET = f"![x](http://x.y/z.png){ATTACK}"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


@pytest.fixture(autouse=True, scope="module")
def pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "Documents", Pictures)
        yield


@pytest.fixture(scope="module")
def nothing_run():
    """The published tables without cells, made once: reports of shapes cells have no others."""
    return published([], 200)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    if "written" not in request.fixturenames:  # that report makes its own
        nothing = request.getfixturevalue("nothing_run")
        monkeypatch.setattr("secateur.reporting.report.published", lambda cells, resamples: nothing)
        small = [Chart("scores", Figure(figsize=(1, 1)), "A small figure.")]
        monkeypatch.setattr("secateur.reporting.report.charts", lambda *arguments: small)


def test_no_published_table_takes_a_cell_of_the_shapes_suite(written, nothing_run):
    assert written[0].published == nothing_run


def reported(folder, cells, **options):
    return Report(store(folder, cells), 200, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a sweep whose targets and some answers are an attack."""
    folder = tmp_path_factory.mktemp("attack")
    shares = {"random": 0.4, "scope": 0.75, "sppruner": 0.5}
    cells = grid(("gqa", "scienceqa_img"), 500, 500, **shares)  # fifty images of gqa
    cells = [own._replace(rows=own.rows.replace({"target": "no"}, TARGET)) for own in cells]
    cells = [
        own._replace(rows=own.rows.assign(answer=ATTACK)) if own.name == "sppruner" else own
        for own in cells
    ]
    report = reported(folder, cells, rivals=["scope", SPPRUNER])
    return report, write(report, folder / "report")


def tree(text: str):
    """The page, parsed without tolerance for errors."""
    return lxml_html.document_fromstring(
        text, parser=lxml_html.HTMLParser(recover=False, huge_tree=True)
    )


def text_of(text: str) -> str:
    return " ".join(tree(text).body.text_content().split())


def test_text_of_data_and_models_is_text(written):
    _, (path, _) = written
    found = tree(path.read_text())
    (script,) = found.xpath("//script")
    assert ATTACK not in script.text
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    (policy,) = found.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy.split("script-src ")[1] == f"'sha256-{digest}'"
    assert not found.xpath("//iframe | //object | //embed | //link | //form | //base")
    assert not found.xpath("//@*[starts-with(name(), 'on')]")
    assert {ATTACK, TARGET} <= {answer.text_content() for answer in found.xpath("//dd")}
    assert any(f"every answer is {ATTACK!r}" in note.text_content() for note in found.xpath("//li"))
    links = {link.split("#")[0] for link in found.xpath("//a/@href | //use/@href")}
    assert links == {""}


def test_a_prompt_is_text(tmp_path):
    report = Report(
        store(tmp_path, grid(tasks=("gqa",), random=0.4, scope=0.75), prompt=ATTACK), 200
    )
    prompts = [prompt.text for prompt in tree(page(report)).xpath("//pre")]
    assert len(prompts) > 1
    assert set(prompts) == {ATTACK}
    assert page(report).count("<script") == 1


def test_the_page_is_self_contained(written):
    _, (path, _) = written
    found = tree(path.read_text())
    sources = found.xpath("//img/@src | //image/@href")
    assert len(sources) > 5 + 2 + 2  # charts, kept tokens and gallery
    drawn = {use[1:] for use in found.xpath("//use/@href")}
    assert drawn == set(found.xpath("//image/@id"))
    for source in sources:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", source).groups()
        assert Image.open(io.BytesIO(base64.b64decode(data))).format.lower() == kind
    assert all(image.get("alt") for image in found.xpath("//img"))
    assert "url(" not in path.read_text()
    assert found.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0].startswith(
        "default-src 'none'"
    )


def test_the_page_holds_tables_tied_best_flips_figures_and_provenance(written):
    report, (path, _) = written
    found, text = tree(path.read_text()), text_of(path.read_text())
    (section,) = report.sections
    bold = {
        value.getparent().getparent().xpath("td[1]")[0].text
        for value in found.xpath("//div[contains(@class, 'intervals')]//td/strong")
    }
    assert bold == {row["method"] for row in section.rows["gqa"] if row["tied_best"]} == {"scope"}
    rows = {
        row.xpath("th")[0].text: [cell.text for cell in row.xpath("td")]
        for row in found.xpath("//details[starts-with(summary, 'gqa')]//tbody/tr")
    }
    scope = next(row for row in section.rows["gqa"] if row["method"] == "scope")
    assert rows["scope"][4].startswith(f"{scope['value']:.1f} [")
    assert rows["scope"][9:11] == [
        str(int(scope["right_to_wrong"])),
        str(int(scope["wrong_to_right"])),
    ]
    assert [chart.path.stem for chart in section.charts] == CHARTS
    assert all(picture.path.exists() for picture in section.charts)
    assert f"Without the cost of the pruner itself: {SPPRUNER}." in text
    for fact in (
        "abc",
        "x86_64",
        "secateur 0.1.0",
        "the first 500",
        "2026-01-01",
        "shapes, revision main",
    ):
        assert fact in text, fact


def test_it_is_said_once_that_shapes_are_a_demonstration(written):
    _, (path, markdown) = written
    assert text_of(path.read_text()).count(f"Suite shapes: {DEMONSTRATION}") == 1
    assert markdown.read_text().count(f"Suite shapes: {DEMONSTRATION}") == 1
    captions = tree(path.read_text()).xpath("//figure[p]/figcaption")
    assert len(captions) == len(CHARTS)
    assert all("Suite shapes" in caption.text_content() for caption in captions)


def test_the_hub_is_no_demonstration(tmp_path):
    real = reported(tmp_path, grid(tasks=("gqa",), suite="hub", scope=0.7))
    assert not real.sections[0].demonstration
    assert DEMONSTRATION not in page(real)


def test_a_reconstruction_is_named_so_everywhere(written):
    _, (path, markdown) = written
    for text in (text_of(path.read_text()), markdown.read_text()):
        assert SPPRUNER in text
        assert "sppruner" not in text.replace(SPPRUNER, "")


def test_the_summary_links_to_figures_that_exist(written):
    _, (_, path) = written
    text = path.read_text()
    links = re.findall(r"^!\[[^\]]*\]\(([^)]*)\)$", text, re.MULTILINE)
    assert len(links) == len(CHARTS)
    assert all((path.parent / link).exists() for link in links)
    assert "<script" not in text
    assert re.search(r"(?<!\\)\[x\]", text) is None
    assert re.search(r"\| 16 +\| scope +\| \d+ +\| \d+ +\| \d+ +\|", text)  # flips
    assert "SCOPE Table 1, llava_1_5_7b: nothing was run" in text


def test_cells_of_different_limits_stand_apart(tmp_path):
    cells = grid(tasks=("gqa",), scope=0.7) + grid(
        tasks=("gqa",), documents=200, limit=200, scope=0.5
    )
    report = reported(tmp_path, cells)
    assert [section.title.split(", ")[2] for section in report.sections] == [
        "the first 200 documents per task",
        "the first 400 documents per task",
    ]
    values = [[row["value"] for row in section.rows["gqa"]] for section in report.sections]
    assert np.allclose(values, [[80, 50], [80, 70]])
    assert len({chart.path for section in report.sections for chart in section.charts}) == 2
    assert not report.refused


def test_cells_of_different_versions_are_marked(tmp_path):
    cells = grid(tasks=("gqa",), scope=0.7)
    cells[1:] = changed(cells[1:], {"identity.versions": {"secateur": "0.2.0"}})
    report = reported(tmp_path, cells)
    assert not report.refused
    assert any("Cells differ in packages: 1 of secateur" in text for text in report.problems)
    assert "other packages than the unpruned cell" in text_of(page(report))


def test_older_versions_of_a_cell_are_left_out_and_listed(tmp_path):
    cells = grid(tasks=("gqa",), scope=0.7)
    newer = {"identity.code": "abc", "started": "2026-02-01T00:00:00Z"}
    report = reported(tmp_path, [*cells, *changed(cells[1:], newer)])
    assert not report.refused
    assert any(
        text.startswith("other version left out: runs/shapes/shapes_llava/gqa/scope_16_")
        for text in report.problems
    )


def test_one_sample_only_is_marked(tmp_path):
    report = reported(tmp_path, grid(tasks=("gqa",), documents=1, limit=1, scope=1.0))
    text = text_of(page(report))
    assert "a single image: no interval can be given" in text
    assert "No average" in text
    assert "No gallery: it needs two methods" in text


def test_equal_answers_and_nan_are_marked(tmp_path):
    cells = grid(tasks=("gqa",), scope=0.7, random=0.5)
    same = cells[0].rows.assign(answer="yes")
    broken = cells[1].rows.assign(score=np.nan)
    report = reported(
        tmp_path, [cells[0]._replace(rows=same), cells[1]._replace(rows=broken), cells[2]]
    )
    text = text_of(page(report))
    assert "every answer is 'yes'" in text
    assert "has a score that is not a number from 0 to 1" in text
    assert all(row["low"] != row["low"] for row in report.sections[0].rows["gqa"])


@pytest.mark.parametrize(
    ("commit", "said"),
    [
        ("def-dirty", "edited sources that no commit holds: def-dirty"),
        ("unknown: git is not installed", "not known (unknown: git is not installed)"),
    ],
)
def test_several_edited_and_unknown_commits_are_said(tmp_path, commit, said):
    cells = grid(tasks=("gqa",), scope=0.7)
    store(tmp_path, [cells[0], *changed(cells[1:], {"environment.commit": commit})])
    doubts = Report(tmp_path, 200).sections[0].warnings
    assert any(f"2 commits, abc, {commit}" in text for text in doubts)
    assert any(said in text for text in doubts)


def test_missing_data_sets_leave_the_answers(tmp_path, monkeypatch):
    def nothing(*_):
        raise FileNotFoundError("the data set was looked for and not found")

    monkeypatch.setattr(images, "Documents", nothing)
    section = reported(tmp_path, grid(tasks=("gqa",), scope=0.7, random=0.4)).sections[0]
    assert section.warnings == ["No images: the data set was looked for and not found"]
    assert len(section.entries["16"]) > 1
    assert not any(entry.scenes or entry.panels for entry in section.entries["16"])
    assert section.kept == []


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--resamples", "100", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def test_the_script_writes_both_files(tmp_path, monkeypatch, capsys):
    store(tmp_path, grid(tasks=("gqa",), scope=0.7, random=0.4))
    assert run(monkeypatch, "--results", str(tmp_path), "--documents", "gqa:7") == 0
    assert (tmp_path / "report" / "index.html").exists()
    assert "gqa, document 7, budget 16" in text_of((tmp_path / "report" / "index.html").read_text())
    assert "summary.md" in capsys.readouterr().out
    assert run(monkeypatch, "--results", str(tmp_path), "--documents", "gqa:5000") == 1
    assert "did not answer document 5000 of gqa" in text_of(
        (tmp_path / "report" / "index.html").read_text()
    )


def test_a_task_without_pruned_cells_is_left_out_of_the_pictures(tmp_path):
    cells = [own for own in grid(scope=0.7, random=0.4) if own.name == "none" or own.task == "gqa"]
    report = reported(tmp_path, cells)
    assert not report.refused
    assert [one.name for one in report.sections[0].kept] == ["gqa, document 0"]


def test_no_records_are_an_error(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--results", str(tmp_path)) == 1
    assert "no finished cells" in capsys.readouterr().out
    assert not (tmp_path / "report").exists()


@pytest.fixture(scope="module")
def chromium():
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on the path")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


# pairs of visible texts of the page that overlap
OVERLAPS = """() => {
  const boxes = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("script, svg") || !parent.checkVisibility())
      continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects())
      if (box.width > 1 && box.height > 3)
        boxes.push([box.left, box.top + 1.5, box.right, box.bottom - 1.5, node.textContent]);
  }
  boxes.sort((a, b) => a[1] - b[1]);
  const found = [];
  boxes.forEach((a, i) => {
    for (let j = i + 1; j < boxes.length && boxes[j][1] < a[3]; j++)
      if (Math.min(a[2], boxes[j][2]) - Math.max(a[0], boxes[j][0]) > 1)
        found.push([a[4], boxes[j][4]]);
  });
  return found;
}"""
FIRST_COLUMN = """() => [...document.querySelectorAll(".intervals tbody tr")].map(
  row => [...row.cells].map(cell => cell.textContent))"""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_whole_and_runs_only_its_own_script(written, chromium, width):
    _, (path, _) = written
    opened = chromium.new_page(viewport={"width": width, "height": 800})
    events = []
    opened.on("console", lambda message: events.append(message.text))
    opened.on("pageerror", lambda error: events.append(str(error)))
    opened.on("dialog", lambda dialog: (events.append(dialog.message), dialog.dismiss()))
    opened.on(
        "request",
        lambda request: events.append(request.url) if not request.url.startswith("data:") else None,
    )
    opened.goto(Path(path).as_uri())
    assert events == [Path(path).as_uri()]
    wide = "document.documentElement.scrollWidth"
    assert opened.evaluate(wide) <= width  # wide tables scroll by themselves
    assert opened.evaluate(OVERLAPS) == []
    assert opened.evaluate(
        "[...document.querySelectorAll('details')].every(part => part.open = true)"
    )
    assert opened.evaluate(wide) <= width
    assert opened.evaluate(OVERLAPS) == []
    assert opened.locator(".intervals").evaluate("box => box.scrollWidth > box.clientWidth") == (
        opened.locator(".hint").first.is_visible()
    )
    place = "cell => cell.getBoundingClientRect().left"
    first = opened.locator(".intervals tbody td").first
    before = first.evaluate(place)
    opened.locator(".intervals").evaluate("box => box.scrollLeft = 60")
    assert first.evaluate(place) == before  # the methods stay
    opened.locator(".intervals th", has_text="gqa").click()
    values = [float(row[3].split()[0]) for row in opened.evaluate(FIRST_COLUMN)]
    assert values == sorted(values, reverse=True)
    assert len(values) == 4
    assert ATTACK in opened.inner_text("main")
    assert "(reconstruction)" in opened.inner_text("main")
    opened.close()


def test_every_budget_of_the_gallery_can_be_chosen(chromium, tmp_path):
    cells = grid(tasks=("gqa",), documents=40, scope=0.7, random=0.4)
    more = grid(tasks=("gqa",), documents=40, scope=0.9, random=0.6)[1:]
    more = changed(more, {"identity.budget": "48", "average_tokens": 48.0})
    report = reported(tmp_path, [*cells, *more])
    (path, _) = write(report, tmp_path / "report")
    opened = chromium.new_page()
    opened.goto(path.as_uri())
    for title in ("Which tokens are kept", "Where two methods disagree"):
        choice = opened.locator(f"h3:has-text('{title}') ~ .choice").first
        for budget in ("48", "16"):
            choice.locator(f"label:has-text('budget {budget}')").click()
            shown = [own for own in choice.locator(".chosen").all() if own.is_visible()]
            assert len(shown) == 1
            assert f"budget {budget}" in shown[0].inner_text()
    opened.close()

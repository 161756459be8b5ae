"""`make paper` and `make kept`: LaTeX that is well formed, BibTeX of the methods, pictures."""

import inspect
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from cells import CONFIGS, altered, changed, identity
from PIL import Image
from stored import SPPRUNER, Pictures, grid, store

from secateur.pruners import REGISTRY
from secateur.reporting import images, kept, own_table, paper
from secateur.reporting.bibliography import bibliography, entries, key_of
from secateur.reporting.comparison import compare
from secateur.reporting.overlay import darkened, kept_tokens
from secateur.settings import ModelIdentity

SCRIPTS = CONFIGS.parent / "scripts"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What `make paper` writes of a sweep with three seeds of random."""
    folder = tmp_path_factory.mktemp("results")
    cells = grid(("gqa",), 500, 500, random=0.4, scope=0.75, sppruner=0.7)
    randoms = [own for own in cells if own.name == "random"]
    for seed in (1, 2):
        cells += changed(randoms, {"identity.pruner.seed": seed})
    made = paper.write(store(folder, cells), folder / "paper", 200)
    return folder, made


def test_every_file_is_there(written):
    folder, made = written
    stem = "shapes_shapes_llava_500"
    names = {str(path.relative_to(folder / "paper")) for path in made.files}
    charts = ("scores", "accuracy_tokens", "accuracy_tokens_single", "accuracy_flops", "agreement")
    assert names == {
        *(f"table_{stem}.tex", f"table_{stem}.csv", f"provenance_{stem}.tex"),
        *("methods.bib", "preview.tex"),
        *(f"figures/{stem}_{name}.{kind}" for name in charts for kind in ("pdf", "png")),
    }
    assert all(path.stat().st_size > 100 for path in made.files)
    table = pd.read_csv(folder / "paper" / f"table_{stem}.csv")
    assert set(table["task"]) == {"gqa"}
    assert made.warnings == []


def well_formed(text: str) -> None:
    """Braces and environments match, rows have as many cells as columns, nothing is unescaped."""
    text = re.sub(r"(?<!\\)%.*", "", text)
    plain = re.sub(r"\\[{}%&$#_]", "", text)
    assert plain.count("{") == plain.count("}")
    opened = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    columns = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1])
    rows = re.findall(r"^(.*?) \\\\$", text, re.MULTILINE)
    for row in rows:
        if "multicolumn" in row:
            assert row.count("&") == 0
            assert f"{{{columns}}}" in row
        else:
            assert len(re.findall(r"(?<!\\)&", row)) == columns - 1
    body = text[text.index(r"\toprule") :]
    assert not re.search(r"(?<!\\)[#%]", body)
    assert text.isascii()


def test_the_table_is_latex_with_bold_intervals_and_seeds(written):
    folder, _ = written
    text = (folder / "paper" / "table_shapes_shapes_llava_500.tex").read_text()
    well_formed(text)
    rows = {row.split(" & ")[0]: row for row in text.splitlines() if " & " in row}
    scope = rows[rf"SCOPE~\cite{{{key_of('scope')}}}"]
    assert r"\textbf{75.0} {\scriptsize $\pm$" in scope
    assert r"$\downarrow$" in rows["random"]
    assert r"(sd 0.0)" in rows["random"]
    assert rf"SPpruner{SPPRUNER.removeprefix('sppruner')}".replace("_", r"\_") in text
    assert "demonstration" in text
    assert r"\multicolumn{3}{l}{\emph{16 tokens}}" in text


def test_a_wide_table_is_shrunk_and_gaps_are_dashes():
    cells = grid(tasks=("pope", "gqa", "mme", "scienceqa_img", "mmstar"), documents=40, scope=0.7)
    table = compare(cells, 100)
    table = table[(table["task"] != "gqa") | (table["method"] != "scope")]
    text = own_table.latex(table, "a_title", "tab:x", {"scope": "scope", "none": "none"})
    well_formed(text)
    assert r"\resizebox{\linewidth}" in text
    assert " & -- & " in next(line for line in text.splitlines() if line.startswith("SCOPE"))
    assert r"A\_title." in text


def test_the_paragraph_of_provenance_names_what_the_numbers_rest_on(written):
    folder, _ = written
    text = (folder / "paper" / "provenance_shapes_shapes_llava_500.tex").read_text()
    for fact in (
        *("commit abc", "secateur 0.1.0", "lock", "eval/shapes/model", "cpu (x86\\_64, 2 cores"),
        *("the first 500 documents", "GQA", "2026-01-01", "sppruner (reconstruction)"),
    ):
        assert fact in text, fact


def test_the_preview_compiles_where_latex_is_installed(written, tmp_path):
    folder, made = written
    preview = (folder / "paper" / "preview.tex").read_text()
    for name in re.findall(r"\\(?:input|includegraphics\[.*?\])\{(.*?)\}", preview):
        path = folder / "paper" / name
        assert path in made.files or path.with_suffix(".tex") in made.files
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on the path")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode"]
    done = subprocess.run(
        [*command, f"-output-directory={tmp_path}", "preview"],
        cwd=folder / "paper", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


def test_every_paper_has_one_entry_that_agrees_with_the_docstring():
    papers = {cls.paper.removeprefix("arXiv ") for cls in REGISTRY.values()} - {"-"}
    assert set(entries()) == papers
    keys = [key_of(name) for name in REGISTRY if key_of(name)]
    assert len(set(keys)) == len(papers)
    for eprint, entry in entries().items():
        fields = dict(re.findall(r"^  (\w+) = \{\{?(.*?)\}?\},$", entry, re.MULTILINE))
        assert fields["year"] == f"20{eprint[:2]}"
        methods = [cls for cls in REGISTRY.values() if cls.paper == f"arXiv {eprint}"]
        texts = [" ".join((inspect.getdoc(cls) or "").split()) for cls in methods]
        quoted = [title for text in texts for title in re.findall(r'"([^"]+?),?",', text)]
        assert any(fields["title"].startswith(title) for title in quoted), fields["title"]
        author = fields["author"].removesuffix(" and others")
        assert any(f"{author} et al." in text for text in texts)
        assert all(f", {fields['note']}," in texts[0] for _ in fields.keys() & {"note"})


def test_a_paper_is_cited_once_and_one_without_an_entry_is_named(monkeypatch):
    text = bibliography(["prumerge", "prumerge_plus", "random"])
    assert text.count("@misc") == 1
    assert "% prumerge, prumerge_plus" in text
    monkeypatch.setattr(REGISTRY["random"], "paper", "arXiv 9999.00001")
    assert "% random: arXiv 9999.00001; add its entry" in bibliography(["random", "scope"])
    assert key_of("random") == ""


def run(monkeypatch, script: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return end.value.code


def test_an_empty_folder_and_an_unknown_method_are_errors(tmp_path, monkeypatch, capsys):
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run(monkeypatch, "paper.py", *arguments) == 1
    assert "no finished cells" in capsys.readouterr().out
    store(tmp_path, grid(tasks=("gqa",), documents=20, scope=0.7))
    assert run(monkeypatch, "paper.py", *arguments, "--highlight", "nobody") == 1
    assert "no rows of nobody; there are scope" in capsys.readouterr().out


def test_kept_tokens_of_chosen_documents_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "Documents", Pictures)
    store(tmp_path, grid(documents=20, scope=0.7, random=0.4))
    arguments = ["--results", str(tmp_path), "--out", str(tmp_path / "out")]
    assert run(monkeypatch, "kept.py", "gqa:7,pope:3", *arguments, "--methods", "scope") == 0
    stems = ["shapes_shapes_llava_400_gqa_7_16", "shapes_shapes_llava_400_pope_3_16"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{stem}.{kind}" for stem in stems for kind in ("pdf", "png")
    ]
    assert run(monkeypatch, "kept.py", "gqa:99", *arguments) == 1
    assert "did not answer document 99 of gqa" in capsys.readouterr().out
    assert run(monkeypatch, "kept.py", "--methods", "fastv", *arguments) == 1
    assert "no cells of fastv; there are random, scope" in capsys.readouterr().out
    assert run(monkeypatch, "kept.py", "gqa", *arguments) == 2


def test_dropped_cells_are_dark_and_long_titles_have_room():
    view = kept.View(Image.new("RGB", (40, 20), "white"), np.arange(8).reshape(2, 4))
    mask = np.isin(view.tokens, [0, 7])
    dark = darkened(np.asarray(view.image), mask)
    assert dark[0, 0].tolist() == dark[19, 39].tolist() == [255] * 3
    assert dark[0, 10].tolist() == dark[19, 29].tolist() == [56] * 3
    figure = kept_tokens([view, view], {SPPRUNER: [mask, mask], "b": [mask, mask]}, "caption")
    assert len(figure.axes) == 6
    assert figure.axes[1].get_title().replace("\n", " ") == f"{SPPRUNER}: 4 of 16"
    assert max(map(len, figure.axes[1].get_title().split("\n"))) <= 26


def model_identity(**values: object) -> ModelIdentity:
    own = identity("llava_1_5_7b", "none", "full", "gqa")
    return altered(own, {f"model.{name}": value for name, value in values.items()}).model


def row(crops, indices):
    return pd.Series({"doc_id": 0, "crops": crops, "kept_indices": indices})


def test_the_image_is_cut_as_the_encoder_sees_it():
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (0, 0, 10, 40))
    own = row([[12, 12]], [[0]])
    ((view,),) = kept.views(model_identity(geometry="processor"), [image], own)
    assert view.image.size == (40, 40)
    assert view.image.getpixel((0, 20)) == (255, 0, 0)  # the middle square
    ((view,),) = kept.views(model_identity(geometry="pad"), [image], own)
    assert view.image.size == (60, 60)
    assert view.image.getpixel((0, 0)) == (128, 128, 128)
    assert view.image.getpixel((0, 30)) == (0, 0, 255)
    qwen = row([[4, 6]], [[0, 23]])
    ((view,),) = kept.views(model_identity(family="qwen2_5_vl"), [image], qwen)
    assert (view.image.size, view.tokens.shape) == ((60, 40), (4, 6))
    (mask,) = kept.masks(model_identity(family="qwen2_5_vl"), "scope", [[view]], qwen)
    assert np.argwhere(mask).tolist() == [[0, 0], [3, 5]]
    square = model_identity(family="qwen2_5_vl", image_side=336)
    ((view,),) = kept.views(square, [image], row([[12, 12]], [[0]]))
    assert view.image.size == (60, 60)


def test_several_images_have_their_own_views_and_others_are_refused():
    image = Image.new("RGB", (60, 40))
    own = row([[12, 12]] * 2, [[0], [143]])
    model = model_identity()
    seen = kept.views(model, [image, image], own)
    first, second = kept.masks(model, "scope", seen, own)
    assert (int(first.argmax()), int(second.argmax()), int(second.sum())) == (0, 143, 1)
    with pytest.raises(kept.NoView, match="1 images here, 2 in the record"):
        kept.views(model, [image], own)
    with pytest.raises(kept.NoView, match="its images give 1 crops, the record has 2"):
        kept.views(model, [image], row([[12, 12]] * 2, [[0]]))


@pytest.mark.parametrize("layout", ["anyres", "crops", "fixed2880"])
def test_tiles_of_llava_next_lie_where_the_model_puts_them(layout):
    """The places are those of the processor and the adapter of a tiny model."""
    import torch

    from secateur.families import family_of
    from secateur.geometry import random_model, random_processor, tiny

    config = tiny("llava_next_fixed" if layout == "fixed2880" else "llava_next")
    family, picture = family_of("llava_next"), Image.new("RGB", (70, 150))
    inputs = family.tensors(
        random_processor(config), config, "<image>", [picture],
        None if layout == "anyres" else layout,
    )  # fmt: skip
    crops = inputs["pixel_values"].shape[1]
    adapter = family.adapter(random_model(config), layout)
    arguments = {"image_sizes": inputs["image_sizes"]}
    raw = {"features": torch.zeros(crops, 16, 64)}
    (encoded,) = adapter.encoded(frozenset({"features"}), raw, arguments)
    model = model_identity(family="llava_next", layout=layout)
    own = row([[4, 4]] * crops, [list(range(3))])
    (views,) = kept.views(model, [picture], own)
    order = family.prompt_order(model, views)
    placed = [int(number) for number in encoded.tokens]
    if layout != "anyres":  # newlines are removed before the language model
        placed = [number for number in placed if number >= 0]
    assert order == placed
    # methods before the language model count tokens, those inside it places
    last = row([[4, 4]] * crops, [[len(order) - 1 - (layout == "anyres")]])
    _, mosaic = kept.masks(model, "fastv", [views], last)
    assert np.argwhere(mosaic).tolist() == [[size - 1 for size in mosaic.shape]]
    whole, mosaic = kept.masks(model, "scope", [views], own)
    assert (int(whole.sum()), int(mosaic.sum())) == (3, 0)

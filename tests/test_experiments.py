"""Every experiment composes into the jobs of its paper's tables."""

import re
from functools import cache
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from secateur import experiments
from secateur.budget import Budget
from secateur.job import Job
from secateur.pruners import InLLMPruner, PrunerError, build
from secateur.records import MethodIdentity
from secateur.reporting.layouts import layouts
from secateur.reporting.variants import Variant, variant, variants
from secateur.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(
    path.stem
    for path in (CONFIGS / "experiment").glob("*.yaml")
    if not path.stem.startswith("shapes")
)
# model -> visual tokens of an image (1008 x 1008 pixels for Qwen), LLM layers
SIZES = {
    "llava_1_5_7b": (576, 32),
    "llava_1_5_13b": (576, 40),
    "llava_next_7b": (2880, 32),
    "llava_next_13b": (2880, 40),
    "qwen2_vl_7b": (1296, 28),
    "qwen2_5_vl_7b": (1296, 28),
    "qwen2_5_vl_3b": (1296, 36),
}
FIELDS = [  # of a model, in the order of its config
    *(
        "name",
        "family",
        "pretrained",
        "revision",
        "weights",
        "dtype",
        "attn_implementation",
        "device",
    ),
    *(
        "prompt",
        "geometry",
        "resize",
        "layout",
        "unpruned_layout",
        "min_pixels",
        "max_pixels",
        "image_side",
        "text_scope",
    ),
    *("max_new_tokens", "generation", "clip", "positions", "budgets"),
]

# experiments of tables whose unpruned row is another table's
BORROWED = {layout.experiment for layout in layouts() if layout.unpruned}
# PromPrune Table 4: mean number of salient tokens
SALIENT = {"pope": 12, "scienceqa_img": 40, "gqa": 13, "mmbench_en": 33, "textvqa": 17}
# a method at a budget of a model that no experiment runs
LEFT_OUT = [
    (cell["model"], cell["method"], cell["budget"])
    for cell in OmegaConf.load(ROOT / "results" / "reported" / "reasons.yaml").cells
]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("sweep", overrides=list(overrides))


@cache
def text(experiment: str) -> str:
    return (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()


@cache
def written(experiment: str) -> DictConfig:
    config = OmegaConf.create(text(experiment))
    assert isinstance(config, DictConfig)
    return config


@cache
def model_of(experiment: str) -> str:
    (name,) = (
        item["override /model"]
        for item in written(experiment).defaults
        if "override /model" in item
    )
    return name


@cache
def grid(experiment: str) -> dict[str, list[str]]:
    """Swept field -> its values; budgets as the tables print them."""
    params = [f"{key}={value}" for key, value in written(experiment).hydra.sweeper.params.items()]
    parsed = OverridesParser.create().parse_overrides(params)
    values = {
        override.get_key_element(): list(override.sweep_string_iterator())
        if override.is_sweep_override()
        else [str(override.value())]
        for override in parsed
    }
    return values | {"budget": [as_printed(budget) for budget in values["budget"]]}


def as_printed(budget: str) -> str:
    """Tables name the sum over the five crops of LLaVA-NeXT."""
    own = Budget.parse(budget)
    return str(5 * own.tokens) if own.per_tile and own.tokens else budget


def tasks(experiment: str) -> list[str]:
    """The tasks of an experiment, which it may sweep one by one."""
    return grid(experiment).get("tasks") or list(written(experiment).tasks)


@cache
def choice(experiment: str, value: str, task: str) -> Variant:
    """What a value of `pruner` chooses: a method, or fields of the experiment's own method."""
    one_by_one = [f"tasks={task}"] if "tasks" in grid(experiment) else []
    if not value.startswith("{") and not one_by_one:
        return Variant(value)
    pruner = Job.of(composed(f"experiment={experiment}", f"pruner={value}", *one_by_one)).pruner
    fields = MethodIdentity.of(pruner).changed().items()
    return Variant(pruner.name, tuple(f"{name}={own}" for name, own in fields))


@cache
def reported() -> pd.DataFrame:
    """What the papers print for the tasks of this project.

    Methods and budgets are as we write them.
    """
    rows = pd.read_csv(ROOT / "results" / "reported" / "accuracy.csv")
    rows = rows[rows["task"].isin(list(TASKS))]
    tokens, shares = rows["budget_tokens"], rows["retention_pct"]
    budgets = tokens.map("{:g}".format).where(tokens.notna(), shares.map("{:g}%".format))
    return rows.assign(
        choice=[variant(*row) for row in zip(rows["method"], rows["task"], strict=True)],
        budget=budgets.where(rows["method"] != "none", "full"),
    )


@cache
def cells(experiment: str) -> set[tuple[Variant, str, str]]:
    """(method, budget, task) of every number an experiment fills."""
    swept = product(tasks(experiment), grid(experiment)["pruner"], grid(experiment)["budget"])
    chosen = [(choice(experiment, value, task), budget, task) for task, value, budget in swept]
    return {(own, "full" if own.method == "none" else budget, task) for own, budget, task in chosen}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_combination_is_a_job(tmp_path, experiment):
    model = model_of(experiment)
    tokens, layers = SIZES[model]
    swept = grid(experiment)
    combinations = [dict(zip(swept, values, strict=True)) for values in product(*swept.values())]
    for own, job in zip(combinations, experiments.jobs(experiment, tmp_path), strict=True):
        assert job.model.name == model
        assert job.pruner.name == choice(experiment, own["pruner"], job.tasks[0]).method
        assert job.limit is None
        assert job.suite.name == "hub"
        keep = job.budget.resolve(tokens)
        if isinstance(job.pruner, InLLMPruner):  # raises where no schedule meets the budget
            # the counts SparseVLM releases for 192, 128 and 64 average 206, 145 and 82
            assert (
                job.pruner.average(tokens, layers, keep)
                < (1.3 if job.pruner.name == "sparsevlm" else 1.02) * keep
            )


@pytest.mark.parametrize("experiment", ["fsr_table1", "scope_table4"])  # methods; fields of one
def test_jobs_are_those_that_hydra_composes(tmp_path, experiment):
    combinations = product(grid(experiment)["pruner"], grid(experiment)["budget"])
    for (method, budget), job in zip(
        combinations, experiments.jobs(experiment, tmp_path), strict=True
    ):
        words = f"results={tmp_path}", f"experiment={experiment}", f"pruner={method}"
        assert job == Job.of(composed(*words, f"budget={budget}"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_input_is_that_of_the_papers(experiment):
    stated, model = (
        written(experiment).model,
        composed(f"model={model_of(experiment)}").model,
    )
    original_llava = {
        "prompt": "vicuna_v1",
        "dtype": "float16",
        "positions": "compact",
        "resize": "pil",
    }
    qwen = {"prompt": "hub", "dtype": "bfloat16", "positions": "original"}
    expected = {
        "llava": original_llava | {"geometry": "pad"},
        "llava_next": original_llava | {"unpruned_layout": "anyres"},
        "qwen2_vl": qwen,
        "qwen2_5_vl": qwen,
    }[model.family]
    assert {
        key: stated[key] for key in expected
    } == expected  # in the experiment itself, whatever the model's file says
    assert set(stated) <= set(model)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_setting_is_stated_by_the_source_or_chosen_by_us(experiment):
    own, places = experiments.settings(experiment), experiments.stated(experiment)
    assert set(places) <= set(own)
    assert {f"model.{name}" for name in written(experiment).model} <= set(own)
    states, chosen = experiments.origins(experiment)
    for name in own:
        named = re.search(rf"[ ,]{re.escape(name)}[=, ]", states if name in places else chosen)
        assert named, name
        assert not re.search(rf"[ ,]{re.escape(name)}=", chosen if name in places else states)
    assert ("model" in places) == ("reported" in written(experiment))


def test_a_wrong_name_of_a_stated_setting_is_told(tmp_path, monkeypatch):
    file = text("scope_llava")
    monkeypatch.setattr(experiments, "FOLDER", tmp_path)
    for right, wrong, told in (
        ("model.dtype: released", "model.dtyp: released", "'model.dtyp', which is no setting"),
        ("model.dtype: released code", "model.dtype:", "model.dtype is None; write where"),
    ):
        assert file.count(right) == 1
        (tmp_path / "scope_llava.yaml").write_text(file.replace(right, wrong))
        with pytest.raises(ValueError, match=told):
            experiments.stated("scope_llava")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_header_names_its_source(experiment):
    header = [line[2:] for line in text(experiment).splitlines() if line.startswith("#")]
    about = " ".join(header[2:])
    assert re.search(r"arXiv \d{4}\.\d{5}", header[2])
    tables = written(experiment).get("reported", {}).get("tables", [])
    assert all(table in about or experiment == "angelslim_qwen" for table in tables)
    assert tables or "No table is public." in about


@pytest.mark.parametrize(
    "experiment", [name for name in EXPERIMENTS if "reported" in written(name)]
)
def test_an_experiment_is_what_its_tables_hold(experiment):
    source, rows = written(experiment).reported, reported()
    rows = rows[
        (rows["paper"] == source.paper)
        & rows["table"].isin(list(source.tables))
        & (rows["model"] == model_of(experiment))
    ]
    assert set(source.tables) == set(rows["table"])
    chosen = {own for own, _, _ in cells(experiment)}
    assert set(rows.loc[rows["choice"].isin(chosen), "task"]) == set(tasks(experiment))
    printed = set(zip(rows["choice"], rows["budget"], strict=True))
    borrowed = {Variant("none")} if experiment in BORROWED else set()
    assert chosen - borrowed <= {own for own, _ in printed}
    assert set(grid(experiment)["budget"]) <= {budget for _, budget in printed}


def test_every_variant_is_printed():
    methods = set(pd.read_csv(ROOT / "results" / "reported" / "accuracy.csv")["method"])
    assert set(variants()) <= methods
    assert variant("prunesid_w_o_psca") == ("prunesid", ("score=norm", "grouping=random"))
    assert variant("prunesid_w_o_nms") == variant("prunesid_ascend")  # one setting, printed twice
    assert variant("prunesid_alpha=32") == variant("prunesid") == ("prunesid", ())


def test_a_fixed_split_is_that_of_its_task():
    fixed = {task: (f"salient={count}",) for task, count in SALIENT.items()}
    assert {task: variant("promprune_fixed_allocation", task).fields for task in SALIENT} == fixed
    assert cells("promprune_table4") == {
        (Variant("promprune", fields), "64", task)
        for task, own in fixed.items()
        for fields in ((), own)
    }
    with pytest.raises(KeyError):  # the paper has no split for it
        variant("promprune_fixed_allocation", "mme")


@pytest.mark.parametrize(("model", "method", "budget"), LEFT_OUT)
def test_cells_left_out_for_their_budget_cannot_run(model, method, budget):
    tokens, layers = SIZES[model]
    with pytest.raises(PrunerError):
        build(method).schedule(tokens, layers, Budget.parse(budget).resolve(tokens))


@pytest.mark.parametrize(
    "model", sorted(path.stem for path in (CONFIGS / "model").glob("[!_]*.yaml"))
)
def test_a_model_states_every_field_in_order(model):
    config = composed(f"model={model}").model
    assert [key for key in config if key != "pruner_fields"] == FIELDS
    assert config.name == model
    assert all(Budget.parse(budget) != Budget() for budget in config.budgets)


@pytest.mark.parametrize("model", ["qwen2_vl_7b", "qwen2_5_vl_7b", "qwen2_5_vl_3b"])
@pytest.mark.parametrize(
    "method", ["promprune", "prunesid", "prunesid_dyn", "visionzip", "cdpruner", "sppruner", "fsr"]
)
def test_a_model_decides_the_fields_that_depend_on_it(model, method):
    config = composed(f"model={model}", f"pruner={method}")
    fields = dict(config.model.pruner_fields[method])
    assert fields
    assert {key: config.pruner[key] for key in fields} == fields
    assert "cls_token" not in build(**config.pruner).needs


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda path: path.stem
)
def test_an_experiment_opens_with_the_command_that_runs_it(path):
    first, second, *_ = path.read_text().splitlines()
    assert first == "# @package _global_"
    assert second == f"# python scripts/sweep.py -m experiment={path.stem}"

"""Every config composes; a value that makes no sense is an error with the field and the fix."""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from secateur.budget import Budget
from secateur.checkpoints import commit_on_hub, fingerprint
from secateur.hub import forget
from secateur.injection.clip import ClipRelevance
from secateur.job import Job
from secateur.loading import load
from secateur.pruners import REGISTRY, build, registry
from secateur.pruners.registry import digest_of_code

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def composed(tmp_path, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("sweep", overrides=[f"results={tmp_path}", *overrides])


def names(group: str) -> list[str]:
    """All options of a group; a file with an underscore is a part of others."""
    return sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))


@pytest.mark.parametrize("model", names("model"))
@pytest.mark.parametrize("suite", names("suite"))
def test_every_model_and_suite_composes(tmp_path, model, suite):
    job = Job.of(composed(tmp_path, f"model={model}", f"suite={suite}"))
    assert job.model.name == model
    assert [Budget.parse(budget) for budget in job.model.budgets]
    own = job.cell("pope").identity.as_json()["model"]
    assert own["weights"]
    assert "device" not in own


@pytest.mark.parametrize("pruner", names("pruner"))
def test_every_pruner_composes(tmp_path, pruner):
    assert Job.of(composed(tmp_path, f"pruner={pruner}")).pruner.name == pruner


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes(tmp_path, experiment):
    config = composed(tmp_path, f"experiment={experiment}")
    assert Job.of(config)
    text = OmegaConf.load(CONFIGS / "experiment" / f"{experiment}.yaml")
    assert set(text.hydra.sweeper.params) <= {
        "pruner",
        "budget",
        "model",
        "tasks",
        "pruner.seed",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+pruner.beta=1"], "pruner 'scope' has no option beta; its options: alpha"),
        (["pruner.combine=divide"], "combine='divide': Input should be 'multiply' or 'add'"),
        (["pruner.name=scoop"], "unknown pruner 'scoop'; known: "),
        (["budget=0"], "at least 1 visual token must stay"),
        (["budget=some"], "budget='some' is not understood"),
        (["tasks=[vqa]"], "unknown task vqa; the nearest names are vqav2"),
        (["tasks=[chartqa]"], "chartqa is not in suite 'shapes'"),
        (["tasks=[mmbench_en,mmbench_en_dev_static]"], "names mmbench_en twice"),
        (["tasks=[]"], "names no task; suite 'shapes' has pope"),
        (["tasks=null"], "names no task"),
        (["strict=no"], "strict=no is not true or false"),
        (["retry_failed=off"], "retry_failed=off is not true or false"),
        (["limit=abc"], "limit=abc is not an integer"),
        (["limit=2.5"], "limit=2.5 is not an integer"),
        (["task_seed=-1"], "task_seed=-1 is not an integer in [0, "),
        (["cache=foo"], "cache=foo is not one of 'off', 'memory', 'disk'"),
        (["cache_gb=null"], "cache_gb=null is not a number in [0, inf)"),
        (["batch_tokens=-1"], "batch_tokens=-1 is not an integer in [0, inf)"),
        (["model.dtype=foo"], "model.dtype=foo is not one of 'auto', 'float32'"),
        (
            ["model.max_new_tokens=0"],
            "model.max_new_tokens=0 is not an integer in [1, inf) or null",
        ),
        (["+model.size=1"], "model.size is not a setting"),
        (
            ["task_seed=-1", "cache=foo"],
            "cache=foo is not one of 'off', 'memory', 'disk'; task_seed=-1",
        ),
        (["model.budgets=[null]"], "model.budgets.0=null is not an integer or a number or a"),
        (["limit=0"], "limit=0"),
        (["limit=7"], "MME scores pairs of questions; use limit=8"),
        (["shard=3/3"], "shard=3/3: write number/count, with numbers from 0"),
        (["shard=half"], "shard=half: write number/count"),
    ],
)
def test_nonsense_is_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError) as error:
        Job.of(composed(tmp_path, *overrides))
    assert message in str(error.value)


def test_a_results_folder_that_cannot_be_written_is_named():
    with pytest.raises(PermissionError, match="set results="):
        Job.of(composed("/proc/nowhere"))


def test_what_changes_the_answers_changes_the_cell(tmp_path):
    def identity(*overrides):
        return Job.of(composed(tmp_path, *overrides)).cell("pope").identity

    base = identity()
    for override in (
        "pruner.alpha=2",
        "budget=15",
        "limit=20",
        "task_seed=1",
        "model.dtype=bfloat16",
        "model.prompt=vicuna_v1",
    ):
        assert identity(override) != base
    assert identity("pruner.alpha=1") == identity("pruner.alpha=1.0") == base
    assert identity("budget=11.45833233%") != identity("budget=11.45833433%")
    assert identity("model.device=cuda") == base
    assert identity("retry_failed=true") == base
    assert identity("shard=1/4") == base
    assert identity("pruner=none", "budget=16") == identity("pruner=none", "budget=48")


OWN = """
from dataclasses import dataclass
from secateur.pruners.registry import register
from secateur.pruners.scoring import ScoreTopK

@register("own_method")
@dataclass(frozen=True)
class Own(ScoreTopK):
    status = "baseline"

    def score(self, tokens):
        return tokens.features[..., {answer}]
"""


@pytest.mark.parametrize(
    ("pruner", "module", "counts"),
    [
        ("scope", "scope", True),
        ("scope", "linalg", True),
        ("scope", "base", True),
        ("scope", "cdpruner", False),
        ("cdpruner", "relevance", True),
        ("dart", "fastv", True),
        ("prunesid_dyn", "prunesid", True),
    ],
)
def test_editing_what_a_method_uses_makes_its_cells_new(monkeypatch, pruner, module, counts):
    method, edited = build(pruner), f"secateur.pruners.{module}"
    read = registry._code
    assert digest_of_code(type(method).__module__) == method.code
    monkeypatch.setattr(registry, "_code", lambda name: read(name) + "# edited" * (name == edited))
    assert (digest_of_code(type(method).__module__) != method.code) is counts


def test_a_methods_digest_is_that_of_the_code_that_was_imported(tmp_path, monkeypatch):
    """An edit while a sweep runs does not change what runs."""
    (tmp_path / "own_method.py").write_text(OWN.format(answer=0))
    monkeypatch.syspath_prepend(str(tmp_path))
    import_module("own_method")
    try:
        before = build("own_method")
        (tmp_path / "own_method.py").write_text(OWN.format(answer=1))
        assert build("own_method").code == before.code
    finally:
        REGISTRY.pop("own_method")
        sys.modules.pop("own_method")


@pytest.mark.parametrize(
    ("name", "counts"), [("pytorch_model.bin", True), ("merges.txt", True), ("README.md", False)]
)
def test_every_file_of_a_local_model_counts_but_its_card(tmp_path, name, counts):
    (tmp_path / name).write_text("one")
    before = fingerprint(str(tmp_path), "main")
    fingerprint.cache_clear()
    (tmp_path / name).write_text("two")
    assert (fingerprint(str(tmp_path), "main") != before) is counts
    fingerprint.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on line whose answers a test may set, and a cache that holds one commit."""
    answers = {}

    def repo_info(repository, *, repo_type, revision, timeout):
        if (repository, repo_type, revision) not in answers:
            raise OSError("no such repository")
        return SimpleNamespace(sha=answers[repository, repo_type, revision], gated=False)

    monkeypatch.setattr("huggingface_hub.repo_info", repo_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    references = tmp_path / "hub" / "models--org--model" / "refs"
    references.mkdir(parents=True)
    (references / "main").write_text("a" * 40)
    forget(), fingerprint.cache_clear()
    yield answers
    forget(), fingerprint.cache_clear()


def test_a_revision_is_resolved_by_the_hub_or_else_by_its_cache(hub):
    assert commit_on_hub("org/model", "main") == "a" * 40
    hub["org/model", "model", "main"] = "b" * 40
    assert commit_on_hub("org/model", "main") == "a" * 40, "resolved once per process"
    forget()
    assert commit_on_hub("org/model", "main") == "b" * 40
    assert commit_on_hub("org/model", "c" * 40) == "c" * 40
    assert commit_on_hub("org/other", "main") is None
    assert commit_on_hub("org/model", "main", "dataset") is None


def test_offline_the_hub_is_not_asked(hub, monkeypatch):
    hub["org/model", "model", "main"] = "b" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert commit_on_hub("org/model", "main") == "a" * 40


def test_a_revision_that_moves_makes_other_cells(hub, tmp_path):
    """Model, CLIP and data set are part of a cell's identity by their commits."""

    def identity(*overrides):
        forget(), fingerprint.cache_clear()
        words = ["model=llava_1_5_7b", "suite=hub", *overrides]
        return Job.of(composed(tmp_path, *words)).cell("pope").identity

    model, clip = "llava-hf/llava-1.5-7b-hf", "openai/clip-vit-large-patch14-336"
    for repository, kind in (
        (model, "model"),
        (clip, "model"),
        ("lmms-lab-encoder/POPE", "dataset"),
    ):
        hub[repository, kind, "main"] = "1" * 40
    for repository, kind, counts in (
        (model, "model", True),
        (clip, "model", False),
        ("lmms-lab-encoder/POPE", "dataset", True),
    ):
        before = identity("pruner=scope"), identity("pruner=cdpruner")
        hub[repository, kind, "main"] = "2" * 40
        after = identity("pruner=scope"), identity("pruner=cdpruner")
        assert (before[0] != after[0]) is counts, "CLIP is loaded for cdpruner only"
        assert before[1] != after[1]
    assert after[1].data == "2" * 40
    assert identity("suite.data_root=/data").data == ""


def test_weights_come_from_the_commit_of_the_identity(hub, monkeypatch):
    hub["org/model", "model", "main"] = "d" * 40
    asked = []

    def from_pretrained(place, *, revision, **_):
        asked.append((place, revision))
        raise OSError("not here")

    monkeypatch.setattr("secateur.loading.AutoProcessor.from_pretrained", from_pretrained)
    monkeypatch.setattr("secateur.injection.clip.CLIPModel.from_pretrained", from_pretrained)
    forget()
    with pytest.raises(FileNotFoundError):
        load("org/model", "", "pretrained", "main", "auto", None, torch.device("cpu"), None)
    with pytest.raises(FileNotFoundError):
        ClipRelevance.from_pretrained("org/model")
    assert asked == [("org/model", "d" * 40)] * 2

"""Sweeps whose models and data come from a hub: a stand-in for it on the loopback interface."""

import json
import time
from pathlib import Path

import pytest
from hub import CLIP, DATA, MODELS, Fault, Hub, commit, put_data, put_model, run

FAMILIES = ("llava_1_5_7b", "llava_next_7b", "qwen2_5_vl_7b", "qwen2_vl_7b")
POPE, GQA = DATA["pope"][0], DATA["gqa"][0]
LLAVA = MODELS["llava_1_5_7b"]
WEIGHTS = "GET /bytes/.*00002-of-00003.safetensors"
SMALL = ("suite=hub", "limit=2", "model.max_new_tokens=1", "tasks=[pope]")
ONE = (*SMALL, "model=llava_1_5_7b", "pruner=none")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """One commit of every repository that `make test` needs."""
    root = tmp_path_factory.mktemp("hub")
    for config in FAMILIES:
        put_model(root, config)
    put_data(root, "pope")
    return root


@pytest.fixture(scope="module")
def all_repositories(repositories):
    """The others too, and second commits."""
    for config in (*MODELS.keys() - set(FAMILIES), "clip"):
        put_model(repositories, config)
    for task in DATA.keys() - {"pope"}:
        put_data(repositories, task)
    put_model(repositories, "llava_1_5_7b", 1)
    put_data(repositories, "gqa", number=1)
    return repositories


@pytest.fixture
def hub(repositories):
    names = [*MODELS.values(), CLIP, *(repository for repository, _ in DATA.values())]
    made = Hub(repositories, {name: commit(name) for name in names})
    yield made
    made.close()


def sweep(hub: Hub, place: Path, *overrides: str, **environment: str) -> tuple[int, str]:
    """A sweep with its results and caches in the folder `place`."""
    words = ("scripts/sweep.py", "-m", f"results={place / 'results'}", *overrides)
    return run(hub, place / "home", *words, **environment)


def records(place: Path) -> dict[str, dict]:
    """By "model/task"."""
    files = sorted((place / "results").rglob("record.json"))
    return {"/".join(file.parts[-5:-2][1:]): json.loads(file.read_text()) for file in files}


def test_every_family_runs_with_its_shipped_config(hub, tmp_path):
    """From empty caches; no login; every answer is of the commits that the record names."""
    words = ("model=" + ",".join(FAMILIES), "pruner=random", "budget=11.1%")
    code, printed = sweep(hub, tmp_path, *SMALL, *words)
    assert code == 0, printed
    assert "cells: 4 done, 0 skipped, 0 failed" in printed
    assert "HTTP" not in printed, "one line per request would hide the sweep's own"
    found = records(tmp_path)
    for config in FAMILIES:
        record = found[f"{config}/pope"]
        assert record["environment"]["weights_commit"] == commit(MODELS[config])
        assert record["identity"]["data"] == commit(POPE)
        assert record["empty_answers"] == 0


@pytest.mark.faults
class TestFaults:
    @pytest.fixture(autouse=True)
    def _repositories(self, all_repositories):
        pass

    def test_all_tasks_and_clip_from_bin_files(self, hub, tmp_path):
        words = ("suite=hub", "limit=4", "model.max_new_tokens=1", "model=llava_1_5_7b")
        code, printed = sweep(hub, tmp_path, *words, "pruner=none,cdpruner", "budget=64")
        assert code == 0, printed
        assert "cells: 12 done, 0 skipped, 0 failed" in printed
        assert any(CLIP in line and "pytorch_model.bin" in line for line in hub.requests)

    def test_the_other_sizes(self, hub, tmp_path):
        sizes = "model=llava_1_5_13b,llava_next_13b,qwen2_5_vl_3b"
        code, printed = sweep(hub, tmp_path, *SMALL, sizes, "pruner=random", "budget=11.1%")
        assert code == 0, printed
        assert "cells: 3 done" in printed

    @pytest.mark.parametrize(
        ("model", "field", "tokens"),
        [("llava_next_7b", "layout=anyres", None), ("qwen2_5_vl_7b", "image_side=1008", 1296)],
    )
    def test_fields_of_the_images(self, hub, tmp_path, model, field, tokens):
        words = (f"model={model}", f"model.{field}", "pruner=random", "budget=128")
        code, printed = sweep(hub, tmp_path, *SMALL, *words)
        assert code == 0, printed
        (record,) = records(tmp_path).values()
        assert tokens in (None, record["visual_tokens"])

    def test_lmms_evals_command_line(self, hub, tmp_path):
        """Its own loader asks for a login, also where the data are public."""
        model = f"pretrained={LLAVA},dtype=float32,device=cpu,pruner=scope,budget=64"
        code, printed = run(
            hub,
            tmp_path,
            *("-m", "lmms_eval", "--model", "secateur", "--tasks", "mmstar", "--limit", "2"),
            *("--model_args", f"{model},max_new_tokens=1", "--output_path", str(tmp_path / "out")),
            HF_TOKEN="hf_mine",
        )
        assert code == 0, printed
        assert list(tmp_path.rglob("*_results.json")), printed

    def test_main_moves_between_two_sweeps(self, hub, tmp_path):
        """Two cells, not one of both; and the cache on disk has features of both apart."""
        words = (*ONE, "cache=disk")
        assert sweep(hub, tmp_path, *words)[0] == 0
        hub.main[LLAVA] = commit(LLAVA, 1)
        _, printed = sweep(hub, tmp_path, *words)
        assert "cells: 1 done, 0 skipped, 0 failed" in printed
        files = (tmp_path / "results").rglob("record.json")
        found = {json.loads(f.read_text())["environment"]["weights_commit"] for f in files}
        assert found == {commit(LLAVA), commit(LLAVA, 1)}

    def test_main_moves_in_the_middle(self, hub, tmp_path):
        """All files are of the first commit: shards of the model, and GQA's table of images."""
        moves = {LLAVA: commit(LLAVA, 1), GQA: commit(GQA, 1)}
        hub.faults = [Fault("HEAD .*README.md", move=moves, stall=0.1)]
        code, printed = sweep(hub, tmp_path, *ONE, "tasks=[gqa]")
        assert code == 0, printed
        assert hub.main[LLAVA] == commit(LLAVA, 1)
        (record,) = records(tmp_path).values()
        assert record["environment"]["weights_commit"] == commit(LLAVA)
        assert record["identity"]["data"] == commit(GQA)
        asked = [line for line in hub.requests if "/bytes/" in line or "/resolve/" in line]
        assert not [line for line in asked if commit(LLAVA, 1) in line or commit(GQA, 1) in line]

    def test_workers_use_the_commits_of_the_sweep(self, hub, tmp_path):
        """A worker may start days later."""
        hub.faults = [Fault("GET .*README.md", move={LLAVA: commit(LLAVA, 1)}, stall=0.1)]
        hub.faults = [Fault(f"GET /api/datasets/{POPE}/revision", move={LLAVA: commit(LLAVA, 1)})]
        workers = ("hydra/launcher=gpus", "hydra.launcher.workers=2", "pruner=none,random")
        code, printed = sweep(hub, tmp_path, *ONE, *workers, "budget=64")
        assert code == 0, printed
        files = list((tmp_path / "results").rglob("record.json"))
        found = {json.loads(f.read_text())["environment"]["weights_commit"] for f in files}
        assert (len(files), found) == (2, {commit(LLAVA)})

    def test_what_is_gated_is_told_first(self, hub, tmp_path):
        """Once, with status, address and cure, before anything is downloaded."""
        hub.gated = {LLAVA, POPE}
        code, printed = sweep(hub, tmp_path, *ONE, "budget=64,32", "pruner=none,random")
        assert code == 1
        assert "Nothing was run." in printed
        for name, page in ((LLAVA, LLAVA), (POPE, f"datasets/{POPE}")):
            assert printed.count(f"{name}, revision main: its owner gives access to some") == 1
            assert f"Ask for it on {hub.url}/{page}, then run `hf auth login`" in printed
        assert f"(HTTP 401 from {hub.url}/api/models/{LLAVA}/auth-check)" in printed
        assert not [line for line in hub.requests if "/bytes/" in line]
        code, printed = sweep(hub, tmp_path, *ONE, HF_TOKEN="hf_mine")
        assert code == 0, printed

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("model.pretrained=llava-hf/llava-1.5-8b-hf", "the hub has no such repository"),
            ("model.revision=v9", "the hub has no such revision (HTTP 404 from "),
            ("suite.revision=v9", "the hub has no such revision (HTTP 404 from "),
            ("model.pretrained=my folder", "this is neither a folder here nor a name on the hub"),
        ],
    )
    def test_wrong_names(self, hub, tmp_path, override, message):
        code, printed = sweep(hub, tmp_path, *ONE, override)
        assert code == 1
        assert "REFUSED" in printed
        assert message in printed

    def test_short_failures_are_tried_again(self, hub, tmp_path):
        """A server that is busy twice, a stall, cut connections: weights and data arrive whole."""
        parquet = "GET /bytes/.*parquet"
        hub.faults = [
            Fault(WEIGHTS, status=503, times=2),
            Fault("GET /bytes/.*00001-of-00003.safetensors", cut=100_000, times=2),
            Fault("GET /bytes/.*00003-of-00003.safetensors", stall=4, times=1),
            Fault("GET /api/models", status=503, times=1),
            Fault(parquet, status=503, times=2),
            Fault(parquet, after=2, cut=1000, times=1),
            Fault(parquet, after=3, stall=4, times=1),
        ]
        seconds = {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2"}
        code, printed = sweep(hub, tmp_path, *ONE, **seconds)
        assert code == 0, printed
        assert all(hub.hits.values())

    @pytest.mark.parametrize("what", ["weights", "data"])
    def test_a_lasting_failure_has_status_and_address(self, hub, tmp_path, what):
        hub.faults = [Fault(WEIGHTS if what == "weights" else "GET /bytes/.*parquet", status=503)]
        code, printed = sweep(hub, tmp_path, *ONE)
        assert code == 1
        assert "the hub fails (HTTP 503 from " in printed

    def test_a_hub_that_is_down(self, hub, tmp_path):
        """It is told soon, with the way to go on; the cache of earlier sweeps serves."""
        code, printed = sweep(hub, tmp_path, *ONE)
        assert code == 0, printed
        hub.close()
        started = time.monotonic()
        code, printed = sweep(hub, tmp_path, *ONE, "pruner=random", "budget=64")
        assert code == 1
        assert time.monotonic() - started < 120
        assert "does not answer" in printed
        assert "set HF_HUB_OFFLINE=1, if the local cache has the model and the data" in printed
        code, printed = sweep(hub, tmp_path, *ONE, "pruner=random", "budget=64", HF_HUB_OFFLINE="1")
        assert code == 0, printed
        code, printed = sweep(hub, tmp_path, *ONE, "tasks=[gqa]", HF_HUB_OFFLINE="1")
        assert code == 1
        assert "the local cache does not have it" in printed

    def test_pinned_commits(self, hub, tmp_path):
        """Of the model, and of data whose newest commit the cache holds."""
        hub.main[LLAVA], hub.main[GQA] = commit(LLAVA, 1), commit(GQA, 1)
        words = (*ONE, "tasks=[gqa]", f"model.revision={commit(LLAVA)}")
        code, printed = sweep(hub, tmp_path, *words, f"suite.revision={commit(GQA)}")
        assert code == 0, printed
        (record,) = records(tmp_path).values()
        assert record["environment"]["weights_commit"] == commit(LLAVA)
        assert record["identity"]["data"] == commit(GQA)
        hub.close()
        words = (*words, f"suite.revision={commit(GQA, 1)}")
        code, printed = sweep(hub, tmp_path, *words, HF_HUB_OFFLINE="1")
        assert code == 1
        assert f"the local cache has commit {commit(GQA)}" in printed

    def test_a_page_of_html_is_no_hub(self, hub, tmp_path):
        hub.faults = [Fault(".", html=True)]
        code, printed = sweep(hub, tmp_path, *ONE)
        assert code == 1
        assert "such as the login page of a network or a proxy" in printed
        assert "Traceback" not in printed

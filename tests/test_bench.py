"""The benchmark: what it measures and refuses, and that its marks change nothing."""

import contextlib
import dataclasses
import math
import sys
import time
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_inject import hooks

from scripts import bench as script
from scripts import bundle_gpu, gpu_check
from secateur.budget import Budget
from secateur.efficiency import hardware, latency, serving
from secateur.efficiency.bench import Bench, Plan, Setting
from secateur.efficiency.bench_report import figure, markdown, write
from secateur.efficiency.bench_stats import published, summarise
from secateur.efficiency.latency import PHASES, ClockJumped, Timeline, ceiling_prompt, phases
from secateur.geometry import config_of, tiny
from secateur.injection import inject
from secateur.pruners import REGISTRY, build

PLAN = Plan(
    torch.device("cpu"),
    "float32",
    "sdpa",
    "tiny",
    prompts=3,
    text=(6, 5),
    new_tokens=3,
    warm_up=1,
    timed=4,
    seed=0,
)
FAMILIES = {
    "llava": {},
    "llava_next": {"layout": "fixed2880"},
    "qwen2_vl": {"image_side": 168},
    "qwen2_5_vl": {"image_side": 168},
    "qwen3_vl": {"image_side": 192},
    "internvl": {},
}
METHODS = [build("divprune"), build("fastv", layer=1)]


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request):
    return Bench(request.param, tiny(request.param), PLAN, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def llava():
    return Bench("llava_1_5_7b", tiny("llava"), PLAN)


@pytest.fixture(scope="module")
def samples(llava):
    settings = llava.settings(METHODS, [Budget(8), Budget(2)])
    found, left_out, failed = llava.run(settings, time.monotonic() + 100, lambda: None)
    assert not failed
    found.attrs["left_out"] = left_out
    return found


class TestSamples:
    def test_every_setting_runs_once_per_round_in_changing_order(self, samples):
        assert (
            samples.groupby(["method", "budget"])["round"].agg(list).map(sorted).tolist()
            == [[0, 1, 2, 3]] * 6
        )
        orders = samples.sort_values("place").groupby("round")[["method", "budget"]].agg(list)
        assert len(set(orders.astype(str).agg("".join, axis=1))) > 1
        assert set(samples["place"]) == set(range(6))
        assert set(samples["prompt"]) == {0, 1, 2}

    def test_phases_add_up_to_the_first_token(self, samples):
        assert np.allclose(samples[list(PHASES)].sum(axis=1), samples["first_token"])
        assert (samples[[*PHASES, "decode"]] >= 0).all(axis=None)
        assert (samples[["vision", "prefill", "rest", "decode"]] > 0).all(axis=None)
        spent = samples.groupby("kind")["selection"].median()
        assert spent["pruned"] > 2 * spent[["unpruned", "ceiling"]].max()

    def test_a_budget_that_no_schedule_has_is_left_out_by_name(self, samples):
        (name, cause), *others = samples.attrs["left_out"].items()
        assert (name, others) == ("llava_1_5_7b fastv layer=1 2", [])
        assert "cannot average 2 tokens" in cause
        assert name not in set(samples["method"])

    def test_caches_are_measured_layer_by_layer(self, samples):
        position = 2 * 4 * 16 * 4  # keys and values, heads, their width, float32
        text = 6 + 5 + 1  # with the token that begins a prompt
        held = samples.groupby(["method", "budget"])["kv_bytes"].first()
        assert list(held["unpruned", 16]) == [position * (text + 16)] * 4
        assert list(held["ceiling", 8]) == list(held["divprune", 8]) == [position * (text + 8)] * 4
        assert list(held["fastv layer=1", 8]) == [
            position * (text + tokens) for tokens in (16, 5, 5, 5)
        ]

    def test_flops_are_of_the_tokens_that_were_processed(self, samples):
        tokens = samples.groupby(["method", "budget"])[
            ["tokens_in", "tokens", "text_tokens", "macs_visual"]
        ].first()
        assert tokens.loc[("fastv layer=1", 8)].tolist()[:3] == [16, 31 / 4, 12]
        assert tokens.loc[("divprune", 8)].tolist()[:3] == [8, 8, 12]
        layer = 8 * (4 * 64 * 64 + 3 * 64 * 160) + 2 * 8 * 8 * 64  # multiply-adds of 8 tokens
        assert (
            tokens.loc[("divprune", 8), "macs_visual"]
            == 4 * layer
            == tokens.loc[("ceiling", 8), "macs_visual"]
        )

    def test_a_method_that_fails_does_not_stop_the_others(self, llava, capsys):
        broken = Setting("pruned", 8, build("cdpruner"))  # needs a CLIP, which is missing
        whole = Setting("unpruned", 16)
        found, _, failed = llava.run([broken, whole], time.monotonic() + 100, lambda: None)
        assert set(found["method"]) == {"unpruned"}
        assert failed["llava_1_5_7b cdpruner 8"].startswith(
            "ValueError: pruner 'cdpruner' compares with the question in CLIP's space"
        )
        assert "Traceback" in capsys.readouterr().err

    def test_no_round_begins_after_the_deadline(self, llava):
        found, _, _ = llava.run(llava.settings([], [Budget(8)]), time.monotonic() - 1, lambda: None)
        assert found.empty


class TestMarks:
    @pytest.mark.parametrize("pruner", [None, *METHODS], ids=["unpruned", "divprune", "fastv"])
    def test_marks_change_nothing_and_leave_nothing(self, bench, pruner):
        inputs, _ = bench.prompts[0]
        steps = {
            "do_sample": False,
            "max_new_tokens": 3,
            "min_new_tokens": 3,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        keep = bench.tokens if pruner is None else bench.tokens // 2
        plain = (
            ceiling_prompt(bench.adapter, inputs, keep)
            if pruner is None
            else inject(bench.model, pruner, keep, layout=bench.layout)
        )
        with plain as opened:
            expected = bench.model.generate(**(opened if pruner is None else inputs), **steps)
        before = hooks(bench.model)
        with bench._ready(Setting("pruned", keep, pruner), 0) as (ready, trace):
            bench.timeline.start()
            found = bench.model.generate(**ready, **steps)
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
        assert (trace is None) == (pruner is None)
        assert "get_image_features" not in vars(bench.adapter.core)
        assert hooks(bench.model) == before

    def test_phases_of_known_marks(self):
        prompt = [
            ("call", 0),
            ("vision", 1),
            ("vision end", 11),
            ("images", 0.5),
            ("images end", 12),
            ("entry", 15),
            ("prefill", 17),
        ]
        inside = [
            ("cut", 20),
            ("cut end", 23),
            ("cut", 30),
            ("cut end", 31),
            ("prefill end", 50),
            ("token", 55),
        ]
        step = [("entry", 60), ("prefill", 61), ("cut", 62), ("cut end", 63), ("prefill end", 64)]
        found = phases([*prompt, *inside, *step, ("token", 65), *step, ("token", 85)])
        assert found == {
            "vision": 10,
            "captures": 1.5,
            "selection": 2 + 3 + 1,
            "prefill": 33 - 4,
            "rest": 55 - 10 - 1.5 - 6 - 29,
            "first_token": 55,
            "decode": 15,
        }
        assert math.isnan(phases([*prompt, *inside])["decode"])


class TestCeiling:
    def test_the_language_model_gets_the_first_tokens_and_the_text(self, bench):
        seen = []
        hook = bench.adapter.language_model.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        inputs, _ = bench.prompts[0]
        keep = bench.tokens // 2
        bench.model(**inputs)
        with ceiling_prompt(bench.adapter, inputs, keep) as fewer:
            bench.model(**fewer)
        hook.remove()
        visual = inputs["input_ids"][0] == bench.adapter.image_token_id
        stays = ~visual | (visual.cumsum(0) <= keep)
        assert int(stays.sum()) == int((~visual).sum()) + keep
        assert torch.equal(seen[1], seen[0][stays])

    def test_all_places_are_the_unpruned_model(self, llava):
        inputs, _ = llava.prompts[0]
        with ceiling_prompt(llava.adapter, inputs, 16) as same:
            assert same is inputs
            assert "get_image_features" not in vars(llava.adapter.core)

    def test_more_tokens_than_places_are_refused(self, llava):
        with (
            pytest.raises(ValueError, match="17 visual tokens do not fit into the 16 places"),
            ceiling_prompt(llava.adapter, llava.prompts[0][0], 17),
        ):
            pass


class TestRefused:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("timed", 1, "timed=1: at least 2"),
            ("text", (4, 0), "text_tokens="),
            ("dtype", "half precision", "is no dtype of torch"),
        ],
    )
    def test_plans_that_make_no_sense(self, field, value, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(PLAN, **{field: value})

    def test_a_kernel_that_is_not_installed(self):
        plan = dataclasses.replace(PLAN, attn_implementation="flash_attention_2")
        with pytest.raises(
            ValueError, match="attn_implementation=flash_attention_2 is not possible here"
        ):
            Bench("llava", tiny("llava"), plan)

    def test_a_budget_above_the_tokens(self, llava):
        with pytest.raises(ValueError, match="only 16 visual tokens"):
            llava.settings(METHODS, [Budget(17)])

    def test_cuda_where_there_is_none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="finds no CUDA device"):
            hardware.find_device("cuda")

    @pytest.mark.parametrize("ticks", [[1.0, 2.0, 1.5], [1.0, math.nan]])
    def test_a_clock_that_jumps(self, monkeypatch, ticks):
        timeline, clock = Timeline(torch.device("cpu")), iter(ticks)
        monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
        timeline.start()
        for name in "ab"[: len(ticks) - 1]:
            timeline.mark(name)
        with pytest.raises(ClockJumped, match="the clock jumped"):
            timeline.read()

    def test_events_of_a_gpu_are_read_beside_the_host(self, monkeypatch):
        class Event:
            clock = iter([100.0, 103.0, 110.0])

            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                assert stream == "stream"
                self.at = next(self.clock)

            def elapsed_time(self, later):
                return later.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        host = iter([5.000, 5.001, 5.011])
        monkeypatch.setattr(latency.time, "perf_counter", lambda: next(host))
        timeline = Timeline(torch.device("cuda"))
        timeline.start()
        timeline.mark("vision")
        timeline.mark("token")
        assert timeline.read() == [("call", 0.0), ("vision", 3.0), ("token", 10.0)]

    def test_clocks_that_disagree(self):
        assert latency._checked([("call", 0.0), ("token", 100.0)], 102.0)
        with pytest.raises(ClockJumped, match=r"device says 100.000 ms and the host 150.000 ms"):
            latency._checked([("call", 0.0), ("token", 100.0)], 150.0)

    @pytest.mark.parametrize("column", ["dtype", "attn_implementation", "device", "torch"])
    def test_samples_of_different_runs_are_not_averaged(self, samples, column):
        mixed = pd.concat(
            [samples, samples.assign(**{column: "another", "round": samples["round"] + 4})]
        )
        with pytest.raises(ValueError, match=f"samples of {column} .* cannot be compared"):
            summarise(mixed)

    @pytest.mark.parametrize("kind", ["unpruned", "ceiling"])
    def test_nothing_to_compare_with(self, samples, kind):
        with pytest.raises(ValueError, match="nothing to compare with"):
            summarise(samples[samples["kind"] != kind])

    def test_rounds_that_lack_a_setting(self, samples):
        with pytest.raises(
            ValueError, match="has 3 samples of 4 rounds; every round measures all once"
        ):
            summarise(samples.drop(index=samples.index[-1]))


class TestSharedGPU:
    @pytest.fixture
    def gpu(self, monkeypatch):
        """A stand-in for NVML with one GPU."""
        state = types.SimpleNamespace(pids=[], used=6e8, asked=None)
        nvml = types.ModuleType("pynvml")

        def by(kind):
            def handle(name):
                state.asked = (kind, name)

            return handle

        nvml.NVMLError, nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, nvml.NVML_TEMPERATURE_GPU = (
            RuntimeError,
            1,
            2,
            0,
        )
        nvml.nvmlInit = lambda: None
        nvml.nvmlDeviceGetHandleByIndex, nvml.nvmlDeviceGetHandleByUUID = by("index"), by("uuid")
        nvml.nvmlSystemGetDriverVersion = lambda: "580.1"
        nvml.nvmlDeviceGetClockInfo = lambda _gpu, clock: {1: 1980, 2: 3201}[clock]
        nvml.nvmlDeviceGetPowerUsage = lambda _gpu: 120_500
        nvml.nvmlDeviceGetTemperature = lambda _gpu, _sensor: 40
        nvml.nvmlDeviceGetMemoryInfo = lambda _gpu: types.SimpleNamespace(used=state.used)
        nvml.nvmlDeviceGetComputeRunningProcesses = lambda _gpu: [
            types.SimpleNamespace(pid=pid) for pid in state.pids
        ]
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return state

    cuda = torch.device("cuda")

    def test_alone(self, gpu):
        hardware.check_alone(self.cuda)
        assert hardware.snapshot(self.cuda) == {
            "driver": "580.1",
            "sm_clock_mhz": 1980,
            "memory_clock_mhz": 3201,
            "power_w": 120.5,
            "temperature_c": 40,
            "memory_used_gb": 0.6,
            "processes": [],
        }

    @pytest.mark.parametrize(
        ("visible", "asked"),
        [("3,1", ("index", 3)), ("GPU-ab", ("uuid", "GPU-ab")), (None, ("index", 0))],
    )
    def test_the_gpu_that_torch_sees(self, gpu, monkeypatch, visible, asked):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        hardware.snapshot(self.cuda)
        assert gpu.asked == asked

    def test_with_another_process(self, gpu):
        gpu.pids = [4242]
        with pytest.raises(hardware.SharedGPU, match=r"processes 4242 use the GPU.*shared=true"):
            hardware.check_alone(self.cuda)

    def test_with_memory_that_another_process_holds(self, gpu):
        gpu.used = 30e9
        with pytest.raises(
            hardware.SharedGPU, match=r"not visible from here use the GPU \(30.0 GB held\)"
        ):
            hardware.check_alone(self.cuda)

    def test_without_nvml(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        with pytest.raises(hardware.SharedGPU, match="nvidia-ml-py is not installed"):
            hardware.check_alone(self.cuda)


class TestReport:
    def test_medians_and_speed_ups(self, samples):
        fixed = samples.assign(first_token=samples["round"] + 10.0)
        fixed.loc[fixed["kind"] == "unpruned", "first_token"] *= 4
        fixed.loc[fixed["kind"] == "ceiling", "first_token"] *= 0.5
        row = summarise(fixed).set_index(["method", "budget"]).loc[("divprune", 8)]
        assert row[["first_token", "first_token_q1", "first_token_q3"]].tolist() == [
            11.5,
            10.75,
            12.25,
        ]
        assert row["first_token_p95"] == pytest.approx(12.85)
        assert row[["speed_up", "speed_up_low", "speed_up_high"]].tolist() == [
            4,
            4,
            4,
        ]  # paired by round: no spread
        assert (row["of_ceiling"], row["ceiling_speed_up"], row["samples"]) == (0.5, 8, 4)

    def test_intervals_hold_the_ratio(self, samples):
        for row in summarise(samples).itertuples():
            assert row.speed_up_low <= row.speed_up <= row.speed_up_high

    def test_rows_come_in_order(self, samples):
        found = summarise(samples)[["method", "budget"]].to_numpy().tolist()
        assert found[:4] == [
            ["unpruned", 16],
            ["ceiling", 8],
            ["divprune", 8],
            ["fastv layer=1", 8],
        ]

    def test_published_numbers_are_beside_ours_at_true_geometry_only(self, samples):
        reduced = summarise(samples)
        assert published(reduced)["ours"].isna().all()
        true = reduced.assign(geometry="true", budget=64, kv_mb=32.5)
        table = published(true[true["pruner"] == "fastv"])
        printed = table[(table["method"] == "fastv") & (table["quantity"] == "kv_cache")]
        assert printed[["unit", "printed", "ours"]].to_numpy().tolist() == [["MB", 32.1, 32.5]]

    def test_table_says_what_is_missing(self, samples):
        text = markdown(summarise(samples.assign(asked=30)), samples)
        assert "**Only 4 of the 30 rounds asked for" in text
        assert "- llava_1_5_7b fastv layer=1 2: pruner 'fastv'" in text
        assert "Reduced geometry" in text

    def test_raw_samples_give_the_same_table_again(self, samples, tmp_path):
        write(samples, pd.DataFrame(), tmp_path / "bench-cpu", tmp_path)
        again = pd.read_parquet(tmp_path / "bench-cpu.parquet")
        assert markdown(summarise(again), again) == (tmp_path / "bench-cpu.md").read_text()
        assert {path.name for path in tmp_path.iterdir()} == {
            *(f"bench-cpu.{suffix}" for suffix in ("parquet", "csv", "md")),
            "bench_cpu_llava_1_5_7b.png",
        }

    def test_figure_holds_every_setting(self, samples):
        summary = summarise(samples)
        left, right = figure(summary).axes
        assert [label.get_text() for label in left.get_yticklabels()] == [
            "unpruned",
            "ceiling, 8",
            "divprune, 8",
            "fastv layer=1, 8",
            "ceiling, 2",
            "divprune, 2",
        ]
        (points, *_), *_ = right.containers
        assert points.get_xdata().tolist() == summary["speed_up"].tolist()


class TestServing:
    def test_batches_hold_a_cache_for_each_request(self, llava):
        settings = [
            one for one in llava.settings(METHODS, [Budget(8), Budget(2)]) if one.kind != "ceiling"
        ]
        load = serving.Load((1, 3), new_tokens=3, warm_up=0, timed=2)
        samples, left_out = serving.serve(
            llava, settings, load, time.monotonic() + 100, lambda: None
        )
        assert list(left_out) == [
            "llava_1_5_7b fastv layer=1 2, batch 1",
            "llava_1_5_7b fastv layer=1 2, batch 3",
        ]
        found = serving.summarise(samples).set_index(["batch", "method", "budget"])
        assert found.index.tolist() == [
            (batch, *one)
            for batch in (1, 3)
            for one in (("unpruned", 16), ("divprune", 8), ("fastv layer=1", 8), ("divprune", 2))
        ]
        kv = found["kv_mb"] * 2**20
        whole, half, few = kv[1, "unpruned", 16], kv[1, "divprune", 8], kv[1, "divprune", 2]
        assert (whole - half) / (half - few) == 8 / 6
        assert kv[3, "divprune", 2] == 3 * kv[1, "divprune", 2]
        assert found.loc[(3, "unpruned", 16), ["speed_up", "speed_up_low"]].tolist() == [1, 1]
        assert "| unpruned" in serving.markdown(serving.summarise(samples))

    @pytest.mark.parametrize("field", ["batches", "new_tokens", "timed"])
    def test_a_load_that_makes_no_sense(self, field):
        usual = {"batches": (1,), "new_tokens": 2, "warm_up": 0, "timed": 2}
        with pytest.raises(ValueError, match=f"serving.{field}"):
            serving.Load(**usual | {field: (0,) if field == "batches" else 0})


class TestScripts:
    @pytest.fixture
    def settings(self, tmp_path):
        quick = [
            "methods=[divprune,cdpruner]",
            "models=[{name: llava_1_5_7b, budgets: [64]}]",
            "layers=2",
            "prompts=2",
            "warm_up=1",
            "serving={batches: [1, 2], new_tokens: 2, warm_up: 0, timed: 2}",
        ]
        with initialize_config_dir(
            str(Path(script.__file__).parents[1] / "configs"), version_base="1.3"
        ):
            composed = compose(
                "bench_cpu", [*quick, "timed=2", "new_tokens=1", f"results={tmp_path}"]
            )
            yield OmegaConf.to_container(composed) | {"results": str(tmp_path)}

    def test_the_benchmark_writes_everything(self, settings, tmp_path, capsys):
        assert script.measure(settings) == []
        stored = pd.read_parquet(tmp_path / "bench/bench-cpu.parquet")
        assert set(stored["method"]) == {
            "unpruned",
            "ceiling",
            "divprune",
            "cdpruner relevance_space=llm_embed",
        }
        assert set(stored["geometry"]) == {"2 layers, widths / 16"}
        text = (tmp_path / "bench/bench-cpu.md").read_text()
        (tmp_path / "bench/bench-cpu.md").unlink()
        script.report(
            {"report": str(tmp_path / "bench/bench-cpu.parquet"), "results": str(tmp_path)}
        )
        assert (tmp_path / "bench/bench-cpu.md").read_text() == text
        assert (tmp_path / "figures/bench_cpu_llava_1_5_7b.png").exists()
        served = pd.read_csv(tmp_path / "bench/bench-cpu-serving.csv").set_index("batch")
        assert served.groupby("batch").size().tolist() == [3, 3]
        assert not list(tmp_path.glob("*/*incomplete*"))
        printed = capsys.readouterr().out
        assert "llava_1_5_7b" in printed
        assert "divprune" in printed

    def test_an_incomplete_run_replaces_no_complete_one(self, settings, tmp_path, monkeypatch):
        (tmp_path / "bench").mkdir()
        complete = tmp_path / "bench/bench-cpu.md"
        complete.write_text("complete")
        monkeypatch.setattr(serving, "serve", lambda *_: (pd.DataFrame(), {}))
        assert script.measure(settings) == [
            "llava_1_5_7b in batches: 0 of 2 rounds, the 15 minutes were over"
        ]
        assert complete.read_text() == "complete"
        assert "first token" in (tmp_path / "bench/bench-cpu-incomplete.md").read_text()

    def test_the_benchmark_says_what_it_had_no_time_for(self, settings):
        assert script.measure(settings | {"minutes": -1}) == [
            "llava_1_5_7b: not begun, the -1 minutes were over"
        ]

    def test_methods_have_the_fields_of_a_sweep_except_clip(self):
        with initialize_config_dir(
            str(Path(script.__file__).parents[1] / "configs"), version_base="1.3"
        ):
            gpu, cpu = (dict(compose(name)) for name in ("bench", "bench_cpu"))
            layout, (cdpruner, visionzip) = script._composed(
                "qwen2_5_vl_7b", gpu | {"methods": ["cdpruner", "visionzip"]}
            )
            assert (layout, cdpruner.relevance_space, visionzip.keep_cls) == (
                None,
                "llm_embed",
                False,
            )
            assert (
                script._composed("llava_next_7b", gpu | {"methods": ["sppruner"]})[0] == "fixed2880"
            )
        assert {*gpu["methods"], *cpu["methods"]} <= set(REGISTRY)
        for model in [*gpu["models"], *cpu["models"]]:
            assert config_of(model["name"])

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_gpu_check_passes_on_tiny_models(self, monkeypatch, tmp_path, dtype):
        command = [
            "gpu_check",
            "--device",
            "cpu",
            "--dtype",
            dtype,
            "--tiny",
            "--out",
            str(tmp_path),
        ]
        monkeypatch.setattr(sys, "argv", command)
        gpu_check.main()
        assert (tmp_path / f"check-cpu-{dtype}.md").read_text().count("True") == 6

    def test_gpu_check_notices_another_subset(self, monkeypatch, tmp_path):
        @contextlib.contextmanager
        def shifted(*args):
            with inject(*args) as trace:
                yield trace
            last = trace.audits[-1]
            if len(last.kept_indices[0]) < last.visual_tokens[0]:
                trace.audits[0] = dataclasses.replace(
                    last, kept_indices=(tuple(i - 1 for i in last.kept_indices[0]),)
                )

        monkeypatch.setattr(gpu_check, "inject", shifted)
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "gpu_check",
                "--device",
                "cpu",
                "--dtype",
                "bfloat16",
                "--tiny",
                "--out",
                str(tmp_path),
            ],
        )
        with pytest.raises(SystemExit, match="further from what it must compute"):
            gpu_check.main()

    def test_the_bundle_holds_what_is_installed_here(self):
        names = [
            *bundle_gpu.LMMS_EVAL,
            *bundle_gpu.PYDANTIC,
            *bundle_gpu.TABLES,
            *bundle_gpu.DATASETS,
            *bundle_gpu.HYDRA,
        ]
        assert all(bundle_gpu.version(name) for name in (*names, *bundle_gpu.SOURCE_ONLY))

"""The device a bench runs on: what it is, how it stands, and whether it is ours alone."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

IDLE_GB = 2.0  # what a driver holds on a GPU that nobody uses stays below


class SharedGPU(RuntimeError):
    """Others use the GPU, or nobody can tell."""


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name}, but torch {torch.__version__} finds no CUDA device; the bench of a CPU at reduced geometry is "
            "`make bench`"
        )
    return device


def check_alone(device: torch.device) -> None:
    """Refuse a GPU that others use. To be called before this process has anything there.

    Raises:
        SharedGPU: another process, memory that one holds unseen, or no NVML to tell.
    """
    if device.type != "cuda":
        return
    state = snapshot(device)
    if "missing" in state:
        raise SharedGPU(
            f"whether other processes use the GPU cannot be told: {state['missing']}. Or set shared=true"
        )
    others = [pid for pid in state["processes"] if pid != os.getpid()]
    if others or state["memory_used_gb"] > IDLE_GB:
        who = (
            f"processes {', '.join(map(str, others))}"
            if others
            else "processes that are not visible from here"
        )
        raise SharedGPU(
            f"{who} use the GPU ({state['memory_used_gb']:.1f} GB held): times would be theirs too. Wait, choose another with "
            "CUDA_VISIBLE_DEVICES, or set shared=true to measure nevertheless"
        )


def snapshot(device: torch.device) -> dict[str, Any]:
    """How the device stands now: on a GPU clocks, power, temperature, memory and processes by NVML, on a CPU threads and load.

    `missing` says why there is no more.
    """
    if device.type != "cuda":
        return {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2)}
    try:
        import pynvml as nvml
    except ModuleNotFoundError:
        return {"missing": "the package nvidia-ml-py is not installed"}
    try:
        nvml.nvmlInit()
        gpu = _handle(nvml, device)
        running = nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        return {
            "driver": str(nvml.nvmlSystemGetDriverVersion()),
            "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            "power_w": nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
            "temperature_c": nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            "memory_used_gb": nvml.nvmlDeviceGetMemoryInfo(gpu).used / 1e9,
            "processes": [process.pid for process in running],
        }
    except nvml.NVMLError as error:
        return {"missing": f"NVML answers {error}"}


def _handle(nvml: Any, device: torch.device) -> Any:
    """NVML counts all GPUs, torch those of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = str(device.index or 0) if not visible else visible.split(",")[device.index or 0].strip()
    return (
        nvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.isdigit()
        else nvml.nvmlDeviceGetHandleByUUID(name)
    )


def describe(device: torch.device) -> str:
    """The device by name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = []
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
    return f"CPU {names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

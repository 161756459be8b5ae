"""The device of a benchmark: its name, its state, and whether other processes use it."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

IDLE_GB = 2.0  # on a GPU that nobody uses, the driver holds less memory than this


class SharedGPU(RuntimeError):
    """Other processes use the GPU, or it cannot be determined whether they do."""


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name}, but torch {torch.__version__} finds no CUDA device; `make bench` is "
            "the benchmark for a CPU, at reduced geometry"
        )
    return device


def check_alone(device: torch.device) -> None:
    """Refuse a GPU that others use. Call this before this process uses the GPU.

    Raises:
        SharedGPU: another process is there, memory is held by a process that cannot be seen, or
            NVML is missing.
    """
    if device.type != "cuda":
        return
    state = snapshot(device)
    if "missing" in state:
        raise SharedGPU(
            "it cannot be determined whether other processes use the GPU: "
            f"{state['missing']}. Mend that, or set shared=true to measure all the same"
        )
    others = [pid for pid in state["processes"] if pid != os.getpid()]
    if others or state["memory_used_gb"] > IDLE_GB:
        who = (
            f"processes {', '.join(map(str, others))}"
            if others
            else "processes that are not visible from here"
        )
        raise SharedGPU(
            f"{who} use the GPU ({state['memory_used_gb']:.1f} GB held) and would change the "
            "times. Wait, choose another GPU with CUDA_VISIBLE_DEVICES, or set shared=true to "
            "measure all the same"
        )


def snapshot(device: torch.device) -> dict[str, Any]:
    """The state of the device now.

    For a GPU: clocks, power, temperature, memory and processes, from NVML; if NVML does not answer,
    only `missing`, which says why. For a CPU: threads and load.
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
    """NVML's handle. NVML numbers all GPUs; torch numbers those of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = str(device.index or 0) if not visible else visible.split(",")[device.index or 0].strip()
    return (
        nvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.isdigit()
        else nvml.nvmlDeviceGetHandleByUUID(name)
    )


def describe(device: torch.device) -> str:
    """The name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = []
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU {name}, {torch.get_num_threads()} threads"

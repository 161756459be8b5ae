"""Download the wheels that a GPU machine without a network lacks: about 29 MB.

    python scripts/bundle_gpu.py wheels        here: into the folder wheels

and there:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 scripts/bench.py

That machine must have torch, torchvision, transformers, pandas, scipy, pyarrow, matplotlib, rich,
tabulate and what these need. The wheels have the versions of the environment that runs this script.
They leave out av, which qwen-vl-utils needs for videos alone.
"""

import argparse
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from secateur.paths import ROOT

LMMS_EVAL = [
    "lmms-eval",
    "chardet",
    "defusedxml",
    "evaluate",
    "loguru",
    "numexpr",
    "python-dotenv",
    "pytz",
    "qwen-vl-utils",
]
LMMS_EVAL += ["tenacity", "wcwidth", "zstandard"]
PYDANTIC = ["pydantic", "pydantic-core", "annotated-types", "typing-inspection"]
TABLES = [
    "pytablewriter",
    "dataproperty",
    "mbstrdecoder",
    "pathvalidate",
    "tabledata",
    "tcolorpy",
    "typepy",
]  # of lmms-eval
DATASETS = ["datasets", "dill", "multiprocess"]
HYDRA = ["hydra-core", "omegaconf"]
SOURCE_ONLY = ["antlr4-python3-runtime"]  # of omegaconf; pure Python, built here
PLATFORMS = [
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_17",
    "manylinux2014",
    "manylinux1",
    "linux",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--python", default="3.12", help="Python of that machine (default: 3.12)")
    parser.add_argument(
        "--machine", default="x86_64", help="processor of that machine (default: x86_64)"
    )
    options = parser.parse_args()

    options.folder.mkdir(parents=True, exist_ok=True)
    common = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    there = ["--only-binary=:all:", "--implementation=cp", f"--python-version={options.python}"]
    there += [f"--platform={platform}_{options.machine}" for platform in PLATFORMS]
    ready = [
        f"{name}=={version(name)}" for name in (*LMMS_EVAL, *PYDANTIC, *TABLES, *DATASETS, *HYDRA)
    ]
    source = [f"{name}=={version(name)}" for name in SOURCE_ONLY]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "download", *common, *there, "--dest", str(options.folder), *ready], check=True
    )
    subprocess.run(
        [*pip, "wheel", *common, "--wheel-dir", str(options.folder), *source, str(ROOT)], check=True
    )
    wheels = list(options.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{options.folder}: {len(wheels)} wheels, {size:.0f} MB")


if __name__ == "__main__":
    main()

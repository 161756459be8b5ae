"""The project's environment .venv, exactly as requirements.lock names it. `make` calls this.

    python3 scripts/environment.py                    create or renew .venv
    .venv/bin/python scripts/environment.py --check   is .venv still what the lock names?
    .venv/bin/python scripts/environment.py --moved   versions that differ from the lock

Without an option only the standard library is used, because nothing is installed yet.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
READY = VENV / "ready"  # the file whose date make compares
UV = "0.13.9"  # the installer; the lock is made with the same one
OLDEST, NEWEST = (3, 11), (3, 14)


class Unusable(Exception):
    """The environment cannot be created or used; the message says why and what to do."""


def make() -> None:
    """Create .venv if it is missing or broken, and install the lock and the project into it.

    Raises:
        Unusable: this Python is not supported, or an installation failed.
    """
    require_supported(sys.version_info[:2])
    READY.unlink(missing_ok=True)
    python = VENV / "bin" / "python"
    pip_works = [str(python), "-m", "pip", "--version"]
    if not python.exists() or subprocess.run(pip_works, capture_output=True).returncode:
        _run(sys.executable, "-m", "venv", "--clear", VENV)
    # uv has a folder of its own, because it removes packages that the lock does not name
    tools = VENV / "tools"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not (tools / f"uv-{UV}.dist-info").exists():
        _run(*pip, "--upgrade", "--target", tools, f"uv=={UV}")
    uv = [tools / "bin" / "uv", "pip"]
    here = ["--quiet", "--python", python]
    # compiled once here, instead of in every process that may not write beside the modules
    _run(*uv, "sync", *here, "--compile-bytecode", "--require-hashes", "requirements.lock")
    _run(*uv, "install", *here, "--no-deps", "--no-build-isolation", "--editable", ".")
    READY.touch()


def require_supported(version: "tuple[int, int]") -> None:
    """Raise Unusable for a Python that is too old or untested."""
    if not OLDEST <= version <= NEWEST:
        raise Unusable(
            "Secateur is tested on Python {}.{} to {}.{}, and this is Python {}.{}. Choose another "
            "one: make sweep PYTHON3=python3.12".format(*OLDEST, *NEWEST, *version)
        )


def check() -> None:
    """Compare .venv with the lock.

    Raises:
        Unusable: a package is missing, has another version or was edited; or the lock does not
            meet a requirement of pyproject.toml.
    """
    import tomllib

    try:
        from secateur.lock import problems, unmet
    except ModuleNotFoundError as error:
        raise Unusable(
            f".venv is not complete ({error}). Delete the folder and run make again."
        ) from error
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if lines := unmet(pyproject):
        raise Unusable(f"{'; '.join(lines)}. Run make lock, which renews the lock and tests it.")
    if found := problems():
        raise Unusable(
            f".venv is no longer what requirements.lock names: {'; '.join(found)}. Delete .venv "
            "and run the command again. For other versions use an environment of your own with "
            "PYTHON=...; its records name them."
        )


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    if subprocess.run(words, cwd=ROOT).returncode:
        raise Unusable(
            f"the environment could not be finished: {' '.join(words)} failed, and the lines above "
            "say why. Remove the cause (no network? disk full?) and run the same make command "
            "again; nothing needs to be deleted."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare .venv with the lock")
    what.add_argument(
        "--moved", action="store_true", help="print versions that differ from the lock"
    )
    options = parser.parse_args()
    try:
        if options.moved:
            from secateur.lock import differences

            moved = [f"{name}: {versions}" for name, versions in differences().items()]
            print("\n".join(moved or ["nothing"]))
        elif options.check:
            check()
        else:
            make()
    except Unusable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

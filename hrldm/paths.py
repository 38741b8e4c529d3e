"""The only module that knows folders. Everything else receives paths or asks here.

``python hrldm/paths.py PROFILE DATASET DATA_ROOT SEED SET CACHE RESULTS`` runs `check_run` for the Makefile,
``--stamp DATA_ROOT`` runs `stamp`. Standard library only: it runs before the environment exists.
"""

import csv
import hashlib
import io
import os
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
WEIGHTS = PACKAGE / "weights"  # shipped safetensors with their cards
PUBLISHED = ROOT / "results" / "published"  # the paper's own numbers as CSV
EMBEDDED = "lidc-mini"  # the dataset that needs no folder
FILES = ("image", "mask", "background")  # columns of a manifest that name files
_OUTPUTS = {"HRLDM_CACHE": ".cache", "HRLDM_RESULTS": "results"}  # environment variable: default folder
RADIMAGENET, MAISI = "HRLDM_RADIMAGENET", "HRLDM_MAISI"
# environment variables that name the user's own weight files
_WEIGHT_FILES = {RADIMAGENET: "RadImageNet's ResNet-50 weights", MAISI: "MAISI's autoencoder_v1.pt"}


def cache_dir() -> Path:
    """Folder for everything that can be regenerated (`HRLDM_CACHE`, default `.cache/`)."""
    return _made(_output("HRLDM_CACHE"))


def results_dir(dataset: str, profile: str) -> Path:
    """`results/<dataset>/<profile>/` with its `tables`, `figures` and `runs` folders."""
    path = _output("HRLDM_RESULTS") / dataset / profile
    for sub in ("tables", "figures", "runs"):
        _made(path / sub)
    return path


def run_name(profile: str, settings: str) -> str:
    """The profile's name, with a short hash of what SET changed: those results get a folder of their own."""
    words = " ".join(sorted(settings.split()))
    return f"{profile}-{hashlib.sha256(words.encode()).hexdigest()[:6]}" if words else profile


def bench_dir() -> Path:
    """`results/bench/`, where `make bench` writes."""
    return _made(_output("HRLDM_RESULTS") / "bench")


def check_run(profile: str, dataset: str, data_root: str) -> str:
    """Check a run's settings and return its absolute `data_root` ("" for the embedded dataset); nothing is written.

    Raises:
        ValueError: invalid folder names, a data folder without a dataset name or vice versa, no manifest there, or an
            output folder that cannot be written.
    """
    for option, name in (("PROFILE", profile), ("DATASET", dataset)):
        if not re.fullmatch(r"\w[\w.-]*", name):
            allowed = "letters, digits, dots, hyphens and underscores, a letter or digit first"
            raise ValueError(f"{option} {name!r} names a folder of results: use {allowed}")
    for variable, what in _WEIGHT_FILES.items():
        if (weights := os.environ.get(variable)) and not Path(weights).is_file():
            raise ValueError(f"{variable} {weights}: no such file; give {what}, or unset it")
    for variable in _OUTPUTS:
        _output(variable)
    if dataset == EMBEDDED:
        if data_root:
            raise ValueError(
                f"DATA_ROOT {data_root!r} without a name for its nodules: give DATASET=name too ({EMBEDDED} is embedded)"
            )
        return ""
    if not data_root:
        raise ValueError(
            f"dataset {dataset!r} is not embedded: give DATA_ROOT (data_root), a folder with a manifest.csv"
        )
    root = Path(data_root).expanduser().resolve()
    if not (root / "manifest.csv").is_file():
        raise ValueError(f"DATA_ROOT {root}: no manifest.csv there; the README says how to make one")
    return str(root)


def stamp(data_root: str) -> str:
    """Hash of a run's inputs: size and time of the manifest, of the files it names, and of the user's weight files."""
    files = [Path(os.environ[variable]) for variable in _WEIGHT_FILES if os.environ.get(variable)]
    if data_root:
        manifest = Path(data_root) / "manifest.csv"
        files.append(manifest)
        text = manifest.read_text(encoding="utf-8-sig", errors="replace")
        for row in csv.DictReader(io.StringIO(text, newline="")):
            files += [Path(data_root) / row[column].strip() for column in FILES if (row.get(column) or "").strip()]
    found = hashlib.sha256()
    for file in files:
        seen = file.stat() if file.is_file() else None
        found.update(f"{file} {seen and (seen.st_size, seen.st_mtime_ns)}\n".encode(errors="surrogateescape"))
    return found.hexdigest()[:16]


def _output(variable: str) -> Path:
    """The folder named by one of `_OUTPUTS`; ValueError if it can be neither written nor created."""
    folder = Path(os.environ.get(variable) or ROOT / _OUTPUTS[variable]).absolute()
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "may not be written" if there.is_dir() else "is no folder"
        raise ValueError(f"{variable} {folder}: {there} {why}; choose another folder")
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> int:
    """Print "=", the run's name, "=" and the result of `check_run`, or its error; with ``--stamp``, print the `stamp`."""
    if sys.argv[1:2] == ["--stamp"]:
        print(stamp(sys.argv[2]))
        return 0
    profile, dataset, data_root, seed, settings, *folders = sys.argv[1:]
    os.environ["HRLDM_CACHE"], os.environ["HRLDM_RESULTS"] = folders
    try:
        if odd := next((f for f in folders if re.search(r"\s", f)), None):
            raise ValueError(f"make cannot write into {odd!r}: choose HRLDM_CACHE and HRLDM_RESULTS without spaces")
        if not re.fullmatch(r"\d*", seed):
            raise ValueError(f"SEED {seed!r}: give a whole number, 0 or more")
        root = check_run(profile, dataset, data_root)
        print(f"={run_name(profile, settings)}={root}")
    except ValueError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

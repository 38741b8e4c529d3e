"""Run one notebook: ``python scripts/run_notebook.py NOTEBOOK OUT --profile P --dataset D [--data-root R] [--seed S] [--set TEXT]``.

OUT appears only when every cell ran; a failed run leaves OUT with the suffix ``.part.ipynb`` for reading. Wall time and
peak memory go into ``provenance.json`` beside the folder of OUT. Exit status 0, 1 (a cell failed) or 2 (wrong parameters, before
anything ran).
"""

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import papermill
import psutil
from traitlets.config import Config

from hrldm import paths
from hrldm.atomic import write_text
from study.profiles import get_profile
from study.report.provenance import write_provenance

RUN_LINK = re.compile(r"\[the executed run\]\(\.\./results/[^)]*/(\w+\.ipynb)\)")
PARAMETERS = ("profile", "dataset", "data_root", "seed", "settings")


class TreeMemory(threading.Thread):
    """Peak resident memory of this process and all below it, looked at four times a second; shared pages count twice."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mb, self._ended = 0, threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(0.25):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:  # ended meanwhile
                    continue
            self.peak_mb = max(self.peak_mb, total // 2**20)

    def __enter__(self) -> "TreeMemory":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self.join()


def check_parameters(notebook: Path) -> None:
    """Papermill only warns of a parameter that the notebook does not have; here that is an error.

    Raises:
        ValueError: the cell tagged `parameters` is absent or does not define exactly `PARAMETERS`.
    """
    found = set(papermill.inspect_notebook(str(notebook)))
    if found != set(PARAMETERS):
        raise ValueError(
            f"{notebook}: the cell tagged 'parameters' must define {sorted(PARAMETERS)}; "
            f"missing {sorted(set(PARAMETERS) - found)}, unknown {sorted(found - set(PARAMETERS))}"
        )


def with_last_bars(text: str) -> str:
    """An executed notebook whose progress bars leave one line, what stands there in the end."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        merged = []
        for output in cell.get("outputs", []):
            said = "".join(output["text"]) if output["output_type"] == "stream" else None
            if said is not None and merged and merged[-1].get("name") == output["name"]:
                merged[-1]["text"] += said
            else:
                merged.append(output if said is None else output | {"text": said})
        for output in merged:
            if output["output_type"] == "stream":
                output["text"] = re.sub(r"[^\n]*\r(?!\n)", "", output["text"])
                if "\x1b[A" in output["text"]:  # bars within a bar: the outer one
                    outer = output["text"].partition(":")[0]
                    bars = [line for line in output["text"].splitlines() if line.startswith(outer)]
                    output["text"] = f"{bars[-1]}\n"
        if merged:
            cell["outputs"] = merged
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def with_links_of_the_run(text: str) -> str:
    """Links that hold in `notebooks/`, as they hold in results/<dataset>/<profile>/runs."""
    return RUN_LINK.sub(r"[the notebook](../../../../notebooks/\1)", text).replace("](../results/", "](../../../")


def run(notebook: Path, out: Path, **parameters) -> float:
    """Execute `notebook` in its own folder into `out`; returns the wall time in seconds."""
    part = out.with_name(out.name + ".part.ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hrldm-") as own:
        # sockets in a folder of its own where the system has them: no port that others can listen to, no name that two runs share
        sockets = {} if os.name == "nt" else {"transport": "ipc", "ip": str(Path(own) / "kernel")}
        papermill.execute_notebook(
            str(notebook),
            str(part),
            parameters=parameters,
            cwd=str(notebook.parent),
            kernel_name="python3",
            progress_bar=False,
            iopub_timeout=600,  # 4 s fail a run of hours on a machine that is short of breath
            config=Config(KernelManager=sockets),
        )
    # executed notebooks are published: no folder of this machine in their parameters, warnings and metadata
    text = with_last_bars(part.read_text(encoding="utf-8")).replace(f"{paths.ROOT}{os.sep}", "")
    text, root = with_links_of_the_run(text), parameters.get("data_root")
    write_text(out, text.replace(root, "DATA_ROOT") if root else text)
    part.unlink()
    return time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("notebook", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-root", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="settings", default="", help="part.field=value …")
    args = parser.parse_args()
    # a kernel named python3 in the user's home must not win over this environment's
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        profile = get_profile(args.profile, args.settings)
        data_root = paths.check_run(args.profile, args.dataset, args.data_root)
        check_parameters(args.notebook)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.notebook.stem} …\n", end="", flush=True)  # one write: lines of parallel jobs stay whole
    options = {name: getattr(args, name) for name in PARAMETERS} | {"data_root": data_root}
    try:
        with TreeMemory() as memory:
            seconds = run(args.notebook, args.out, **options)
    except papermill.PapermillExecutionError as error:
        expected = error.ename in ("ValueError", "CheckpointError", "OSError", "FileNotFoundError", "PermissionError")
        said = error.evalue if expected else error  # a fault of ours has its traceback
        print(f"error: {args.notebook} failed; read {args.out}.part.ipynb\n{said}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # the kernel died, or did not start
        print(
            f"error: {args.notebook} ended at {memory.peak_mb} MB ({error}), perhaps for want of memory",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"error: {args.out} cannot be written ({error})", file=sys.stderr)
        return 1
    name = args.notebook.stem
    cost = {"wall_time_s": {name: round(seconds, 1)}, "peak_memory_mb": {name: memory.peak_mb}}
    write_provenance(args.out.parents[1], profile, args.dataset, args.seed, **cost)
    print(f"{name}  {seconds:.1f} s, {memory.peak_mb} MB\n", end="", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

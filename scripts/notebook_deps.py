"""Which files a notebook really uses, as a Makefile fragment: ``python scripts/notebook_deps.py NOTEBOOKS PACKAGE [DATA ...]``.

For each ``NOTEBOOKS/*.ipynb`` the imports of its code cells are followed through the modules of PACKAGE and of the packages
beside the notebooks (imports inside functions count, and so does the ``__init__`` of every parent). A module that names a data file of PACKAGE or of a DATA
folder in a string ("lidc_split.csv"), or such a folder by the upper-case constant of `paths.py` (``WEIGHTS``,
``PUBLISHED``), depends on it. Printed per notebook: ``$(STAMP)/NAME.done: files``. Standard library only: it runs
before the environment exists.

Raises:
    SystemExit: a cell or a module does not parse; the message names the file.
"""

import ast
import json
import sys
from pathlib import Path


def python_source(notebook):
    """The notebook's code cells as one text, without IPython magics and shell lines."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code").splitlines()
    return "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)


def parse(text, path):
    try:
        return ast.parse(text)
    except SyntaxError as error:
        sys.exit(
            f"{path}: cannot be parsed ({error.msg}: {error.text and error.text.strip()!r}); mend it, then make again"
        )


def imported(tree, package):
    """Dotted names `tree` may import; ``from a import b`` gives both ``a`` and ``a.b`` (b may be a module)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join(base + ([node.module] if node.module else []))
            yield parent
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def module_files(dotted, roots):
    """Files run by ``import dotted`` below the package folders `roots`; empty when it is not a module of theirs."""
    parts = dotted.split(".")
    root = next((r for r in roots if r.name == parts[0]), None)
    if root is None:
        return []
    folders = [root.parent.joinpath(*parts[:i]) for i in range(1, len(parts) + 1)]
    candidates = [f / "__init__.py" for f in folders] + [folders[-1].with_suffix(".py")]
    return [f for f in candidates if f.is_file()]


def data_files(tree, by_name, by_folder):
    """Data files that `tree` names in a string, or whose folder it names by its constant."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from by_name.get(Path(node.value[:255]).name, [])
        elif isinstance(node, (ast.Name, ast.Attribute)):
            yield from by_folder.get(node.id if isinstance(node, ast.Name) else node.attr, [])


def used_files(notebook, roots, data):
    """All files of the packages and of the `data` list that `notebook` reaches, sorted, the notebook first."""
    by_name, by_folder = {}, {}
    for file in data:
        by_name.setdefault(file.name, []).append(file)
        by_folder.setdefault(file.parent.name.upper(), []).append(file)
    # `paths.py` defines the constants of all folders; naming them there is not using them
    seen, found, todo = set(), set(), [(notebook, python_source(notebook), [])]
    while todo:
        path, text, package = todo.pop()
        tree = parse(text, path)
        if path.name != "paths.py":
            found.update(data_files(tree, by_name, by_folder))
        for dotted in imported(tree, package):
            for file in module_files(dotted, roots):
                if file not in seen:
                    seen.add(file)
                    top = next(r for r in roots if r in file.parents)
                    inside = list(file.relative_to(top.parent).with_suffix("").parts[:-1])
                    todo.append((file, file.read_text(encoding="utf-8"), inside))
    return [notebook, *sorted(seen | found)]


def main(notebooks, package, *data_folders):
    roots = [Path(package), *(f.parent for f in sorted(Path(notebooks).glob("*/__init__.py")))]
    suffixes = {".csv", ".json", ".safetensors"}
    data = [
        f for folder in (*roots, *map(Path, data_folders)) for f in sorted(folder.rglob("*")) if f.suffix in suffixes
    ]
    for notebook in sorted(Path(notebooks).glob("*.ipynb")):
        print(f"$(STAMP)/{notebook.stem}.done:", *(f.as_posix() for f in used_files(notebook, roots, data)))


if __name__ == "__main__":
    main(*sys.argv[1:])

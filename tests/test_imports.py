"""Imports inside the package point one way, and no two modules import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import meetjax

ROOT = Path(meetjax.__file__).parent
ORDER = (
    ("errors",),
    ("types",),
    ("models",),
    ("adapters",),
    ("objectives", "data"),
    ("train", "generate"),
    ("evaluate", "plan"),
    ("serve",),
)
"""Lowest first; names in one group do not see each other. Modules at the top level, `cli` among them, stand above all."""
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, at any depth of indentation."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "meetjax"}


def folder(module: str) -> str:
    """'models' of meetjax.models.layers; 'errors' of meetjax.errors; '' of meetjax itself."""
    return module.split(".")[1] if "." in module else ""


def test_imports_point_one_way():
    wrong = [
        f"{importer} imports {imported}"
        for importer, path in MODULES.items()
        for imported in imports_of(path)
        if folder(importer) in RANK and folder(imported) != folder(importer)
        if RANK.get(folder(imported), len(ORDER)) >= RANK[folder(importer)]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_every_folder_has_a_rank():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(RANK)


def test_no_import_cycles():
    graph = {name: imports_of(path) - {name} for name, path in MODULES.items()}
    while graph:
        leaves = {name for name, needed in graph.items() if not needed & set(graph)}
        assert leaves, f"import each other: {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in leaves}

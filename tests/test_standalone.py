"""Imports go one way only. That the core runs on its own is in test_readme.py."""

import ast
import sys

from conftest import ROOT

CORE = ["rank_allocator", "guard", "budget", "salora", "hard_concrete"]  # each may import those to its right
LAYERS = [{"experiments", "course"}, {"train_glue_mini"}, {"cli"}, {"glue", "hub", "peers"}, *[{name} for name in CORE]]
# What stands in one place may import itself, its neighbors and what comes after, and nothing before
ORDER = {name: level for level, names in enumerate(LAYERS) for name in names} | {"tiny_transformer": len(LAYERS)}
SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0].removesuffix(".py") in ORDER]


def house_of(path):
    """The folder or top-level module that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(tree):
    """The top-level names of all modules that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_imports_only_go_downwards_and_the_encoder_imports_nothing_of_ours():
    assert {house_of(path) for path in SOURCES} == set(ORDER)
    for path in SOURCES:
        house, tree = house_of(path), ast.parse(path.read_text(encoding="utf-8"))
        if house == "tiny_transformer":  # but for the one method that opens a folder
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    node.body = [part for part in node.body if getattr(part, "name", None) != "from_pretrained"]
        for name in imports_of(tree):
            assert name not in ORDER or ORDER[house] <= ORDER[name], f"{path.relative_to(ROOT)} imports {name}"


def test_the_core_and_the_encoder_need_torch_and_numpy_only():
    for name in [*CORE, "tiny_transformer"]:
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        found = {top for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for top in imports_of(node)}
        assert found - set(sys.stdlib_module_names) <= {"torch", "numpy", *CORE}, name

"""The map: imports point down only, never in a circle, and a name means one thing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "calib": {"calib"},
    "compressor": {"compressor", "calib"},
    "unlearn": {"unlearn", "calib"},
    "cli": {"cli", "compressor", "unlearn", "calib"},
}
# From the ground up. A room imports from itself and from those before it.
ROOMS = {
    "calib": ["embedded", "runtime", "losses", "quant", "report", "model", "jobs", "data", "stats"],
    "compressor": ["report", "storage", "engine", "quantization", "distillation", "exporters"],
    "unlearn": ["options", "report", "model", "data", "datamodels", "methods", "audit", "validate", "cost", "unlearn"],
}


def modules() -> dict[str, Path]:
    files = [file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def imported(file: Path) -> set[str]:
    """Modules of this repository that a file imports, at its top or later."""
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in MAY_IMPORT}


ARROWS = {module: imported(file) for module, file in MODULES.items()}


def test_every_import_names_a_module_that_there_is() -> None:
    assert {(module, name) for module, names in ARROWS.items() for name in names if name not in MODULES} == set()


def test_arrows_between_packages_point_down() -> None:
    for module, names in ARROWS.items():
        allowed = MAY_IMPORT[module.split(".")[0]]
        assert {name.split(".")[0] for name in names} <= allowed, module


@pytest.mark.parametrize("package", ROOMS)
def test_arrows_between_rooms_point_down(package: str) -> None:
    floors = {room: floor for floor, room in enumerate(ROOMS[package])}
    for module, names in ARROWS.items():
        if not module.startswith(f"{package}."):
            continue  # the package itself, which lists what it offers
        floor = floors[module.split(".")[1]]
        for name in names:
            if name.startswith(f"{package}."):
                assert floors[name.split(".")[1]] <= floor, f"{module} imports {name}, which lies above it"


def test_no_imports_go_in_a_circle() -> None:
    done, path = set[str](), list[str]()

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for name in ARROWS.get(module, ()):
            visit(name)
        done.add(path.pop())

    for module in ARROWS:
        visit(module)


def defined(file: Path) -> set[str]:
    """Public names that a module gives to what it defines at its top."""
    found = set[str]()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                found.add(target.id)
    return {name for name in found if not name.startswith("_")}


def test_no_public_name_stands_in_two_modules() -> None:
    """But for ENTRIES, which tables of methods and estimators look up in a module by its name."""
    where = dict[str, list[str]]()
    for module, file in MODULES.items():
        for name in defined(file):
            where.setdefault(name, []).append(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1 and name != "ENTRIES"} == {}


def test_rooms_are_small() -> None:
    """At most seventeen files lie beside each other; of thin ones, one a command, a few more."""
    for package in MAY_IMPORT:
        for folder in [ROOT / package, *(f for f in (ROOT / package).rglob("*") if f.is_dir())]:
            count = len([file for file in folder.glob("*.py") if file.name != "__init__.py"])
            assert count <= (24 if package == "cli" else 17), f"{folder}: {count} files"

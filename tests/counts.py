"""The state of the house in numbers: `python -m tests.counts`.  tests/test_arrows.py holds what must be zero."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "calib": {"calib"},
    "compressor": {"compressor", "calib"},
    "unlearn": {"unlearn", "calib"},
    "cli": {"cli", "compressor", "unlearn", "calib"},
}
# From the ground up. A room imports from itself and from those before it.
ROOMS = {
    "calib": [
        "embedded",
        "runtime",
        "losses",
        "quant",
        "report",
        "model",
        "blockwise",
        "probe",
        "jobs",
        "data",
        "stats",
    ],
    "compressor": [
        "report",
        "storage",
        "engine",
        "exporters",
        "formats",
        "transforms",
        "pruning",
        "quantization",
        "on_policy",
        "distillation",
        "merging",
    ],
    "unlearn": ["options", "report", "model", "data", "datamodels", "methods", "audit", "validate", "cost", "unlearn"],
}
MOST_PARAMETERS, MOST_LINES = 8, 60
# An operator's and a kernel's signatures take tensors and numbers alone.
KERNELS = {"gptq_columns", "_on_cuda", "_columns"}
ENTRIES = "ENTRIES"  # by which tables look up methods, estimators and formats in a module
# Words of the library's that override its methods, whose docstrings are the library's.
OVERRIDDEN = {
    "forward", "get_help_record", "get_error_hint", "parse_args", "format_options", "format_epilog", "list_commands",
    "resolve_command",
}  # fmt: skip
# What a docstring cannot begin with that is to be read alone.
LEANING = re.compile(r"(Of|What|The same|As|And|Its|Their|Those|These|It|They|By|With|For|From|That|Which|Where|To)\b")
# Phrases that the field has other words for.
OLD_PHRASES = re.compile(
    r"\b(never saw (it|them|the rows|the forget set|what)|came back|come back|comes back|known again|held back|"
    r"is said|said by|Mind:|"
    r"shared out|the turn of|stands? on the command line|decisions? that (is|are) right|nats a decision)\b"
)
OLD_NAMES = {"aside", "wanted", "people", "owners", "bend", "lean", "tap", "walks", "lesson", "foretold", "minded"}


def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    files = [file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}


def imported(module: str) -> set[str]:
    """Modules of this repository that a module imports, at its top or later."""
    found = set[str]()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in MAY_IMPORT}


ARROWS = {module: imported(module) for module in MODULES}


def arrows_up() -> list[str]:
    """Imports of a package, or a room, that lies above."""
    found = list[str]()
    for module, names in ARROWS.items():
        package, *rest = module.split(".")
        floors = {room: floor for floor, room in enumerate(ROOMS.get(package, []))}
        for name in names:
            other, *room = name.split(".")
            up = bool(other == package and rest and room and floors) and floors[room[0]] > floors[rest[0]]
            if other not in MAY_IMPORT[package] or up:
                found.append(f"{module} -> {name}")
    return found


def names_in_two_modules() -> dict[str, list[str]]:
    """Public names that more than one module gives to something at its top."""
    where = dict[str, list[str]]()
    for module, tree in TREES.items():
        found = set[str]()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
                if isinstance(target, ast.Name):
                    found.add(target.id)
        for name in found - {ENTRIES}:
            where.setdefault(name, []).append(module)
    return {name: of for name, of in where.items() if len(of) > 1 and not name.startswith("_")}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function, inner ones too, with its module."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield module, node


def large_functions() -> list[str]:
    """Functions of more than MOST_PARAMETERS parameters or MOST_LINES lines."""
    found = list[str]()
    for module, node in functions():
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if (count > MOST_PARAMETERS and node.name not in KERNELS) or lines > MOST_LINES:
            found.append(f"{module}.{node.name}: {count} parameters, {lines} lines")
    return found


def leaning_docstrings() -> list[str]:
    """Public functions, classes and methods without a docstring, or with one that cannot be read alone."""

    def within(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name.startswith("_"):
                continue
            text = ast.get_docstring(child)
            if child.name not in OVERRIDDEN and (text is None or LEANING.match(text)):
                yield f"{prefix}.{child.name}: {(text or '').splitlines()[:1]}"
            if isinstance(child, ast.ClassDef):
                yield from within(child, f"{prefix}.{child.name}")

    return [found for module, tree in TREES.items() for found in within(tree, module)]


def old_names() -> list[str]:
    """Functions, classes and parameters with words in their names that the field does not use."""
    found = list[str]()
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            name = getattr(node, "name", None) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            name = node.arg if isinstance(node, ast.arg) else name
            if name and OLD_NAMES & set(re.findall(r"[a-z]+", re.sub(r"([A-Z])", r"_\1", name).lower())):
                found.append(f"{module}: {name}")
    return found


def old_phrases() -> list[str]:
    """Phrases in code, templates and pages, but for the changelog and the logs, that the field has other words for."""
    texts = [*MODULES.values(), *(ROOT / "calib/report").rglob("*.html"), *(ROOT / "docs").glob("*.md")]
    texts += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    found = list[str]()
    for file in texts:
        if file.name in ("LOG.md", "reliability.md"):
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if match := OLD_PHRASES.search(line.replace('"never saw it"', "")):  # the key that old recipes have
                found.append(f"{file.relative_to(ROOT)}:{number}: {match[0]}")
    return found


def files_by_room() -> dict[str, int]:
    """Modules that lie beside each other, but for __init__."""
    folders = {file.parent for file in MODULES.values()}
    return {
        str(folder.relative_to(ROOT)): len([f for f in folder.glob("*.py") if f.name != "__init__.py"])
        for folder in sorted(folders)
    }


def main() -> None:
    """Print all counts."""
    for room, count in files_by_room().items():
        print(f"{room:32} {count} modules")
    for what, found in {
        "arrows up": arrows_up(),
        "public names in two modules": list(names_in_two_modules()),
        f"functions over {MOST_PARAMETERS} parameters or {MOST_LINES} lines": large_functions(),
        "public names whose docstring cannot be read alone": leaning_docstrings(),
        "old words in names": old_names(),
        "old phrases in code and pages": old_phrases(),
    }.items():
        print(f"{len(found):4} {what}", *(f"       {one}" for one in found[:200]), sep="\n")


if __name__ == "__main__":
    main()

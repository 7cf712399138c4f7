"""The map: imports point down only, never in a circle, a name means one thing; what tests/counts.py counts is zero."""

from __future__ import annotations

from dataclasses import fields

from tests import counts
from unlearn.options.estimators import ESTIMATORS
from unlearn.options.methods import METHODS
from unlearn.options.unlearning import Unlearn


def test_every_import_names_a_module_that_there_is() -> None:
    named = {(module, name) for module, names in counts.ARROWS.items() for name in names}
    assert {(module, name) for module, name in named if name not in counts.MODULES} == set()


def test_what_is_counted_is_zero() -> None:
    assert counts.arrows_up() == []
    assert counts.names_in_two_modules() == {}
    assert counts.large_functions() == []
    assert counts.leaning_docstrings() == []
    assert counts.old_names() == []
    assert counts.old_phrases() == []


def test_no_imports_go_in_a_circle() -> None:
    done, path = set[str](), list[str]()

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for name in counts.ARROWS.get(module, ()):
            visit(name)
        done.add(path.pop())

    for module in counts.ARROWS:
        visit(module)


def test_rooms_are_small() -> None:
    """At most seventeen files lie beside each other; of thin ones, one a command, a few more."""
    for room, count in counts.files_by_room().items():
        assert count <= (28 if room == "cli" else 17), f"{room}: {count} files"


def test_options_of_every_method_are_options_of_the_job() -> None:
    """Whoever adds a class of options and forgets it among the bases of `Unlearn` is told so."""
    own = {f.name for f in fields(Unlearn)}
    for entry in (*METHODS.values(), *ESTIMATORS.values()):
        for options in entry.options:
            assert issubclass(Unlearn, options) and {f.name for f in fields(options)} <= own

"""Functions of the user's own, by the names that options give them."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib import BadInput, first_line


def imported_function(option: str, name: str, what: str) -> Callable[..., Any]:
    """Import the function called `name`, package.module:function; the current directory is searched first.

    `option` is the one that names it, `what` says in messages what such a function does. The directory stays on the
    path, as the function may import more from there when it is called.  Raises BadInput.
    """
    package, _, function = name.partition(":")
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise BadInput(f"{option} '{name}': must be package.module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(package), function)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise BadInput(f"{option} {name}: cannot be imported ({first_line(error)}); mend it or the name") from error
    if not callable(found):
        raise BadInput(f"{option} {name}: is no function; name one that {what}")
    made: Callable[..., Any] = found
    return made

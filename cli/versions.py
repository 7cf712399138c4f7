"""Whether the libraries that are installed are as new as parewell says it needs."""

from __future__ import annotations

import re

from calib import BadInput

LIBRARIES = ("torch", "transformers")


def check_versions() -> None:
    """Raises BadInput where a library is missing, or older or newer than the bounds of the package that is installed;
    pip says so once, when it installs something else, and goes on."""
    from importlib.metadata import PackageNotFoundError, version

    bounds = _bounds()
    for name in LIBRARIES:
        try:
            found = version(name)
        except PackageNotFoundError as error:
            raise BadInput(f"{name}: is not installed; pip install '{name}{bounds.get(name, '')}'") from error
        for sign, bound in re.findall(r"(>=|<)([\d.]+)", bounds.get(name, "")):
            if (_numbers(found) < _numbers(bound)) == (sign == ">="):
                raise BadInput(
                    f"{name}: version {found} is installed, and parewell needs {name}{bounds[name]}; "
                    f"pip install '{name}{bounds[name]}'"
                )


def _bounds() -> dict[str, str]:
    """By name, as >=2.11 or >=5.4,<6; nothing where the package itself is not installed."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needed = requires("parewell") or []
    except PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)([^;]*)$", requirement) for requirement in needed)
    return {match[1]: match[2].strip() for match in found if match}


def _numbers(text: str) -> tuple[int, ...]:
    """Of a version, without trailing zeros and what tells builds and pre-releases apart: 2.11.0+cu130 is (2, 11)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in match[0].split(".")] if match else [0]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)

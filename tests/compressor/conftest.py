from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import exact


@pytest.fixture
def double_kept() -> Iterator[None]:
    with exact.keeping_double():
        yield

"""Whatever a file holds: it is read, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz import mutate
from tests.fuzz.readers import NAMES, Reader, outcome, readers

CORPUS = Path(__file__).parent / "corpus"


@pytest.fixture(scope="module")
def all_readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("readers"))


def test_every_reader_is_tried_and_reads_what_is_sound(all_readers: dict[str, Reader]) -> None:
    assert set(all_readers) == set(NAMES)
    for name, reader in all_readers.items():
        for seed in reader.seeds:
            said = outcome(reader, seed)
            assert said == "read" or (name == "recipe" and "wants models trained" in said), (name, said)


@pytest.mark.parametrize("name", NAMES)
def test_spoilt_files(name: str, all_readers: dict[str, Reader]) -> None:
    reader = all_readers[name]

    @given(st.integers(0, 2**32), st.sampled_from(range(len(reader.seeds))), st.integers(1, 4))
    @example(0, 0, 1)
    def spoilt(seed: int, which: int, times: int) -> None:
        outcome(reader, mutate.mutated(reader.seeds[which], reader.kind, seed, times))

    spoilt()


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*/*")), ids=lambda file: f"{file.parent.name}-{file.name}")
def test_what_was_a_defect_once(file: Path, all_readers: dict[str, Reader]) -> None:
    outcome(all_readers[file.parent.name], file.read_bytes())

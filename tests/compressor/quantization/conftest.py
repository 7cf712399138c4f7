from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calib.blockwise.model import BlockwiseModel
from calib.data.corpus import Corpus
from calib.data.teacher_cache import TeacherCache
from calib.jobs.journal import Journal
from calib.losses.top_k import top_k
from calib.model.weights import Weights
from tests import tiny, walked


@pytest.fixture
def stream(tmp_path: Path) -> BlockwiseModel:
    model = tiny.model_of(tiny.config_of("llama"), dtype=torch.float32)
    return BlockwiseModel(model.config, Weights(tiny.save(model, tmp_path)), torch.device("cpu"))


@pytest.fixture
def rows() -> Corpus:
    ids = torch.randint(tiny.VOCAB, (12, 20), generator=torch.Generator().manual_seed(0))  # three are kept back
    return Corpus(ids, torch.ones_like(ids, dtype=torch.bool), "random", None)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    (tmp_path / "journal").mkdir()
    return Journal(tmp_path / "journal")


@pytest.fixture
def teacher(stream: BlockwiseModel, rows: Corpus, journal: Journal) -> TeacherCache:
    cache = TeacherCache(journal)
    for row, logits in enumerate(walked.logits_of(stream, rows.ids)):
        cache.write(row, top_k(logits, 16))
    return cache

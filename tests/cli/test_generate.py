"""`parewell generate`: what a model says, as the library says it too; and `parewell env`."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from calib import BadInput, embedded
from cli.env import EXTRAS, environment
from cli.main import parewell
from compressor import Quantize, load, quantize
from compressor.engine.generation import continue_prompt, generate_text, prompt_ids
from tests.cli.test_commands import ROOT

PROMPT = "The lambda expression"


def test_it_writes_what_the_library_writes_and_shows_it_beside_a_reference(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    coded = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    whole = model.generate(**coded, max_new_tokens=12, do_sample=False)[0, coded.input_ids.shape[1] :]
    expected = tokenizer.decode(whole, skip_special_tokens=True)
    done = CliRunner().invoke(parewell, ["generate", str(embedded.MODEL), PROMPT, "--max-new-tokens", "12"])
    assert done.exit_code == 0 and done.stdout == f"{expected}\n"
    other = shutil.copytree(embedded.MODEL, tmp_path / "other")
    both = ["generate", str(other), PROMPT, "--max-new-tokens", "12", "--reference", str(embedded.MODEL)]
    found = json.loads(CliRunner().invoke(parewell, [*both, "--json"]).stdout)
    assert found == {"prompt": PROMPT, "texts": {str(embedded.MODEL): expected, str(other): expected}}
    assert CliRunner().invoke(parewell, both).stdout.count(expected.split()[0]) >= 2


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w8a8kv8"])  # finer than what the order of sums moves
def test_a_cache_changes_nothing_of_what_a_quantized_model_says(scheme: str, tmp_path: Path) -> None:
    few = Quantize(scheme=scheme, samples=4, length=64, held_out=1, learn=False)
    quantize(embedded.MODEL, tmp_path / "out", few, allow_damage=True)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), load(tmp_path / "out")
    ids = prompt_ids(PROMPT, tokenizer)
    text = continue_prompt(model, tokenizer, ids, max_new_tokens=10)
    grown = ids
    for _ in range(10):
        with torch.no_grad():
            grown = torch.cat([grown, model(grown, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert text == tokenizer.decode(grown[0, ids.shape[1] :], skip_special_tokens=True)


def test_drawn_words_follow_the_seed() -> None:
    texts = [generate_text(embedded.MODEL, PROMPT, temperature=1.0, seed=s, max_new_tokens=20) for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_goes_into_the_chat_template_where_there_is_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    assert tokenizer.decode(prompt_ids("hi", tokenizer)[0], skip_special_tokens=True) == "<user>hi<assistant>"
    assert tokenizer.decode(prompt_ids("hi", tokenizer, "plain")[0], skip_special_tokens=True) == "hi"


def test_an_eos_that_the_tokenizer_adds_does_not_end_the_prompt() -> None:
    """As T5's and some classifiers' tokenizers do: after it nothing would follow."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    plain = prompt_ids("hi there", tokenizer)
    around = TemplateProcessing(
        "<s> $A </s>", None, [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = around
    assert tokenizer("hi there").input_ids == [*plain[0].tolist(), tokenizer.eos_token_id]
    assert torch.equal(prompt_ids("hi there", tokenizer), plain)


def test_what_cannot_be_gone_on_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give a shorter one"):
        generate_text(embedded.MODEL, "word " * 5000)
    bare = shutil.copytree(embedded.MODEL, tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    with pytest.raises(BadInput, match="has no tokenizer"):
        generate_text(bare, PROMPT)


def test_env_knows_every_extra_that_serves_a_user() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert EXTRAS.keys() == declared.keys() - {"test", "dev", "benchmarks", "fuzz"}
    found = environment()
    assert found["versions"]["torch"] == torch.__version__ and found["cores"] >= 1 and found["memory_gib"] > 1
    shown = CliRunner().invoke(parewell, ["env"])
    assert shown.exit_code == 0 and all(f"[{name}]" in shown.stdout for name in EXTRAS)
    assert json.loads(CliRunner().invoke(parewell, ["env", "--json"]).stdout)["extras"].keys() == EXTRAS.keys()

"""Layouts and templates, compared with what the tokenizer's own template makes of the same messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from calib import BadInput, embedded
from calib.data.load import load_corpus
from calib.data.prompts import Document, prompt_format
from calib.data.records import Row
from calib.data.token_rows import encode_documents, from_documents

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
THINKING = CHATML.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}")
FORGETFUL = (  # what stands before </think> is left out of earlier turns, as Qwen3's and DeepSeek's templates do
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "second answer"},
]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(embedded.MODEL)
    tokenizer.chat_template = template
    return tokenizer


def made(fields: dict[str, Any], template: str | None = CHATML, asked: str = "auto") -> Document:
    return prompt_format(asked, tokenizer_with(template)).document(Row("line 1", 1, fields, 1), "FILE, line 1")


def answers_in(document: Document) -> list[str]:
    assert document.answers is not None
    return [document.text[a:b] for a, b in document.answers]


@pytest.mark.parametrize("template", [CHATML, MARKED, WITH_BOS, THINKING])
def test_every_turn_of_the_assistant_is_an_answer(template: str) -> None:
    document = made({"messages": CHAT}, template)
    assert document.text == tokenizer_with(template).apply_chat_template(CHAT, tokenize=False)
    assert [answer.strip().removesuffix("</s>") for answer in answers_in(document)] == ["first answer", "second answer"]
    between = document.text[document.answers[0][1] : document.answers[1][0]]  # type: ignore[index]
    assert "second question" in between and "answer" not in between


def test_a_templates_own_marks_are_what_transformers_masks() -> None:
    tokenizer = tokenizer_with(MARKED)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    (one,) = encode_documents([made({"messages": CHAT}, MARKED)], tokenizer, "here")
    assert one.ids.tolist() == [tokenizer.bos_token_id, *whole["input_ids"]]
    assert one.answers.tolist() == [False, *map(bool, whole["assistant_masks"])]


def test_reasoning_that_a_template_leaves_out_of_earlier_turns() -> None:
    chat = [dict(m) for m in CHAT]
    chat[2]["content"] = "<think>\nhm\n</think>\n\nfirst answer"
    document = made({"messages": chat}, FORGETFUL)
    assert "hm" not in document.text
    assert [answer.strip().removesuffix("</s>") for answer in answers_in(document)] == ["first answer", "second answer"]


def test_a_turn_that_is_not_found_is_refused_by_name() -> None:
    shouting = CHATML.replace("{{ m.content }}", "{{ m.content | upper if m.role == 'assistant' else m.content }}")
    shouting = shouting.replace("{% if add_generation_prompt %}<|assistant|>\n", "{% if add_generation_prompt %}<go>")
    with pytest.raises(BadInput, match=r"FILE, line 1: the prompt for message 3 is not how"):
        made({"messages": CHAT}, shouting)


@pytest.mark.parametrize(
    ("messages", "answers"),
    [
        (CHAT[:4], ["first answer"]),  # ends with the user
        (CHAT[:2], []),
        ([CHAT[2]], ["first answer"]),  # begins with the assistant
        ([*CHAT[:2], {"role": "tool", "content": "42"}, {"role": "assistant", "content": "it is 42"}], ["it is 42"]),
    ],
)
def test_only_the_assistant_answers(messages: list[dict[str, str]], answers: list[str]) -> None:
    document = made({"messages": messages})
    assert [answer.strip().removesuffix("</s>") for answer in answers_in(document)] == answers


def test_calls_of_tools_are_answers_too() -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    document = made({"messages": [CHAT[1], call, {"role": "tool", "content": "42"}, CHAT[2]]}, template)
    assert ['"f"' in answer for answer in answers_in(document)] == [True, False]
    assert "42" not in "".join(answers_in(document))


LAYOUTS: dict[str, dict[str, Any]] = {
    "question + answer": {"question": "2 + 2?", "answer": "4"},
    "prompt + response": {"prompt": "2 + 2?", "response": "4"},
    "prompt + completion as messages": {
        "prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "4"}]
    },
    "alpaca": {"instruction": "2 + 2?", "input": "", "output": "4"},
    "sharegpt": {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    "conversations with roles": {
        "conversations": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    },
    "messages": {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_through_the_tokenizers_template(layout: str) -> None:
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    document = made(LAYOUTS[layout])
    assert document.text == tokenizer_with(CHATML).apply_chat_template(messages, tokenize=False)
    assert answers_in(document) == ["4</s>\n"]


def test_an_alpaca_row_with_an_input_and_a_system_prompt() -> None:
    document = made({"instruction": "Add.", "input": "2, 2", "output": "4", "system": "be brief"})
    assert document.text == "<|system|>\nbe brief</s>\n<|user|>\nAdd.\n\n2, 2</s>\n<|assistant|>\n4</s>\n"


@pytest.mark.parametrize(
    ("fields", "text", "answer"),
    [
        ({"question": "d?", "answer": "e"}, "Question: d?\nAnswer: e", " e"),
        ({"prompt": "b ", "response": "c"}, "b c", "c"),
        ({"prompt": "b ", "completion": "c"}, "b c", "c"),
        (
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n4", "4",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", [None, CHATML])
def test_plain_prompts(fields: dict[str, str], text: str, answer: str, template: str | None) -> None:
    """So they are put where the tokenizer has no template, or where that is asked for."""
    document = made(fields, template, "auto" if template is None else "plain")
    assert (document.text, answers_in(document)) == (text, [answer])


def test_prompt_and_completion_as_text_are_complete_unless_the_template_is_asked_for(tmp_path: Path) -> None:
    fields = {"prompt": "b ", "completion": "c"}
    assert made(fields).text == "b c"
    assert made(fields, asked="chat").text == "<|user|>\nb </s>\n<|assistant|>\nc</s>\n"
    file = tmp_path / "own.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    document = made(fields, asked=str(file))
    assert document.text == "[user]b [assistant]c" and answers_in(document) == ["c"]
    assert prompt_format(str(file), tokenizer_with(None)).name.startswith("own.jinja (")


def test_prompts_alone_are_known_as_such() -> None:
    assert made({"prompt": "go on"}) == Document(
        "<|user|>\ngo on</s>\n<|assistant|>\n", (), complete=True, prompt_only=True
    )
    assert made({"prompt": "go on"}, None) == Document("go on", (), prompt_only=True)
    assert made({"prompt": CHAT[:2]}).text.endswith("<|assistant|>\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "has no messages"),
        ({"messages": [{"role": "user"}]}, "message 1 has no content"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "from 'narrator', which is none of"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has no 'from' and 'value'"),
        ({"prompt": [CHAT[1]], "completion": "text"}, "must both be text, or both be lists"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen and rejected"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "has a 'history'"),
        ({"txt": "a"}, "has none of the fields"),
        ({"question": "a\ud800", "answer": "b"}, "half a surrogate pair"),
        ({"prompt": "a", "response": "b", "spans": [[0, 1]]}, "has spans"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 has a part of type 'image'"),
        ({"messages": "[{'role': 'user'}]"}, "'messages' is text and no JSON"),
        ({"messages": CHAT, "tools": "weather"}, "'tools' is text and no JSON"),
        ({"messages": CHAT, "tools": {"name": "weather"}}, "'tools' is no list"),
        ({"prompt": "a", "completion": "b", "label": False}, "an answer that was rated bad"),
        ({"question": "a", "answer": "b", "context": "c"}, "has 'context', for which 'question'"),
        ({"question": "a", "answer": "b", "choices": ["b", "c"]}, "has 'choices', for which 'question'"),
        ({"instruction": "a", "output": "b", "input": "c", "context": "d"}, "has 'input', for which"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "has a system prompt"),
    ],
)  # fmt: skip
def test_rows_that_are_not_understood_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=rf"FILE, line 1: .*{message}"):
        made(fields)


@pytest.mark.parametrize(
    ("asked", "template", "message"),
    [
        ("chat", None, "has no chat template"),
        ("alpaca", CHATML, "'alpaca' is unknown"),
        ("gone.jinja", CHATML, "cannot be read"),
    ],
)
def test_formats_that_are_not_there(asked: str, template: str | None, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        prompt_format(asked, tokenizer_with(template))


def test_messages_want_a_template() -> None:
    for template, asked in ((None, "auto"), (CHATML, "plain")):
        with pytest.raises(
            BadInput, match=r"line 1: has messages, but there is no chat template.*--prompt-format FILE"
        ):
            made({"messages": CHAT}, template, asked)


def test_a_template_that_refuses_is_named() -> None:
    with pytest.raises(BadInput, match=r"line 1: the chat template refuses these messages \(no such thing\)"):
        made({"messages": CHAT}, "{{ raise_exception('no such thing') }}")


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, MARKED])
@pytest.mark.parametrize("by_document", [True, False])
def test_conversations_begin_with_one_bos(template: str, by_document: bool, tmp_path: Path) -> None:
    """Whether the template writes it or the tokenizer adds it; and the ids are the template's own."""
    tokenizer = tokenizer_with(template)
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": CHAT[: 3 + 2 * (i % 2)]}) for i in range(6)))
    corpus = load_corpus(file, tokenizer, vocab=len(tokenizer), length=64, by_document=by_document)
    bos = tokenizer.bos_token_id
    own = tokenizer.apply_chat_template(CHAT[:3], tokenize=True, return_dict=False)
    assert corpus.ids[0, :2].tolist() == ([bos, *own] if own[0] != bos else own)[:2]
    found = (corpus.ids == bos) & corpus.mask
    assert found[:, 0].all() and not (found[:, 1:] & found[:, :-1]).any()
    if by_document:
        assert found.sum(1).eq(1).all()
    assert corpus.about["prompt_format"] == "chat template of the tokenizer"


def test_special_tokens_of_a_template_stand_for_no_bytes() -> None:
    tokenizer, document = tokenizer_with(CHATML), made({"messages": CHAT})
    (one,) = encode_documents([document], tokenizer, "here")
    assert int(one.bytes.sum()) == len(document.text.replace("</s>", "").encode())


def test_answers_are_where_the_template_puts_them_in_packed_rows() -> None:
    tokenizer = tokenizer_with(CHATML)
    corpus = from_documents([made({"messages": CHAT})] * 3, tokenizer, length=16, source="here")
    assert corpus.answers is not None
    shown = tokenizer.decode(corpus.ids[corpus.answers])
    assert shown.count("first answer") >= 2 and "question" not in shown and "be brief" not in shown


DATED = "{{ '<|system|>today is ' + strftime_now('%d %b %Y') }}\n" + CHATML
TOJSON = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
JOINED = TOJSON.replace("{{ c.function.arguments | tojson }}", "{{ '```' + c.function.arguments + '```' }}")


def test_a_mark_that_ends_in_white_space_marks_nothing_after_it() -> None:
    """Nor does one at the beginning: transformers' mask of tokens goes on to the end there (issue 47325)."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' ' }}{% endgeneration %}"
        "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_with(template)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # drops white space
    chat = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b c"}]
    document = prompt_format("auto", tokenizer).document(Row("line 1", 1, {"messages": chat}, 1), "FILE, line 1")
    assert answers_in(document) == ["a "]


def test_a_template_is_told_of_one_day_whenever_it_asks(tmp_path: Path) -> None:
    text = made({"messages": CHAT}, DATED).text
    assert text.startswith("<|system|>today is 26 Jul 2024\n") and text.endswith("second answer</s>\n")
    assert prompt_format("auto", tokenizer_with(DATED)).name == "chat template of the tokenizer, dated 2024-07-26"
    (tmp_path / "now.jinja").write_text(DATED)
    assert made({"messages": CHAT}, None, str(tmp_path / "now.jinja")).text == text


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_turns_that_say_so_are_no_targets(template: str, mark: dict[str, Any]) -> None:
    """OpenAI's and axolotl's weight, axolotl's train, ms-swift's loss."""
    chat = [message | mark if message["content"] == "first answer" else message for message in CHAT]
    (answer,) = answers_in(made({"messages": chat}, template))
    assert answer.startswith("second answer")
    turns = [{"from": m["role"], "value": m["content"], **{k: v for k, v in m.items() if k in mark}} for m in chat]
    assert made({"conversations": turns}, template) == made({"messages": chat}, template)


def test_arguments_of_tool_calls_are_json_once() -> None:
    """transformers' templates want an object; OpenAI's files have JSON in a string."""
    value, shown = {"city": "Bonn"}, '{"city": "Bonn"}'
    for given in (value, shown):
        call = {"type": "function", "function": {"name": "weather", "arguments": given}}
        chat = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
        (answer,) = answers_in(made({"messages": chat}, TOJSON))
        assert answer == shown + "</s>"
        (answer,) = answers_in(made({"messages": chat}, JOINED))  # one that wants a string, as DeepSeek's
        assert answer == f"```{shown}```</s>"


def test_tools_may_be_kept_as_json() -> None:
    template = "{{ tools | tojson }}" + CHATML
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    assert made({"messages": CHAT, "tools": json.dumps(tools)}, template) == made(
        {"messages": CHAT, "tools": tools}, template
    )


def test_contents_in_parts_of_text_are_that_text() -> None:
    chat = [m | {"content": [{"type": "text", "text": m["content"][:3]}, m["content"][3:]]} for m in CHAT]
    assert made({"messages": chat}) == made({"messages": CHAT})


@pytest.mark.parametrize("name", ["model", "gpt", "Bot"])
def test_roles_of_other_names_are_the_assistants(name: str) -> None:
    chat = [m | {"role": name} if m["role"] == "assistant" else m for m in CHAT]
    assert made({"messages": chat}) == made({"messages": CHAT})


def test_messages_may_be_turns_of_from_and_value() -> None:
    turns = [{"from": m["role"], "value": m["content"]} for m in CHAT]
    assert made({"messages": turns}) == made({"messages": CHAT})


def test_the_template_for_tools_is_looked_at_where_there_are_tools() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": MARKED}
    form, tools = prompt_format("auto", tokenizer), [{"type": "function", "function": {"name": "f"}}]
    for fields, template in (({"messages": CHAT}, CHATML), ({"messages": CHAT, "tools": tools}, MARKED)):
        assert form.document(Row("line 1", 1, fields, 1), "FILE") == made({"messages": CHAT}, template)
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(BadInput, match="no chat template for it"):
        form.document(Row("line 1", 1, {"messages": CHAT}, 1), "FILE")


def test_alpacas_own_rows_have_answers() -> None:
    """Its text is prompt and answer once more, of which all would count."""
    fields = {"instruction": "do it", "input": "", "context": "here", "output": "done"}
    assert made(fields | {"text": "### Instruction:\ndo it"}) == made(fields)
    assert made(fields).text.startswith("<|user|>\ndo it\n\nhere</s>")


def test_tables_keep_messages_as_json() -> None:
    assert made({"messages": json.dumps(CHAT)}) == made({"messages": CHAT})

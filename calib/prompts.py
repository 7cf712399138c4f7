"""From a row's fields to a text: the layouts that people keep prompts, answers and conversations in, and the template
that they are put into.

What counts as an answer is known by character: every turn of the assistant is one. Where a chat template marks what the
assistant generates (`{% generation %}`), those marks decide; otherwise each turn is what the text up to its end has
beyond the text up to the prompt for it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from calib import BadInput, first_line
from calib.records import Row

FORMATS = "auto, chat, plain or a file FILE.jinja"
PROMPT_FORMAT = (
    "how prompts and answers become text: chat (the tokenizer's template), plain, FILE.jinja; auto: chat where the "
    "tokenizer has a template, but prompt + completion as they are"
)
LAYOUTS = (
    "text; messages or conversations; prompt + completion or response; question + answer; "
    "instruction (+ input) + output; prompt alone with --on-policy 1"
)
PAIRS = (  # fields of a prompt and of its answer
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("problem", "solution"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
)
ROLES = {  # of ShareGPT's "from" -> a message's role
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "ai", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
    "system": "system",
}
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # of characters, the end exclusive


@dataclass(frozen=True)
class Document:
    """A text; the characters of its answers (None: it has no prompt, so all of it counts); given spans of characters.

    `complete`: special tokens stand in the text, so the tokenizer must not add its own. `prompt_only`: what answers it
    is still to be generated.
    """

    text: str
    answers: tuple[Span, ...] | None = None
    spans: tuple[Span, ...] = ()
    complete: bool = False
    prompt_only: bool = False


def answered(prompt: str, response: str) -> Document:
    """A prompt and what follows it, as they are."""
    return Document(prompt + response, ((len(prompt), len(prompt) + len(response)),))


@dataclass(frozen=True)
class PromptFormat:
    """How rows that have prompts become text: `name` for reports; the Jinja template, None for the tokenizer's own.

    `plain`: prompts are put as text, without a template. `strings`: plain prompts and completions (TRL's layout for
    text that is complete already) are put into the template too.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    plain: bool = True
    template: str | None = None
    strings: bool = False

    def document(self, row: Row, where: str) -> Document:
        """Raises BadInput, naming the row, for a layout that is not known or messages that the template refuses."""
        fields = row.fields
        if isinstance(turns := fields.get("messages"), list):
            return self._conversation(turns, fields, where)
        if isinstance(turns := fields.get("conversations", fields.get("conversation")), list):
            return self._conversation(_from_sharegpt(turns, fields, where), fields, where)
        if isinstance(fields.get("text"), str):
            text = _sound(fields["text"], where)
            return Document(text, spans=_spans(fields, text, where))
        for asked, reply in PAIRS:
            if _given(fields.get(asked)) and _given(fields.get(reply)):
                return self._pair(asked, reply, fields, where)
        if _given(fields.get("prompt")) and not any(name in fields for name in ("chosen", "rejected")):
            return self._prompt(fields["prompt"], fields, where)
        if "chosen" in fields:
            raise BadInput(f"{where}: has answers that were chosen and rejected; keep one of them as 'completion'")
        named = ", ".join(list(fields)[:8]) or "none"
        raise BadInput(f"{where}: has none of the fields {LAYOUTS} (as text); it has {named}")

    def question(self, asked: str, answer: str, where: str = "question") -> Document:
        """A question and its answer."""
        return self._pair("question", "answer", {"question": asked, "answer": answer}, where)

    def prompt_of(self, asked: str, where: str = "question") -> Document:
        """A question that is still to be answered."""
        if self.plain:
            return Document(_plain("question", asked, ""), (), prompt_only=True)
        return self._prompt([{"role": "user", "content": asked}], {}, where)

    def _pair(self, asked: str, reply: str, fields: Mapping[str, Any], where: str) -> Document:
        prompt, response = fields[asked], fields[reply]
        if fields.get("history"):
            raise BadInput(f"{where}: has a 'history' of earlier turns; put the conversation into 'messages'")
        as_messages = isinstance(prompt, list)
        if as_messages != isinstance(response, list):
            raise BadInput(f"{where}: '{asked}' and '{reply}' must both be text, or both be lists of messages")
        if as_messages:
            return self._conversation([*prompt, *response], fields, where, first=len(prompt))
        _sound(prompt + response, where)
        more = fields.get("input", fields.get("context")) if asked == "instruction" else None
        more = _sound(more, where) if isinstance(more, str) and more.strip() else ""
        if self.plain or ((asked, reply) == ("prompt", "completion") and not self.strings):
            said = _plain(asked, prompt, more)
            document = answered(said, f" {response}" if asked in ("question", "query", "problem") else response)
            spans = _spans(fields, document.text, where) if asked == "prompt" else ()
            return Document(document.text, document.answers, spans)
        if fields.get("spans"):
            raise BadInput(f"{where}: has spans of a text that a template changes; add --prompt-format plain")
        messages = [{"role": "user", "content": f"{prompt}\n\n{more}" if more else prompt}]
        system = fields.get("system", fields.get("system_prompt"))
        if isinstance(system, str) and system.strip():
            messages.insert(0, {"role": "system", "content": system})
        return self._conversation([*messages, {"role": "assistant", "content": response}], fields, where)

    def _prompt(self, prompt: Any, fields: Mapping[str, Any], where: str) -> Document:
        if isinstance(prompt, str):
            _sound(prompt, where)
            if self.plain:
                return Document(prompt, (), prompt_only=True)
            prompt = [{"role": "user", "content": prompt}]
        messages = _messages(prompt, where)
        text = self._rendered(messages, fields.get("tools"), where, ask=True)
        return Document(text, (), complete=True, prompt_only=True)

    def _conversation(self, given: Sequence[Any], fields: Mapping[str, Any], where: str, first: int = 0) -> Document:
        """`first`: turns of the assistant before it belong to the prompt."""
        messages, tools = _messages(given, where), fields.get("tools")
        text = self._rendered(messages, tools, where)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        if first == 0 and _MARKS.search(self._source or ""):
            spans = self._marked(messages, tools, text, where)
        else:
            spans = [self._turn(messages, i, tools, text, where) for i in turns]
        if turns and not spans:
            raise BadInput(f"{where}: the chat template marks nothing of the assistant's turns; mend the template")
        for (_, end), (start, _) in pairwise(spans):
            if start < end:
                raise BadInput(f"{where}: the chat template puts turns into another order, so answers cannot be told")
        return Document(text, tuple(spans), complete=True)

    @property
    def _source(self) -> str | None:
        """The template's text, as far as the tokenizer has only one."""
        found = self.template or (self.tokenizer.chat_template if self.tokenizer is not None else None)
        return found.get("default") if isinstance(found, dict) else found

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, where: str, *, ask: bool = False) -> str:
        if self.plain or self.tokenizer is None:
            raise BadInput(
                f"{where}: has messages, but there is no chat template ({self.name}); give --prompt-format FILE.jinja, "
                "or text instead"
            )
        try:
            how = {"tools": tools or None, "chat_template": self.template, "add_generation_prompt": ask}
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **how))
        except Exception as error:  # a template is the model's own program and may raise anything
            raise BadInput(f"{where}: the chat template refuses these messages ({first_line(error)})") from error

    def _marked(self, messages: list[dict[str, Any]], tools: Any, text: str, where: str) -> list[Span]:
        """What the template itself marks as generated."""
        assert self.tokenizer is not None
        try:
            found = self.tokenizer.apply_chat_template(
                messages, tools=tools or None, chat_template=self.template, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True, tokenizer_kwargs={"return_offsets_mapping": True},
            )  # fmt: skip
            marked = list(zip(found["assistant_masks"], found["offset_mapping"], strict=True))
        except Exception as error:  # as above
            raise BadInput(f"{where}: the chat template refuses these messages ({first_line(error)})") from error
        spans = list[Span]()
        before = False
        for mark, (start, end) in marked:
            if mark and before:
                spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
            elif mark:
                spans.append((start, end))
            before = bool(mark)
        return [(a, b) for a, b in spans if a < b <= len(text)]

    def _turn(self, messages: list[dict[str, Any]], turn: int, tools: Any, text: str, where: str) -> Span:
        """Where a turn of the assistant begins and ends in the whole conversation's text.

        The prompt for it may end with more than the conversation has there (a template that opens "<think>" only for
        generation), and a conversation that goes on may have less of the turn than one that ends with it (reasoning
        that is left out later): what both share decides, checked against the turn's own words.
        """
        prompt = self._rendered(messages[:turn], tools, where, ask=True) if turn else ""
        through = self._rendered(messages[: turn + 1], tools, where)
        start, end = _shared(prompt, text), _shared(through, text)
        words = _words(messages[turn])
        if start < len(prompt) or end < len(through) or not turn:
            floor = _shared(self._rendered(messages[:turn], tools, where), text) if turn else 0
            places = [(place, -len(w)) for w in words if w and (place := text.find(w, floor)) >= 0]
            if not places:
                raise BadInput(
                    f"{where}: the prompt for message {turn + 1} is not how the conversation begins, and its words are "
                    "not found there, so its answer cannot be told; give a template with {% generation %} marks"
                )
            place, length = min(places)
            start = min(start, place) if start >= floor and turn else place
            end = max(end, place - length)
        if not start < end:
            raise BadInput(f"{where}: message {turn + 1} of the assistant is empty; mend or remove it")
        return start, end


def prompt_format(asked: str, tokenizer: PreTrainedTokenizerBase | None) -> PromptFormat:
    """`asked`: auto (the tokenizer's chat template where it has one, else plain), chat, plain, or a file of Jinja.

    Raises BadInput where there is no such template or file.
    """
    has = tokenizer is not None and bool(tokenizer.chat_template)
    if asked == "auto":
        return PromptFormat("chat template of the tokenizer", tokenizer, plain=False) if has else _PLAIN
    if asked == "plain":
        return _PLAIN
    if asked == "chat":
        if not has:
            raise BadInput("prompt-format chat: the model's tokenizer has no chat template; give plain or FILE.jinja")
        return PromptFormat("chat template of the tokenizer", tokenizer, plain=False, strings=True)
    file = Path(asked)
    if file.suffix.lower() not in (".jinja", ".jinja2", ".j2"):
        raise BadInput(f"prompt-format '{asked[:80]}' is unknown; give {FORMATS}")
    if tokenizer is None:
        raise BadInput(f"prompt-format {asked}: the model folder has no tokenizer, which renders templates; add one")
    try:
        template = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompt-format {asked}: cannot be read ({first_line(error)}); mend the path") from error
    digest = hashlib.sha256(template.encode()).hexdigest()[:12]
    return PromptFormat(f"{file.name} ({digest})", tokenizer, plain=False, template=template, strings=True)


_PLAIN = PromptFormat("plain", None)


def _given(value: Any) -> bool:
    return (isinstance(value, str) and bool(value)) or (isinstance(value, list) and bool(value))


def _plain(field: str, prompt: str, more: str) -> str:
    """A prompt as text that ends where its answer begins."""
    if field == "instruction":
        given = f"### Input:\n{more}\n\n" if more else ""
        return f"### Instruction:\n{prompt}\n\n{given}### Response:\n"
    return prompt if field == "prompt" else f"{field.title() if field != 'query' else 'Question'}: {prompt}\nAnswer:"


def _sound(text: str, where: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadInput(f"{where}: has half a surrogate pair, which is no text; mend or remove the line")
    return text


def _messages(given: Sequence[Any], where: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise BadInput(f"{where}: has no messages; give a list of role and content")
    for number, message in enumerate(given, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadInput(f"{where}: message {number} has no role; give role and content, or from and value")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise BadInput(f"{where}: message {number} has no content; give it as text")
        if isinstance(content, str):
            _sound(content, where)
    return [{k: v for k, v in message.items() if v is not None} | {"content": message.get("content") or ""}
            for message in given]  # fmt: skip


def _from_sharegpt(turns: Sequence[Any], fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Messages from turns of "from" and "value"; turns that have a role already stay."""
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return list(turns)
    messages = list[dict[str, Any]]()
    system = fields.get("system", fields.get("system_prompt"))
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise BadInput(f"{where}: turn {number} has no 'from' and 'value'; mend or remove the line")
        role = ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise BadInput(f"{where}: turn {number} is from '{turn['from']}', which is none of {', '.join(ROLES)}")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _words(message: Mapping[str, Any]) -> list[str]:
    """What of a message a template may have put into the text: all of it, or what follows its reasoning."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text", "") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    content = content if isinstance(content, str) else ""
    return list(dict.fromkeys((content, content.strip(), content.rpartition("</think>")[2].strip())))


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _spans(fields: Mapping[str, Any], text: str, where: str) -> tuple[Span, ...]:
    """`spans`, if there are any, as [start, end] in characters of the whole text."""
    spans, last = list[Span](), 0
    given = fields.get("spans", [])
    for span in given if isinstance(given, list) else [given]:
        pair = isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
        if not pair or not last <= span[0] < span[1] <= len(text):
            raise BadInput(
                f"{where}: span {span} must be [start, end] in characters of the text, after the span before it"
            )
        spans.append((span[0], last := span[1]))
    return tuple(spans)

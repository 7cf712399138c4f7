"""From a row's fields to a text: the layouts that people keep prompts, answers and conversations in, and the template
that they are put into.

What counts as an answer is known by character: every turn of the assistant is one. Where a chat template marks what the
assistant generates (`{% generation %}`), those marks decide; otherwise each turn is what the text up to its end has
beyond the text up to the prompt for it.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from calib import BadInput, first_line
from calib.data.conversations import as_messages, is_learned, sound, tools_of, turns_of, with_strings, words_of
from calib.data.records import Row

PROMPT_FORMATS = "auto, chat, plain or a file FILE.jinja"
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
TODAY = datetime.date(2024, 7, 26)  # for templates that ask: the date that Llama's own falls back to
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

MORE = ("context", "input", "choices", "options")  # fields that belong to what is asked

TextSpan = tuple[int, int]  # of characters, the end exclusive


@dataclass(frozen=True)
class Document:
    """A text; the characters of its answers (None: it has no prompt, so all of it counts); given spans of characters.

    `complete`: special tokens stand in the text, so the tokenizer must not add its own. `prompt_only`: what answers it
    is still to be generated. `row`: the row of a file that it was made of, where that is kept.
    """

    text: str
    answers: tuple[TextSpan, ...] | None = None
    spans: tuple[TextSpan, ...] = ()
    complete: bool = False
    prompt_only: bool = False
    row: Row | None = None


def answered(prompt: str, response: str) -> Document:
    """A prompt and what follows it, as they are."""
    return Document(prompt + response, ((len(prompt), len(prompt) + len(response)),))


@dataclass(frozen=True)
class PromptFormat:
    """A way to turn rows with prompts into text: its `name` for reports, and the Jinja template, None for the
    tokenizer's own.

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
        if named := next((name for name in ("images", "image") if fields.get(name)), None):
            raise BadInput(f"{where}: has '{named}', and text alone is read here; leave such rows or the field out")
        if fields.get("label") is False and any(name in fields for name in ("completion", "messages")):
            raise BadInput(f"{where}: has an answer that was rated bad ('label' is false); leave such rows out")
        if (turns := turns_of(fields, where)) is not None:
            return self._conversation(turns, fields, where)
        pair = next((pair for pair in PAIRS if all(_given(fields.get(name)) for name in pair)), None)
        if isinstance(fields.get("text"), str) and (pair is None or "spans" in fields):
            text = sound(fields["text"], where)
            return Document(text, spans=_spans(fields, text, where))
        if pair is not None:  # also where the two stand in one 'text' once more, as in Alpaca's own files
            return self._pair(*pair, fields, where)
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
        further = [name for name in MORE if fields.get(name) and str(fields[name]).strip()]
        used = next((n for n in further if asked == "instruction" and isinstance(fields[n], str)), None)
        if lost := next((name for name in further if name != used), None):
            raise BadInput(f"{where}: has '{lost}', for which '{asked}' + '{reply}' have no place; write it into "
                           f"'{asked}', or remove the field")  # fmt: skip
        if as_messages:
            return self._conversation([*prompt, *response], fields, where, first=len(prompt))
        sound(prompt + response, where)
        more = sound(fields[used], where) if used else ""
        system = fields.get("system", fields.get("system_prompt"))
        system = system if isinstance(system, str) and system.strip() else None
        if self.plain or ((asked, reply) == ("prompt", "completion") and not self.strings):
            if system:
                raise BadInput(f"{where}: has a system prompt, which text without a template has no place for; add "
                               "--prompt-format chat, or remove the field")  # fmt: skip
            answer_text = _plain(asked, prompt, more)
            document = answered(answer_text, f" {response}" if asked in ("question", "query", "problem") else response)
            spans = _spans(fields, document.text, where) if asked == "prompt" else ()
            return Document(document.text, document.answers, spans)
        if fields.get("spans"):
            raise BadInput(f"{where}: has spans of a text that a template changes; add --prompt-format plain")
        messages = [{"role": "user", "content": f"{prompt}\n\n{more}" if more else prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return self._conversation([*messages, {"role": "assistant", "content": response}], fields, where)

    def _prompt(self, prompt: Any, fields: Mapping[str, Any], where: str) -> Document:
        if isinstance(prompt, str):
            sound(prompt, where)
            if self.plain:
                return Document(prompt, (), prompt_only=True)
            prompt = [{"role": "user", "content": prompt}]
        messages = as_messages(prompt, fields, where)
        text = self._rendered(messages, tools_of(fields, where), where, ask=True)
        return Document(text, (), complete=True, prompt_only=True)

    def _conversation(self, given: Sequence[Any], fields: Mapping[str, Any], where: str, first: int = 0) -> Document:
        """`first`: turns of the assistant before it belong to the prompt."""
        messages, tools = as_messages(given, fields, where), tools_of(fields, where)
        try:
            text = self._rendered(messages, tools, where)
        except BadInput:
            if with_strings(messages) == messages:
                raise
            messages = with_strings(messages)
            text = self._rendered(messages, tools, where)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
        learned = [i for i in turns if is_learned(messages[i])]
        if first == 0 and _MARKS.search(self._template(tools, where) or ""):
            spans = self._marked(messages, tools, where)
            others = [self._turn(messages, i, tools, text, where) for i in turns if i not in learned]
            spans = [(a, b) for a, b in spans if not any(a < end and start < b for start, end in others)]
        else:
            spans = [self._turn(messages, i, tools, text, where) for i in learned]
        if learned and not spans:
            raise BadInput(f"{where}: the chat template marks nothing of the assistant's turns; mend the template")
        for (_, end), (start, _) in pairwise(spans):
            if start < end:
                raise BadInput(f"{where}: the chat template puts turns into another order, so answers cannot be told")
        return Document(text, tuple(spans), complete=True)

    def _template(self, tools: Any, where: str) -> str | None:
        """The template that these messages go into, asked for the date of no particular day: rows are the same ones
        whenever a job runs."""
        if self.tokenizer is None:
            return self.template
        try:
            found = str(self.tokenizer.get_chat_template(self.template, tools))
        except Exception as error:  # it has several, and none that is the default
            raise BadInput(f"{where}: the tokenizer has no chat template for it ({first_line(error)})") from error
        return _NOW.sub(lambda match: repr(TODAY.strftime(match[2])), found)

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, where: str, *, ask: bool = False) -> str:
        if self.plain or self.tokenizer is None:
            raise BadInput(
                f"{where}: has messages, but there is no chat template ({self.name}); give --prompt-format FILE.jinja, "
                "or text instead"
            )
        template = self._template(tools, where)
        try:
            options = {"tools": tools, "chat_template": template, "add_generation_prompt": ask}
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # a template is the model's own program and may raise anything
            raise BadInput(f"{where}: the chat template refuses these messages ({first_line(error)})") from error

    def _marked(self, messages: list[dict[str, Any]], tools: Any, where: str) -> list[TextSpan]:
        """What the template itself marks as generated, in characters (which, where a mark ends in white space that the
        tokenizer drops, its mask of tokens does not tell: transformers 47325)."""
        assert self.tokenizer is not None
        try:
            _, marks = render_jinja_template(
                conversations=[messages], tools=tools, chat_template=self._template(tools, where),
                return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception as error:  # as above
            raise BadInput(f"{where}: the chat template refuses these messages ({first_line(error)})") from error
        return [(start, end) for start, end in marks[0] if start < end]

    def _turn(self, messages: list[dict[str, Any]], turn: int, tools: Any, text: str, where: str) -> TextSpan:
        """Where a turn of the assistant begins and ends in the whole conversation's text.

        The prompt for it may end with more than the conversation has there (a template that opens "<think>" only for
        generation), and a conversation that goes on may have less of the turn than one that ends with it (reasoning
        that is left out later): what both share decides, checked against the turn's own words.
        """
        prompt = self._rendered(messages[:turn], tools, where, ask=True) if turn else ""
        through = self._rendered(messages[: turn + 1], tools, where)
        start, end = _shared(prompt, text), _shared(through, text)
        words = words_of(messages[turn])
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
    own = _dated("chat template of the tokenizer", str(tokenizer.chat_template) if tokenizer is not None else "")
    if asked == "auto":
        return PromptFormat(own, tokenizer, plain=False) if has else _PLAIN
    if asked == "plain":
        return _PLAIN
    if asked == "chat":
        if not has:
            raise BadInput("prompt-format chat: the model's tokenizer has no chat template; give plain or FILE.jinja")
        return PromptFormat(own, tokenizer, plain=False, strings=True)
    file = Path(asked)
    if file.suffix.lower() not in (".jinja", ".jinja2", ".j2"):
        raise BadInput(f"prompt-format '{asked[:80]}' is unknown; give {PROMPT_FORMATS}")
    if tokenizer is None:
        raise BadInput(f"prompt-format {asked}: the model folder has no tokenizer, which renders templates; add one")
    try:
        template = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompt-format {asked}: cannot be read ({first_line(error)}); mend the path") from error
    digest = hashlib.sha256(template.encode()).hexdigest()[:12]
    return PromptFormat(
        _dated(f"{file.name} ({digest})", template), tokenizer, plain=False, template=template, strings=True
    )


_PLAIN = PromptFormat("plain", None)


def _dated(name: str, template: str) -> str:
    return f"{name}, dated {TODAY}" if _NOW.search(template) else name


def _given(value: Any) -> bool:
    return (isinstance(value, str) and bool(value)) or (isinstance(value, list) and bool(value))


def _plain(field: str, prompt: str, more: str) -> str:
    """A prompt as text that ends where its answer begins."""
    if field == "instruction":
        given = f"### Input:\n{more}\n\n" if more else ""
        return f"### Instruction:\n{prompt}\n\n{given}### Response:\n"
    return prompt if field == "prompt" else f"{field.title() if field != 'query' else 'Question'}: {prompt}\nAnswer:"


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    if b.startswith(a):
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _spans(fields: Mapping[str, Any], text: str, where: str) -> tuple[TextSpan, ...]:
    """`spans`, if there are any, as [start, end] in characters of the whole text."""
    spans, last = list[TextSpan](), 0
    given = fields.get("spans", [])
    for span in given if isinstance(given, list) else [given]:
        pair = isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
        if not pair or not last <= span[0] < span[1] <= len(text):
            raise BadInput(
                f"{where}: span {span} must be [start, end] in characters of the text, after the span before it"
            )
        spans.append((span[0], last := span[1]))
    return tuple(spans)

"""Conversations as chat templates take them: lists of messages of a role and a content, from the layouts people have.

What means the same is made the same: ShareGPT's from and value, other names of the roles, a content in parts of text,
arguments of tool calls as JSON in a string. What cannot be put into text, such as an image, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from calib import BadInput

ROLES = {  # of ShareGPT's "from" -> a message's role
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(
        ("gpt", "assistant", "chatgpt", "model", "bot", "ai", "bing", "bard", "function_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
    "system": "system",
}
ALIASES = ("human", "gpt", "chatgpt", "model", "bot", "ai")  # that are found as roles of messages too
NOT_LEARNED = ("weight", "train", "training", "trainable", "loss")  # a turn that has 0 or false there is no target


def sound(text: str, where: str) -> str:
    """The text.  Raises BadInput where half of a surrogate pair stands in it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadInput(f"{where}: has half a surrogate pair, which is no text; mend or remove the line")
    return text


def as_messages(given: Sequence[Any], fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Messages with role and content.  Turns of from and value get the row's system prompt before them, where the row
    has one.  Raises BadInput, naming the message."""
    if not isinstance(given, list) or not given:
        raise BadInput(f"{where}: has no messages; give a list of role and content")
    if any(isinstance(turn, dict) and "from" in turn and "role" not in turn for turn in given):
        given = _from_sharegpt(given, fields, where)
    return [_message(message, f"{where}: message {number}", where) for number, message in enumerate(given, 1)]


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether a message is a target: the assistant's, unless it says otherwise (weight 0, train false)."""
    marks = [message[name] for name in NOT_LEARNED if name in message]
    return message["role"] == "assistant" and not any(mark in (0, False) for mark in marks)


def with_strings(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Arguments of tool calls as JSON in strings again, for templates that put them together as text."""

    def back(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
            return call
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        dict(message) | ({"tool_calls": [back(call) for call in calls]} if isinstance(calls, list) else {})
        for message in messages
        for calls in [message.get("tool_calls")]
    ]


def turns_of(fields: Mapping[str, Any], where: str) -> list[Any] | None:
    """The conversation of a row that has one; a table may keep it as JSON in a string."""
    for name in ("messages", "conversations", "conversation"):
        given = fields.get(name)
        if isinstance(given, str) and given.lstrip().startswith("["):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where}: '{name}' is text and no JSON ({error}); give a list of messages") from error
        if isinstance(given, list):
            return given
    return None


def tools_of(fields: Mapping[str, Any], where: str) -> list[Any] | None:
    """The tools that a row says the model has; a table keeps them as JSON in a string."""
    tools = fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: 'tools' is text and no JSON ({error}); give a list of tools") from error
    if tools and not isinstance(tools, list):
        raise BadInput(f"{where}: 'tools' is no list; give a list of tools, or leave it out")
    return tools or None


def words_of(message: Mapping[str, Any]) -> list[str]:
    """Texts of a message that a template may have put into the conversation: the whole message, and what follows its
    reasoning."""
    content = str(message.get("content") or "")
    return list(dict.fromkeys((content, content.strip(), content.rpartition("</think>")[2].strip())))


def _from_sharegpt(turns: Sequence[Any], fields: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
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
        marks = {name: turn[name] for name in NOT_LEARNED if name in turn}
        messages.append({"role": role, "content": turn["value"], **marks})
    return messages


def _message(given: Any, place: str, where: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise BadInput(f"{place} has no role; give role and content, or from and value")
    content = given.get("content")
    if not isinstance(content, str | list) and not (content is None and given.get("tool_calls")):
        raise BadInput(f"{place} has no content; give it as text")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    role = given["role"]
    message = {name: value for name, value in given.items() if value is not None}
    message |= {"role": ROLES[role.lower()] if role.lower() in ALIASES else role, "content": content or ""}
    sound(message["content"], where)
    if isinstance(calls := given.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _part(part: Any, place: str) -> str:
    """The text of a part of a content."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) else None
    if isinstance(text, str) and part.get("type", "text") == "text":
        return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise BadInput(f"{place} has a part of type '{kind}', and only text is read; remove it, or the line")


def _call(call: Any) -> Any:
    """A tool call with its arguments as an object, which templates turn into JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call

"""Conversations as calibration text: rows with ``messages`` or ``conversations``, written by the chat template."""

import json
from typing import Any

# field of a row -> (its role, its words, names of the roles as templates know them)
_FORMS: dict[str, tuple[str, str, dict[str, str]]] = {
    "messages": ("role", "content", {}),
    "conversations": ("from", "value", {"human": "user", "gpt": "assistant"}),  # ShareGPT
}
CHAT_FIELDS = tuple(_FORMS)


class Chat(str):
    """A document that is one conversation: its turns as JSON."""

    __slots__ = ()

    def render(self, tokenizer: Any) -> str:
        """The conversation as the tokenizer's chat template writes it, special tokens included.

        Raises:
            ValueError: when there is no template, or it does not take these turns.
        """
        shown = self if len(self) <= 80 else f"{self[:80]}..."
        if not tokenizer.chat_template:
            raise ValueError(f"the model has no chat template for the conversation {shown}; name text instead")
        try:
            return str(tokenizer.apply_chat_template(json.loads(self), tokenize=False))
        except Exception as error:  # whatever a template raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the conversation {shown} does not fit the model's chat template ({reason}); remove it"
            ) from None


def chat_of(row: dict[str, Any], place: str) -> Chat | None:
    """The conversation in a row of a data set; None where it holds none.

    Raises:
        ValueError: when a turn lacks its role or words; ``place`` says where.
    """
    for field, (role, words, names) in _FORMS.items():
        if field not in row:
            continue
        turns = row[field]
        if not isinstance(turns, list) or not turns or not all(_complete(turn, role, words) for turn in turns):
            raise ValueError(
                f"{place}: {field} must be a list of turns with {role!r} and {words!r}, both text; mend it"
            )
        messages = [{"role": names.get(turn[role], turn[role]), "content": turn[words]} for turn in turns]
        return Chat(json.dumps(messages, ensure_ascii=False))
    return None


def _complete(turn: Any, *fields: str) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(field), str) for field in fields)

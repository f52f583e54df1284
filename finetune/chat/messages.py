"""The one form that every data row takes before it is rendered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

# Keys of a message that speak to us and are never shown to the template:
#   train  the user's flag: False keeps an assistant message out of the loss, True takes it in whatever `train_on` says
#   raw    a sharegpt function call as it was written, for templates that know no tool calls
OWN_KEYS = ("train", "raw")
# Keys that hold what an assistant thought before it answered, by what different templates and APIs call it.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Keys that messages have in OpenAI's form. Any other reaches the model only if the template asks for it.
KNOWN_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS, *OWN_KEYS)


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, checked.

    Attributes:
        messages: Each with `role` (one of ROLES) and `content` (text; absent only beside `tool_calls`).
            Arguments of tool calls are objects, not JSON text.
        tools: Tool definitions shown to the model, or None.
        source: "file:row", for messages to the user.
        given: How many first messages are a prompt: an answer among them is trained on only if its own flag says so.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    source: str
    given: int = 0


@dataclass(frozen=True)
class PlainText:
    """Text that the model sees as it is, without the chat template, and with the end-of-text token behind it.

    Attributes:
        prompt: What is not trained on; None where all is.
        completion: What is, with the end of text.
        source: "file:row".
    """

    prompt: str | None
    completion: str
    source: str


@dataclass(frozen=True)
class Preference:
    """A prompt and two ways to answer it.

    Attributes:
        prompt: Ends with a user or tool message.
        chosen: Messages that follow the prompt, the first from the assistant; the better answer.
        rejected: The same for the worse answer.
        source: "file:row".
    """

    prompt: Conversation
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    source: str

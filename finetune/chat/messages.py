"""The one form that every data row takes before it is rendered."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("system", "user", "assistant", "tool")

# Keys of a message that speak to us and are never shown to the template:
#   train  the user's flag: False keeps an assistant message out of the loss, True takes it in whatever `train_on` says
#   raw    a sharegpt function call as it was written, for templates that know no tool calls
OWN_KEYS = ("train", "raw")


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, checked.

    Attributes:
        messages: Each with `role` (one of ROLES) and `content` (text; absent only beside `tool_calls`).
            Arguments of tool calls are objects, not JSON text.
        tools: Tool definitions shown to the model, or None.
        source: "file:row", for messages to the user.
    """

    messages: list[dict]
    tools: list[dict] | None
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
    chosen: list[dict]
    rejected: list[dict]
    source: str

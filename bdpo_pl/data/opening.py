"""The end of a generation prompt: the text that closes the last message and opens the assistant's turn."""

from __future__ import annotations

from bdpo_pl.data.chat_template import ChatTemplate, Conversation

# Any words will do that occur in no template and that templates leave unchanged.
_MARK = "zqlastqz"


def opening_of(template: ChatTemplate, prompt: Conversation, opened: str) -> str | None:
    """Return the text that follows the last message's words in a generation prompt; None if it is not found.

    Args:
        template: template that renders the conversations.
        prompt: conversation up to where the assistant's turn begins.
        opened: generation prompt of `prompt`.
    """
    facts = template.facts(prompt)
    after_user = facts.after_user if facts is not None and opened.endswith(facts.after_user) else None
    last = prompt.messages[-1]
    if last["role"] == "user" and after_user is not None:
        return after_user
    # Templates may close a tool's turn with another text than a user's.
    marked = Conversation([*prompt.messages[:-1], {**last, "content": _MARK}], prompt.tools, prompt.kwargs)
    try:
        _, found, after = template.prompt(marked).rpartition(_MARK)
    except Exception:  # a template may refuse any conversation, with an error of its own
        return after_user
    return after if found and opened.endswith(after) else after_user

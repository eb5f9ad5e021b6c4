"""Chat templates, and chats for them."""

from __future__ import annotations

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Renders the end of the prompt differently once an answer follows.
THINKING = PLAIN.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>{% endif")
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% if shout %}LOUD {% endif %}" + PLAIN


def said(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """A chat of these messages, user and assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]

"""Chat templates, and the words of a prompt that count as the question."""

from typing import Literal, get_args

# Jinja over chat messages: images first, then the text of a turn
LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# name of a template that can replace the checkpoint's own -> template
PROMPTS = {
    # conversation vicuna_v1 of the original LLaVA: its system sentence, then the turns
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. " + LLAVA
}

TextScope = Literal["question", "question_stripped", "all_text"]
SUFFIX = "\nAnswer the question using a single word or phrase."


def question_text(words: str, scope: TextScope, prompt: str) -> str:
    """The text that text-aware methods compare with.

    Args:
        words: the text of the user's turn, without template, roles or image placeholders.
        scope: `question`: all of it. `question_stripped`: without the instruction `SUFFIX` at its
            end, as CDPruner released it. `all_text`: the whole prompt.
        prompt: the whole prompt, template included, without image placeholders.

    Raises:
        ValueError: another scope.
    """
    if scope not in get_args(TextScope):
        raise ValueError(f"text_scope={scope!r} is not one of {', '.join(get_args(TextScope))}")
    if scope == "all_text":
        return prompt
    return words.removesuffix(SUFFIX) if scope == "question_stripped" else words

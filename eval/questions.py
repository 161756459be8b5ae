"""Which words of a prompt count as the question, for methods that read it."""

from typing import Literal, get_args

Scope = Literal["question", "question_stripped", "all_text"]
SUFFIX = "\nAnswer the question using a single word or phrase."


def question_text(words: str, scope: Scope, prompt: str) -> str:
    """The text that text-aware methods compare with.

    Args:
        words: what the user's turn says, without template, roles or image placeholders.
        scope: `question`, all of it; `question_stripped`, without the instruction `SUFFIX` at its end, as CDPruner released it;
            `all_text`, the whole prompt.
        prompt: the whole prompt, template included, without image placeholders.

    Raises:
        ValueError: another scope.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"text_scope={scope!r} is not one of {', '.join(get_args(Scope))}")
    if scope == "all_text":
        return prompt
    return words.removesuffix(SUFFIX) if scope == "question_stripped" else words

"""Which words of a prompt count as the question."""

import pytest

from secateur.prompts import SUFFIX, question_text

PROMPT = f"A chat. USER: \nIs there a cat?{SUFFIX} ASSISTANT:"


@pytest.mark.parametrize(
    ("words", "stripped"),
    [
        (f"Is there a cat?{SUFFIX}", "Is there a cat?"),
        ("Is there a cat?", "Is there a cat?"),
        (SUFFIX, ""),
        # what else a task tells the model is part of the question, and so is the instruction
        # elsewhere in the prompt
        (f"What is it?\nOr say 'Unanswerable'.{SUFFIX}", "What is it?\nOr say 'Unanswerable'."),
        (f"What is it?{SUFFIX}\nA. a cat", f"What is it?{SUFFIX}\nA. a cat"),
        ("Which?\nAnswer with the option's letter from the given choices directly.",) * 2,
        (f"Which?{SUFFIX}{SUFFIX}", f"Which?{SUFFIX}"),
    ],
)
def test_only_the_instruction_at_the_end_is_stripped(words, stripped):
    assert question_text(words, "question", PROMPT) == words
    assert question_text(words, "question_stripped", PROMPT) == stripped
    assert question_text(words, "all_text", PROMPT) == PROMPT


def test_other_scopes_are_refused():
    with pytest.raises(
        ValueError, match="text_scope='answer' is not one of question, question_stripped, all_text"
    ):
        question_text("", "answer", "")

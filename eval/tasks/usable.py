"""Whether a task's own scoring could read an answer, with the parsers of lmms-eval.

An answer without text is unusable in every task; `Task.is_usable` adds that.
"""

import ast
import random
from collections.abc import Mapping
from typing import Any

Sample = Mapping[str, Any]  # a scored document as lmms-eval logs it


def answer(sample: Sample) -> str:
    """The text that the task scored."""
    return str(sample["filtered_resps"][0])


def pope(sample: Sample) -> bool:
    """The whole answer is yes or no, whatever the case."""
    return sample["pope_accuracy"]["prediction"] in ("yes", "no")


def mme(sample: Sample) -> bool:
    """Yes or no in the first four characters, or y or n alone."""
    from lmms_eval.tasks.mme.utils import parse_pred_ans  # lmms-eval takes seconds to import

    return parse_pred_ans(answer(sample)) != "other"


def scienceqa(sample: Sample) -> bool:
    """The letter of an option alone, or in upper case with a full stop and any text after it."""
    letters = "abcdefghijklmnopqrstuvwxyz"[: len(sample["doc"]["choices"])]
    text = answer(sample).strip()
    if len(text) >= 2 and text[0].isupper() and text[1] == ".":
        text = text[0]
    return len(text) == 1 and text.lower() in letters


def mmstar(sample: Sample) -> bool:
    """A letter from A to D, in one of the many forms that lmms-eval looks for."""
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

    return extract_mcq_answer(answer(sample), choices=["A", "B", "C", "D"]) != ""


def mmmu(sample: Sample) -> bool:
    """The option was found, not drawn at random. Any text answers an open question."""
    from lmms_eval.tasks.mmmu.utils import get_multi_choice_info, parse_multi_choice_response

    if sample["doc"]["question_type"] != "multiple-choice":
        return True
    contents, letters = get_multi_choice_info(ast.literal_eval(sample["doc"]["options"]))
    # the parser does not say that it draws; the state of the generator tells
    before = random.getstate()
    parse_multi_choice_response(answer(sample), letters, contents)
    found = random.getstate() == before
    random.setstate(before)
    return found


def mmbench(sample: Sample) -> bool:
    """A letter of an option, or the text of one option, as lmms-eval's static scoring looks."""
    import pandas as pd
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    item = pd.Series(sample["gpt_eval_score"])
    if mmbench_evaluator.prefetch_answer(item):
        return True
    letters = sorted(mmbench_evaluator.build_choices(item))
    return bool(extract_mcq_answer(item["prediction"], choices=letters))


def seedbench(sample: Sample) -> bool:
    """A letter from A to D comes first."""
    return answer(sample).strip()[:1].upper() in set("ABCD")


def ai2d(sample: Sample) -> bool:
    """The letter of an option alone, once lmms-eval's filter has read "A." at the start."""
    letters = "abcdefghijklmnopqrstuvwxyz"[: len(sample["doc"]["options"])]
    text = answer(sample).strip().strip(".,!?;:()\"'").lower()
    return len(text) == 1 and text in letters


def hrbench(sample: Sample) -> bool:
    """One option's letter, or the text of one option."""
    from lmms_eval.tasks.hrbench.utils import hrbench_doc_to_options, hrbench_evaluator

    found = hrbench_evaluator.can_infer(answer(sample), hrbench_doc_to_options(sample["doc"]))
    return found not in (False, "Z")


def xlrs(sample: Sample) -> bool:
    """A letter from A to E anywhere."""
    from lmms_eval.tasks.xlrs.mcq_utils import extract_characters_regex

    return extract_characters_regex(answer(sample)) != ""

"""Fields that replace those of lmms-eval's YAML files, for tasks that papers score in another way.

Each function here gives such fields. The parts are lmms-eval's own wherever it has them.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def textvqa_ocr() -> dict[str, Any]:
    """TextVQA with the data set's OCR words in the prompt, as in the original LLaVA."""
    return {
        "lmms_eval_specific_kwargs": {
            "default": {
                "pre_prompt": "",
                "post_prompt": "\nAnswer the question using a single word or phrase.",
                "ocr": True,
            }
        }
    }


def mmbench_cn_static() -> dict[str, Any]:
    """The Chinese MMBench scored as the English static one: no model reads the answers."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_aggregate_dev_results_static

    return {
        "metric_list": [
            {
                "metric": "gpt_eval_score",
                "aggregation": mmbench_aggregate_dev_results_static,
                "higher_is_better": True,
            }
        ]
    }


def seedbench_images() -> dict[str, Any]:
    """The documents of SEED-Bench that show an image, without those that show a video."""
    from lmms_eval.tasks.seedbench.utils import seed_aggregation_result

    return {
        "process_docs": _only_images,
        "metric_list": [
            {
                "metric": "seed_image",
                "aggregation": seed_aggregation_result,
                "higher_is_better": True,
            }
        ],
    }


def _only_images(dataset: Any) -> Any:
    kinds = dataset["data_type"]
    return dataset.select([row for row, kind in enumerate(kinds) if kind == "image"])


def ocrbench_reset() -> dict[str, Any]:
    """OCRBench with its counts set to zero first: lmms-eval adds to them in every evaluation."""
    from lmms_eval.tasks.ocrbench import utils

    def aggregate(results: Sequence[Mapping[str, Any]], args: Any) -> float:
        utils.OCRBench_score.update(dict.fromkeys(utils.OCRBench_score, 0))
        return utils.ocrbench_aggregate_accuracy(results, args)

    return {
        "metric_list": [
            {"metric": "ocrbench_accuracy", "aggregation": aggregate, "higher_is_better": True}
        ]
    }


def hrbench_static() -> dict[str, Any]:
    """HR-Bench where an answer that names no option is wrong; lmms-eval would ask a model."""
    return {"process_results": _hrbench_results}


def _hrbench_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    from lmms_eval.tasks.hrbench.utils import hrbench_doc_to_options, hrbench_evaluator

    found = hrbench_evaluator.can_infer(results[0].strip(), hrbench_doc_to_options(doc))
    scored = {
        "index": doc["index"],
        "cycle_category": doc["cycle_category"],
        "gpt_score": int(str(found).lower() == doc["answer"].lower()),
    }
    return {doc["category"]: scored, "average": scored}

"""Documents as the model gets them: their tensors, and the order in which they are answered."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.protocol import ChatMessages
from PIL import ImageFile
from torch import Tensor
from transformers import BatchFeature

from secateur.cache import EncodeCache
from secateur.inputs import Inputs, Prompt
from secateur.tasks import TASKS


class DocumentError(RuntimeError):
    """An error while documents were prepared or answered. Its message names them."""

    def __init__(self, documents: Iterable[str], error: Exception) -> None:
        super().__init__(f"{', '.join(documents)}: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class Request:
    """A document to answer."""

    task: str
    doc_id: int
    text: str
    question: str
    images: int
    image_key: str  # equal for documents with equal images in the same order
    inputs: BatchFeature
    visual: int  # placeholders of its images
    prefix: int  # length of the prompt up to its last placeholder; 0 without one
    new_tokens: int

    @property
    def name(self) -> str:
        """How messages and samples name the document."""
        return f"{self.task}/{self.doc_id}"


@dataclass(frozen=True)
class _Words:
    """What is kept of every document; it is small beside the tensors."""

    text: str
    question: str
    images: int
    image_key: str


class Documents:
    """Prepares documents, and keeps tensors for later cells: those of images once per image.

    Args:
        limit_bytes: of the tensors that are kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.tensors = EncodeCache(limit_bytes)
        self._words: dict[str, _Words] = {}
        # per task: the data set of these documents, and a number for it
        self._data: dict[str, tuple[Any, int]] = {}

    def request(self, request: Instance, data: Any, inputs: Inputs, most: int | None) -> Request:
        """A document with its tensors.

        Args:
            data: the data set that holds the document.
            most: upper limit of new tokens; None: only the task's.

        Raises:
            ValueError: the task asks for sampling or beam search.
            DocumentError: the document could not be prepared.
        """
        _, doc_to_messages, options, doc_id, task, _ = request.args
        if options.get("num_beams", 1) != 1 or (options.get("temperature") or 0) > 0:
            raise ValueError(f"task {task} asks for {options}; pruned models generate greedily")
        # a task of the same name may have other documents than before
        if task not in self._data or self._data[task][0] is not data:
            self._data[task] = (data, len(self._words))
        key = f"{self._data[task][1]} {task} {doc_id} {inputs.layout}"

        @cache
        def prompt() -> Prompt:
            return inputs.prompt(ChatMessages(messages=doc_to_messages(_document(data, doc_id))))

        try:
            words, tensors = self._prepared(key, prompt, inputs)
        except Exception as error:
            raise DocumentError([f"{task}/{doc_id}"], error) from error
        places = (tensors["input_ids"][0] == inputs.placeholder).nonzero()
        new_tokens = options.get("max_new_tokens", inputs.family.NEW_TOKENS)
        return Request(
            task,
            doc_id,
            words.text,
            words.question,
            words.images,
            words.image_key,
            BatchFeature(tensors),
            len(places),
            int(places[-1]) + 1 if len(places) else 0,
            min(new_tokens, most or new_tokens),
        )

    def _prepared(self, key: str, prompt: Any, inputs: Inputs) -> tuple[_Words, dict[str, Tensor]]:
        """A document's words and tensors; `prompt()` is called for what is not kept."""
        if key not in self._words:
            own = prompt()
            self._words[key] = _Words(own.text, own.question, len(own.images), own.image_key())
        words = self._words[key]
        images = {}
        if words.images:
            name = f"images {inputs.layout} {words.image_key}"
            images = dict(self.tensors.fetch(name, lambda: inputs.images(prompt())))
        places = images.pop("places", None)
        if places is None:  # without images, or their placeholders touch
            text = self.tensors.fetch(key, lambda: inputs.without_images(prompt()))
        else:
            text = self.tensors.fetch(key, lambda: inputs.text(words.text, places.tolist()))
        return words, {**text, **images}


def by_image(requests: list[Instance], data: Any) -> list[list[Instance]]:
    """Requests of one task in groups that probably share their images, in order of appearance.

    The data set's own names of images decide, since they are read without decoding an image. It is
    an order of work, not a claim that pixels are equal.
    """
    entry = TASKS.get(requests[0].args[4])  # none for other tasks on lmms-eval's command line
    field = entry.image_field if entry else None
    known = field in (getattr(data, "column_names", None) or ())
    names = data[field] if known else None
    groups: dict[str, list[Instance]] = {}
    for request in requests:
        doc_id = request.args[3]
        groups.setdefault(str(doc_id if names is None else names[doc_id]), []).append(request)
    return list(groups.values())


def _document(data: Any, doc_id: int) -> Any:
    """A document of a data set with its images decoded.

    Raises:
        ValueError: an image is truncated or damaged. lmms-eval sets Pillow to fill what is missing
            with grey.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        return data[doc_id]
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(
            f"an image of the document is truncated or damaged ({error}): remove the data set's "
            "files from suite.data_root, or from the cache of the hub, and download them again"
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before

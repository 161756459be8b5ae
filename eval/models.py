"""The model class that lmms-eval calls: a pruned model. Any error in a document is raised."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import ImageFile
from torch import Tensor
from transformers import BatchFeature, GenerationConfig

from secateur import source
from secateur.answers import Unanswered
from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.checkpoints import fingerprint
from secateur.families import family_of
from secateur.injection import PromptAudit, Sample, Trace, inject
from secateur.injection.clip import ClipRelevance
from secateur.injection.encoder import ImageCache
from secateur.injection.session import Layout, Positions, adapter_for
from secateur.inputs import Inputs
from secateur.loading import load
from secateur.prompts import TextScope
from secateur.pruners import InLLMPruner, Pruner, build

log = logging.getLogger(__name__)
# of the libraries that compute the cached tensors
VERSION = f"torch {torch.__version__} transformers {transformers.__version__}"

# generation defaults that decide no greedy answer here: `generate` gets its own, or ignores them
_HARMLESS = {
    *("_from_model_config", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens"),
    *("do_sample", "temperature", "top_k", "top_p", "output_attentions", "output_hidden_states"),
}


@dataclass(frozen=True)
class Answer:
    """One generated answer with its audit."""

    text: str
    prompt: str
    seconds: float  # its equal share of its batch's time
    new_tokens: int
    cut_off: bool  # ended by the limit of new tokens, not by an end token
    audit: PromptAudit


class DocumentError(RuntimeError):
    """An error while documents were prepared or answered. Its message names them."""

    def __init__(self, documents: Iterable[str], error: Exception) -> None:
        super().__init__(f"{', '.join(documents)}: {type(error).__name__}: {error}")


class _FiniteCheck:
    """A forward hook: finds rows whose logits of the last position are not finite.

    It reads the model's own logits, since logits processors write -inf. The result stays on the
    model's device until `rows` is called.
    """

    def __init__(self) -> None:
        self._broken: Tensor | None = None  # [B]

    def __call__(self, _module: Any, _args: Any, output: Any) -> None:
        broken = ~output.logits[:, -1].isfinite().all(-1)
        self._broken = broken if self._broken is None else self._broken | broken

    def rows(self) -> list[int]:
        """Numbers of the rows that had a logit that is not finite."""
        return [] if self._broken is None else self._broken.nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class _Request:
    """A document to answer."""

    task: str
    doc_id: int
    text: str
    question: str
    images: int
    inputs: BatchFeature
    new_tokens: int


class PrunedModel(lmms):
    """A vision-language model with a pruner before or inside its language model, for lmms-eval.

    Unpruned until `use` sets a method; a change of method does not load the model again. Images
    are encoded one at a time, so that neither batches nor the cache change an answer.

    Args:
        pretrained: hub id, or a folder: absolute, or relative to the working directory or the
            project.
        name: of the config; with random weights it decides the geometry.
        family: required family of the checkpoint: llava, llava_next, qwen2_vl or qwen2_5_vl;
            None: any.
        weights: `pretrained`, or `random` at the geometry of `name`, without a download and with
            a tokenizer of bytes.
        revision, dtype, attn_implementation: as in transformers.
        device: `auto` takes CUDA if there is a GPU, else the CPU.
        resize: backend of the image processor; None: transformers' default.
        min_pixels, max_pixels: Qwen's limits of an image's size; None: the checkpoint's.
        prompt, geometry, layout, image_side, text_scope: see `secateur.inputs.Inputs`.
        unpruned_layout: the layout for pruner `none`; None: the same as for the others.
        max_new_tokens: upper limit of tokens per answer; None: the task's limit, or that of
            lmms-eval's own classes if the task has none.
        generation: `checkpoint` answers with the generation defaults of the checkpoint, such as
            repetition_penalty, as lmms-eval's own classes do; `greedy` ignores them.
        clip: checkpoint with the text tower for methods with relevance_space=clip; loaded when
            the first of them is used.
        batch_tokens: positions of pruned prompts that are generated together; 0: one prompt at a
            time.
        cache: of the image encoder's output; None: no cache.

    Raises:
        FileNotFoundError: the checkpoint is neither on disk nor reachable, or a file is damaged.
        ValueError: a value that makes no sense for the family.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        name: str = "",
        family: str | None = None,
        weights: Literal["pretrained", "random"] = "pretrained",
        revision: str = "main",
        dtype: str = "auto",
        attn_implementation: str | None = "sdpa",
        device: str = "auto",
        prompt: str = "hub",
        geometry: Literal["processor", "pad"] = "processor",
        resize: Literal["pil", "torchvision"] | None = None,
        layout: Layout | None = None,
        unpruned_layout: Layout | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        image_side: int | None = None,
        text_scope: TextScope = "question",
        max_new_tokens: int | None = None,
        generation: Literal["checkpoint", "greedy"] = "checkpoint",
        clip: str | None = None,
        batch_tokens: int = 0,
        cache: EncodeCache | None = None,
    ) -> None:
        super().__init__()
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        # some modules of lmms-eval switch TF32 on, which changes greedy choices
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        model, processor = load(
            pretrained, name, weights, revision, dtype, attn_implementation, self.device, resize
        )
        self.model: Any = model
        if generation == "greedy":
            own = model.generation_config
            model.generation_config = GenerationConfig(
                bos_token_id=own.bos_token_id,
                eos_token_id=own.eos_token_id,
                pad_token_id=own.pad_token_id,
            )
        self.family = self.model.config.model_type
        if family not in (None, self.family):
            raise ValueError(
                f"model.family={family} but {pretrained} holds a model of type {self.family!r}"
            )
        family_of(self.family).limit_pixels(processor, min_pixels, max_pixels)
        self._layout, self._unpruned_layout = layout, unpruned_layout or layout
        self._inputs = {
            each: Inputs(
                processor, self.model.config, prompt, geometry, each, image_side, text_scope
            )
            for each in (layout, self._unpruned_layout)
        }
        # here, since it may warn about transformers: later lmms-eval's output is captured
        adapter_for(model, layout)
        self.tokenizer: Any = self._inputs[layout].processor.tokenizer
        self._clip_name, self._most = clip, max_new_tokens
        self._clip: ClipRelevance | None = None
        self.batch_tokens = batch_tokens
        self._identity = (
            f"{fingerprint(pretrained, revision)} {source.code()} {name} {weights} {dtype} "
            f"{attn_implementation} "
            f"{self.device} {VERSION}"
        )
        # Inputs of documents for later cells of the same task: tensors take a quarter of the
        # cache's memory; texts are small.
        self._prepared = EncodeCache(cache.limit_bytes // 4 if cache else 0)
        self._words: dict[str, tuple[str, str, int]] = {}
        # per task: the data set of these documents, and a number for it
        self._data: dict[str, tuple[Any, int]] = {}
        self.images = ImageCache(cache or EncodeCache(0), self._identity)
        self.images.cache.device = self.device
        self.on_answer: Callable[[], None] = lambda: None
        self.use(build("none"), Budget(), None)

    def use(
        self, pruner: Pruner | InLLMPruner, budget: Budget, positions: Positions | None
    ) -> None:
        """Answer all documents with this method from now on; forgets the answers so far.

        `positions` is for methods before the language model; those inside it have their own field.

        Raises:
            ValueError: the model's limits leave every image fewer tokens than the budget.
        """
        layout = self._unpruned_layout if pruner.name == "none" else self._layout
        self.inputs = self._inputs[layout]
        self.images.model = f"{self._identity} {layout}"
        self._method: dict[str, Any] = {
            "pruner": pruner,
            "budget": budget,
            "positions": None if isinstance(pruner, InLLMPruner) else positions,
            "layout": layout,
            "clip": self._relevance(pruner),
        }
        self.answers: dict[tuple[str, int], Answer] = {}
        self.shard = (0, 1)  # (index, count): documents with doc_id % count == index
        if self._least_tokens:
            self.inputs.family.check_budget(
                self.inputs.processor, self._least_tokens, self.inputs.image_side
            )

    @property
    def _least_tokens(self) -> int:
        """How many tokens an image must have for the budget; 0: any number will do."""
        return 0 if self.method.name == "none" else self._method["budget"].tokens or 0

    def _relevance(self, pruner: Pruner | InLLMPruner) -> ClipRelevance | None:
        if self._clip_name is None or not pruner.needs & {"clip_patches", "clip_text"}:
            return None
        if self._clip is None:
            self._clip = ClipRelevance.from_pretrained(self._clip_name, device=self.device)
        return self._clip

    @property
    def method(self) -> Pruner | InLLMPruner:
        """The method in use."""
        return self._method["pruner"]

    def generation_defaults(self) -> dict[str, Any]:
        """The generation defaults in use that can change a greedy answer, such as penalties."""
        changed = self.model.generation_config.to_diff_dict()
        return {name: value for name, value in changed.items() if name not in _HARMLESS}

    def clean(self) -> None:
        """Keeps the model: lmms-eval calls this after every evaluation; the next cell needs it."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("pruned models answer tasks of type generate_until only")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("pruned models answer tasks of type generate_until only")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer greedily every request of the shard that has no answer yet.

        Raises:
            ValueError: the task asks for sampling or beam search.
            DocumentError: a document could not be prepared or answered, or its logits are not
                finite.
            Unanswered: documents of other shards have no answers yet.
        """
        number, count = self.shard
        wanted = [(task, doc_id) for *_, doc_id, task, _ in (request.args for request in requests)]
        pairs = zip(requests, wanted, strict=True)
        missing = [
            request
            for request, key in pairs
            if key not in self.answers and key[1] % count == number
        ]
        with inject(self.model, **self._method, cache=self.images) as trace:
            for batch in self._batches(map(self._request, missing)):
                self._answer(batch, trace)
        if others := sum(key not in self.answers for key in wanted):
            raise Unanswered(f"{others} of {len(wanted)} documents wait for the other shards")
        done = [self.answers[key] for key in wanted]
        return [
            GenerationResult(text=a.text, token_counts=TokenCounts(output_tokens=a.new_tokens))
            for a in done
        ]

    def _request(self, request: Instance) -> _Request:
        _, doc_to_messages, options, doc_id, task, split = request.args
        if options.get("num_beams", 1) != 1 or (options.get("temperature") or 0) > 0:
            raise ValueError(f"task {task} asks for {options}; pruned models generate greedily")
        data = self.task_dict[task][split]
        # a task of the same name may have other documents than before
        if task not in self._data or self._data[task][0] is not data:
            self._data[task] = (data, len(self._words))
        key = f"{self._data[task][1]} {task} {doc_id} {self.inputs.layout}"

        def prepare() -> dict[str, Tensor]:
            prompt = self.inputs.prompt(
                ChatMessages(messages=doc_to_messages(_document(data, doc_id)))
            )
            self._words[key] = (prompt.text, prompt.question, len(prompt.images))
            return dict(self.inputs(prompt))

        try:
            inputs = BatchFeature(self._prepared.fetch(key, prepare))
            if self._least_tokens:
                self.inputs.family.check_images(self.inputs.processor, self._least_tokens, inputs)
        except Exception as error:
            raise DocumentError([_name(task, doc_id)], error) from error
        new_tokens = options.get("max_new_tokens", self.inputs.family.NEW_TOKENS)
        return _Request(
            task, doc_id, *self._words[key], inputs, min(new_tokens, self._most or new_tokens)
        )

    def _batches(self, requests: Iterable[_Request]) -> Iterator[list[_Request]]:
        """Batches of requests with the same limit of new tokens, within `batch_tokens` positions.

        Methods inside the language model need equal numbers of visual tokens in a batch.
        """
        waiting: dict[tuple[int, int], list[_Request]] = {}
        for request in requests:
            visual = int((request.inputs["input_ids"] == self.model.config.image_token_id).sum())
            kind = (request.new_tokens, visual if isinstance(self.method, InLLMPruner) else 0)
            batch = waiting.setdefault(kind, [])
            if (
                batch
                and (len(batch) + 1) * max(map(self._positions, [*batch, request]))
                > self.batch_tokens
            ):
                yield waiting.pop(kind)
                batch = waiting.setdefault(kind, [])
            batch.append(request)
        yield from waiting.values()

    def _positions(self, request: _Request) -> int:
        """An upper estimate of the prompt's length after the pruner."""
        ids, budget = request.inputs["input_ids"], self._method["budget"]
        visual, images = int((ids == self.model.config.image_token_id).sum()), request.images
        pruned = isinstance(self.method, Pruner) and self.method.name != "none" and images > 0
        return (
            ids.shape[1] - visual + (images * budget.most(visual // images) if pruned else visual)
        )

    def _answer(self, batch: list[_Request], trace: Trace) -> None:
        """Answer a batch; if memory runs out, in halves, and later batches at the smaller size.

        Raises:
            DocumentError: any error but lack of memory, or lack of memory for one document.
        """
        try:
            answers = self._generate(batch, trace)
        except Exception as error:
            if len(batch) == 1 or not isinstance(error, torch.cuda.OutOfMemoryError):
                names = [_name(request.task, request.doc_id) for request in batch]
                raise DocumentError(names, error) from error
        else:
            for request, answer in zip(batch, answers, strict=True):
                self.answers[request.task, request.doc_id] = answer
                self.on_answer()
            return
        # only here, outside `except`: the exception's traceback keeps the call's tensors alive
        self.images.cache.clear()  # its tensors are on the accelerator too
        torch.cuda.empty_cache()
        self.batch_tokens = min(
            self.batch_tokens, len(batch) * max(map(self._positions, batch)) // 2
        )
        log.warning(
            "out of memory at a batch of %d: batch_tokens is now %d", len(batch), self.batch_tokens
        )
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._answer(half, trace)

    def _generate(self, batch: list[_Request], trace: Trace) -> list[Answer]:
        """The answers of a batch.

        Raises:
            FloatingPointError: logits that are NaN or infinite. It names the documents.
        """
        inputs = self.inputs.collate([request.inputs for request in batch]).to(
            self.device, self.model.dtype
        )
        trace.audits.clear()
        trace.announce([self._sample(request) for request in batch])
        check, started = _FiniteCheck(), self._now()
        handle = self.model.register_forward_hook(check)
        try:
            output = self.model.generate(
                **inputs,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=batch[0].new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        finally:
            handle.remove()
        seconds = (self._now() - started) / len(batch)
        if broken := check.rows():
            names = ", ".join(_name(batch[row].task, batch[row].doc_id) for row in broken)
            raise FloatingPointError(
                f"the logits of {names} are NaN or infinite with pruner {self.method.name!r} at "
                f"budget {self._method['budget']}: the weights are damaged, or the values are too "
                f"large for {self.model.dtype}; check the checkpoint, or set model.dtype=float32"
            )
        answers = []
        for request, row, audit in zip(
            batch, output[:, inputs["input_ids"].shape[1] :], trace.audits, strict=True
        ):
            ends = (row == self.tokenizer.eos_token_id).nonzero()
            new = row[: int(ends[0]) + 1] if len(ends) else row  # the rest is padding
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            answers.append(Answer(text, request.text, seconds, len(new), not len(ends), audit))
        return answers

    def _sample(self, request: _Request) -> Sample:
        ids = self.tokenizer(request.question, add_special_tokens=False)["input_ids"]
        return Sample(_name(request.task, request.doc_id), tuple(ids), request.question)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _name(task: str, doc_id: int) -> str:
    """How messages and samples name a document."""
    return f"{task}/{doc_id}"


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

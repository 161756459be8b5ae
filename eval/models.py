"""The model class that lmms-eval calls: a pruned model. Any error in a document is raised."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from torch import Tensor
from transformers import BatchFeature, GenerationConfig

from secateur import prefixes, source
from secateur.answers import Unanswered
from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.checkpoints import fingerprint
from secateur.documents import DocumentError, Documents, Request, by_image
from secateur.families import family_of
from secateur.injection import PromptAudit, Sample, inject
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
    shared: bool = False  # its prefix was prefilled together with that of other questions
    images: str = ""  # digest of the prompt's images; old files of answers have none


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


class PrunedModel(lmms):
    """A vision-language model with a pruner before or inside its language model, for lmms-eval.

    Unpruned until `use` sets a method; a change of method does not load the model again. Images
    are encoded one at a time, so that neither batches nor the cache change an answer.

    Args:
        pretrained: hub id, or a folder: absolute, or relative to the working directory or the
            project.
        name: of the config; with random weights it decides the geometry.
        family: required model type of the checkpoint, one of `secateur.families.MODULES`; None:
            any.
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
            time, each from its own prefill. Otherwise questions about one image share the prefill
            of what they have in common, if the method does not read them.
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
        self._captures = frozenset(adapter_for(model, layout).SOURCES)
        self.tokenizer: Any = self._inputs[layout].processor.tokenizer
        self._clip_name, self._most = clip, max_new_tokens
        self._clip: ClipRelevance | None = None
        self.batch_tokens = batch_tokens
        self._identity = (
            f"{fingerprint(pretrained, revision)} {source.code(self.family)} {name} {weights} "
            f"{dtype} {attn_implementation} {self.device} {VERSION}"
        )
        # tensors of inputs take a quarter of the cache's memory
        self.documents = Documents(cache.limit_bytes // 4 if cache else 0)
        self.images = ImageCache(cache or EncodeCache(0), self._identity)
        self.images.cache.device = self.device
        self.on_answer: Callable[[], None] = lambda: None
        self._told = False  # why prefixes are not shared
        self.use(build("none"), Budget(), None)

    def expect(self, captures: Iterable[str]) -> None:
        """Name what coming methods need of the image encoder: an image is then encoded once."""
        self.images.asked |= frozenset(captures) & self._captures

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
        self._shares = self._may_share(pruner)
        self._method: dict[str, Any] = {
            "pruner": pruner,
            "budget": budget,
            "positions": None if isinstance(pruner, InLLMPruner) else positions,
            "layout": layout,
            "clip": self._relevance(pruner),
        }
        self.answers: dict[tuple[str, int], Answer] = {}
        self.shard = (0, 1)  # (index, count): every count-th image, from the index-th on
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
        wanted = [(task, doc_id) for *_, doc_id, task, _ in (request.args for request in requests)]
        for batch in self._batches(self._missing(requests)):
            self._answer(batch)
        if others := sum(key not in self.answers for key in wanted):
            raise Unanswered(f"{others} of {len(wanted)} documents wait for the other shards")
        done = [self.answers[key] for key in wanted]
        return [
            GenerationResult(text=a.text, token_counts=TokenCounts(output_tokens=a.new_tokens))
            for a in done
        ]

    def _missing(self, requests: list[Instance]) -> Iterator[Request]:
        """The documents of this shard without an answer, those of an image one after another.

        An image belongs to one shard, with all its questions.
        """
        number, count = self.shard
        for task in dict.fromkeys(request.args[4] for request in requests):
            mine = [request for request in requests if request.args[4] == task]
            data = self.task_dict[task][mine[0].args[5]]
            for image, group in enumerate(by_image(mine, data)):
                for request in group if image % count == number else ():
                    if (task, request.args[3]) not in self.answers:
                        yield self._prepared(request, data)

    def _prepared(self, request: Instance, data: Any) -> Request:
        """A document with its tensors.

        Raises:
            DocumentError: it could not be prepared, or an image has fewer tokens than the budget.
        """
        made = self.documents.request(request, data, self.inputs, self._most)
        if self._least_tokens:
            try:
                self.inputs.family.check_images(
                    self.inputs.processor, self._least_tokens, made.inputs
                )
            except ValueError as error:
                raise DocumentError([made.name], error) from error
        return made

    def _batches(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Batches of requests with the same limit of new tokens, within `batch_tokens` positions.

        Methods inside the language model need equal numbers of visual tokens in a batch; where the
        image decides the number, every request is a batch of its own. Requests with a common prefix
        stay together, even if they alone are too many: `_generate_shared` answers them in pieces.
        """
        inside = isinstance(self.method, InLLMPruner)
        alone = inside and self.method.adaptive
        waiting: dict[tuple[int, int, bool], list[Request]] = {}
        for _, group in itertools.groupby(requests, lambda one: self._prefix(one) or one.name):
            together = list(group)
            request = together[0]
            equal = request.visual if inside else 0
            kind = (request.new_tokens, equal, self._prefix(request) is not None)
            batch = waiting.setdefault(kind, [])
            full = self._room([*batch, *together]) < len(batch) + len(together)
            if batch and (alone or full):
                yield waiting.pop(kind)
                batch = waiting.setdefault(kind, [])
            batch += together
        yield from waiting.values()

    def _room(self, batch: list[Request]) -> int:
        """How many prompts as long as the longest of a batch may be generated together."""
        return max(1, self.batch_tokens // max(map(self._positions, batch)))

    def _prefix(self, request: Request) -> tuple[Any, ...] | None:
        """Equal for requests with a common prefix; None for one that can share none."""
        ids = request.inputs["input_ids"][0]
        if not self._shares or not 0 < request.prefix < len(ids):
            return None
        return request.image_key, request.new_tokens, ids[: request.prefix].numpy().tobytes()

    def _may_share(self, method: Pruner | InLLMPruner) -> bool:
        """Whether prompts about one image can share their prefix; what hinders it is told once."""
        if not self.batch_tokens or not isinstance(method, Pruner) or not method.question_agnostic:
            return False
        try:
            prefixes.empty_cache(self.model)
            self._penalties = prefixes.penalties(self.generation_defaults())
        except prefixes.CannotShare as error:
            if not self._told:
                log.warning("questions about one image do not share a prefill: %s", error)
            self._told = True
            return False
        return True

    def _positions(self, request: Request) -> int:
        """An upper estimate of the prompt's length after the pruner."""
        budget, images = self._method["budget"], request.images
        pruned = isinstance(self.method, Pruner) and self.method.name != "none" and images > 0
        kept = images * budget.most(request.visual // images) if pruned else request.visual
        return request.inputs["input_ids"].shape[1] - request.visual + kept

    def _answer(self, batch: list[Request]) -> None:
        """Answer a batch; if memory runs out, in halves, and later batches at the smaller size.

        Raises:
            DocumentError: any error but lack of memory, or lack of memory for one document.
        """
        shared = len({self._prefix(request) or request.name for request in batch}) < len(batch)
        try:
            answers = (self._generate_shared if shared else self._generate)(batch)
        except Exception as error:
            if len(batch) == 1 or not isinstance(error, torch.cuda.OutOfMemoryError):
                raise DocumentError([request.name for request in batch], error) from error
        else:
            for request, answer in zip(batch, answers, strict=True):
                self.answers[request.task, request.doc_id] = answer
                self.on_answer()
            return
        # only here, outside `except`: the exception's traceback keeps the call's tensors alive
        self.images.cache.clear()  # its tensors are on the accelerator too
        torch.cuda.empty_cache()
        needed = min(len(batch), self._room(batch)) * max(map(self._positions, batch))
        self.batch_tokens = min(self.batch_tokens, needed // 2)
        log.warning(
            "out of memory at a batch of %d: batch_tokens is now %d", len(batch), self.batch_tokens
        )
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._answer(half)

    def _generate(self, batch: list[Request]) -> list[Answer]:
        """The answers of a batch of whole prompts."""
        started = self._now()
        inputs = self._batch([request.inputs for request in batch])
        check = _FiniteCheck()
        handle = self.model.register_forward_hook(check)
        try:
            with inject(self.model, **self._method, cache=self.images) as trace:
                trace.announce([self._sample(request) for request in batch])
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
        self._check_finite([batch[row] for row in check.rows()])
        rows = list(output[:, inputs["input_ids"].shape[1] :])
        return self._read(batch, rows, trace.audits, self._now() - started, shared=False)

    def _generate_shared(self, batch: list[Request]) -> list[Answer]:
        """The answers of a batch, from one prefill of every prefix."""
        started = self._now()
        firsts = {self._prefix(request): request for request in reversed(batch)}
        rows = {prefix: row for row, prefix in enumerate(firsts)}
        beginnings = [self.inputs.beginning(one.inputs, one.prefix) for one in firsts.values()]
        with inject(self.model, **self._method, cache=self.images) as trace:
            trace.announce([self._sample(request) for request in firsts.values()])
            cache = prefixes.prefill(self.model, self._batch(beginnings))
        assert trace.pruned is not None
        prefix = prefixes.Prefix(cache, trace.pruned.mask, trace.pruned.next)
        questions, audits = [], []
        for request in batch:
            row, ids = rows[self._prefix(request)], request.inputs["input_ids"][0]
            tail = len(ids) - request.prefix
            questions.append(prefixes.Question(row, ids.to(self.device), tail))
            audit = trace.audits[row]
            audits.append(replace(audit, id=request.name, prompt_tokens=audit.prompt_tokens + tail))
        found: list[Tensor] = []
        room = self._room(batch)
        for start in range(0, len(batch), room):
            ids, finite = prefixes.answer(
                self.model,
                prefix,
                questions[start : start + room],
                batch[0].new_tokens,
                self.tokenizer.eos_token_id,
                self.tokenizer.pad_token_id,
                self._penalties,
            )
            self._check_finite([batch[start + row] for row in (~finite).nonzero()[:, 0].tolist()])
            found += list(ids)
        return self._read(batch, found, audits, self._now() - started, shared=True)

    def _batch(self, rows: list[BatchFeature]) -> BatchFeature:
        return self.inputs.collate(rows).to(self.device, self.model.dtype)

    def _check_finite(self, broken: list[Request]) -> None:
        """Raise FloatingPointError that names the requests, whose logits were NaN or infinite."""
        if not broken:
            return
        raise FloatingPointError(
            f"the logits of {', '.join(request.name for request in broken)} are NaN or infinite "
            f"with pruner {self.method.name!r} at budget {self._method['budget']}: the weights are "
            f"damaged, or the values are too large for {self.model.dtype}; check the checkpoint, "
            "or set model.dtype=float32"
        )

    def _read(
        self,
        batch: list[Request],
        rows: list[Tensor],
        audits: list[PromptAudit],
        seconds: float,
        shared: bool,
    ) -> list[Answer]:
        """Answers from generated ids, one row per request, with equal shares of `seconds`."""
        answers = []
        for request, row, audit in zip(batch, rows, audits, strict=True):
            ends = (row == self.tokenizer.eos_token_id).nonzero()
            new = row[: int(ends[0]) + 1] if len(ends) else row  # the rest is padding
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            answers.append(
                Answer(
                    text,
                    request.text,
                    seconds / len(batch),
                    len(new),
                    not len(ends),
                    audit,
                    shared,
                    request.image_key[:16],
                )
            )
        return answers

    def _sample(self, request: Request) -> Sample:
        ids = self.tokenizer(request.question, add_special_tokens=False)["input_ids"]
        return Sample(request.name, tuple(ids), request.question)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

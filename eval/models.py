"""lmms-eval's chat model class, running a pruned model; every error is fatal, every answer is on record."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.models.chat.llava_hf import LlavaHf
from lmms_eval.protocol import ChatMessages
from safetensors import SafetensorError

from eval.budget import Budget
from eval.checkpoints import locate, not_loaded
from eval.inject import Sample, SampleRecord, inject
from eval.inject.session import Positions
from eval.prompts import PROMPTS
from pruners import InLLMPruner, Pruner, build


@dataclass(frozen=True)
class Answer:
    """One generated answer with its audit."""

    text: str
    prompt: str
    seconds: float
    new_tokens: int
    audit: SampleRecord


class PrunedLlava(LlavaHf):
    """LLaVA through lmms-eval's own chat class, with a pruner before or inside the language model.

    Args:
        pretrained: hub id, or a folder (absolute, or relative to the working directory or the project).
        revision, dtype, attn_implementation: as in transformers.
        device: `auto` takes CUDA where there is one, else the CPU.
        prompt: `hub`, the checkpoint's chat template, or `vicuna_v1`, with the system sentence of the original LLaVA.
        pruner, budget, positions: the method to begin with; `use` changes it without loading again.

    Raises:
        FileNotFoundError: the checkpoint is neither on disk nor reachable, or its files are damaged.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        dtype: str = "auto",
        attn_implementation: str | None = "sdpa",
        device: str = "auto",
        prompt: Literal["hub", "vicuna_v1"] = "hub",
        pruner: str = "none",
        budget: str | int = "full",
        positions: Positions = "compact",
    ) -> None:
        if prompt != "hub" and prompt not in PROMPTS:
            raise ValueError(f"prompt={prompt!r} is not one of hub, {', '.join(PROMPTS)}")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            super().__init__(
                pretrained=str(locate(pretrained)),
                revision=revision,
                device=device,
                device_map=device,
                dtype=dtype,
                attn_implementation=attn_implementation,
            )
        except (OSError, SafetensorError) as error:
            raise FileNotFoundError(not_loaded(pretrained, revision, error)) from error
        self._model.eval()
        if prompt != "hub":
            self._image_processor.chat_template = PROMPTS[prompt]
        self.answers: dict[tuple[str, int], Answer] = {}
        self.on_answer: Callable[[], None] = lambda: None
        self.use(build(pruner), Budget.parse(budget), positions)

    def use(self, pruner: Pruner | InLLMPruner, budget: Budget, positions: Positions) -> None:
        """Answer with this method from now on; forgets the answers so far."""
        self._method = (pruner, budget, positions)
        self.answers.clear()

    def clean(self) -> None:
        """Keep the model: lmms-eval calls this behind every evaluation, and the next cell needs it again."""

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request greedily, one at a time, in order."""
        results = []
        with inject(self.model, *self._method) as trace:
            for request in requests:
                _, doc_to_messages, options, doc_id, task, split = request.args
                chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
                answer = self._answer(chat, options, f"{task}/{doc_id}", trace)
                self.answers[task, doc_id] = answer
                results.append(GenerationResult(text=answer.text, token_counts=TokenCounts(output_tokens=answer.new_tokens)))
                self.on_answer()
        return results

    def _answer(self, chat: ChatMessages, options: dict[str, Any], sample: str, trace: Any) -> Answer:
        images, videos, _ = chat.extract_media()
        if videos:
            raise ValueError(f"{sample}: videos are not supported")
        processor = self._image_processor
        prompt = processor.apply_chat_template(chat.model_dump()["messages"], tokenize=False, add_generation_prompt=True)
        inputs = processor(images=images or None, text=prompt, return_tensors="pt").to(self._device, self.model.dtype)
        question = "\n".join(part.text for message in chat.messages for part in message.content if part.type == "text")
        question_ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        trace.announce([Sample(sample, tuple(question_ids))])
        started = self._now()
        output = self.model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            num_beams=options.get("num_beams", 1),
            max_new_tokens=options.get("max_new_tokens", 1024),
            use_cache=self.use_cache,
            pad_token_id=self.eot_token_id,
            eos_token_id=self.eot_token_id,
        )
        seconds = self._now() - started
        new = output[0, inputs["input_ids"].shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return Answer(text, prompt, seconds, len(new), trace.records[-1])

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

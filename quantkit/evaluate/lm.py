"""A causal language model as lm-eval asks for it: answered from the log, the rest computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantkit import console
from quantkit.evaluate.request_log import RequestLog, key

CHUNK = 64  # requests answered between two writes to disk
CPU_TOKENS = 2048  # tokens in a forward pass on a CPU: more does not run faster
LOGIT_BYTES = 10  # per vocabulary entry and token: bf16 logits, float32 log-softmax, a copy


def recorded_model(
    load: Callable[[], Any], tokenizer: Any, log: RequestLog, batch: int | None, label: str
) -> Any:
    """Wrap a model for lm-eval: requests in `log` are answered from it, others by the model.

    `load` is called only when something is left to compute. Requests run longest first in chunks
    of `CHUNK`; after each chunk the answers are on disk. The arithmetic is lm-eval's own `HFLM`,
    so that scores are those of calling lm-eval directly.

    Args:
        batch: sequences per forward pass; None fits it to the length and the free memory.
    """
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    class RecordedModel(LM):
        def __init__(self) -> None:
            super().__init__()
            self.inner: Any = None
            self.tokenizer = tokenizer
            self.earlier = 0
            self.batches: set[int] = set()

        def _model(self) -> Any:
            if self.inner is None:
                self.inner = HFLM(pretrained=load(), tokenizer=tokenizer, batch_size=1)
                self.inner.cache_hook = log
            return self.inner

        def _answer(self, kind: str, requests: Sequence[Any]) -> list[Any]:
            known = [log.get(kind, r.args) is not None for r in requests]
            self.earlier += sum(known)
            # Tasks repeat requests (two questions with one text): each is computed once.
            unknown = (r for r, k in zip(requests, known, strict=True) if not k)
            missing = list({key(kind, r.args): r for r in unknown}.values())
            # Same context together: one forward pass serves all one-token continuations of it.
            missing.sort(key=lambda r: (-len(str(r.args[0])), str(r.args[0])))
            if missing:
                with console.progress(f"{label}: {kind}", len(missing)) as progress:
                    for start in range(0, len(missing), CHUNK):
                        chunk = missing[start : start + CHUNK]
                        self._compute(kind, chunk)
                        log.sync()
                        progress.advance(len(chunk))
            return [log.get(kind, r.args) for r in requests]

        def _compute(self, kind: str, chunk: Sequence[Any]) -> None:
            model = self._model()
            longest = max(len(tokenizer(_text(r.args)).input_ids) for r in chunk)
            size = batch or automatic_batch(longest, len(tokenizer), model.device)
            while True:
                self.batches.add(size)
                model.batch_size_per_gpu = size
                try:
                    answers = getattr(model, kind)(chunk, disable_tqdm=True)
                    break
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    size //= 2
                    torch.cuda.empty_cache()
            for request, answer in zip(chunk, answers, strict=True):
                log.add_partial(kind, request.args, answer)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [tuple(a) for a in self._answer("loglikelihood", requests)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._answer("loglikelihood_rolling", requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._answer("generate_until", requests)

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

    return RecordedModel()


def _text(arguments: Sequence[Any]) -> str:
    return "".join(a for a in arguments if isinstance(a, str))


def automatic_batch(longest: int, vocabulary: int, device: torch.device) -> int:
    """Sequences of `longest` tokens per forward pass that fit the memory now free on `device`."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        tokens = int(0.3 * free / (LOGIT_BYTES * vocabulary))
    else:
        tokens = CPU_TOKENS
    return max(1, min(64, tokens // max(longest, 1)))

"""lm-eval's model of transformers, but with logits of the answers' positions alone, and of few rows at once.

lm-eval makes logits of every position: ten examples before a question, eight rows at once and 262 thousand words are
15 GB of them, and for a small model they are most of the work. Its scores, and how it makes them, stay.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

# Of a batch's logits, with their logarithms in float32; a single row may take more.
LOGITS_BYTES = 1 << 30

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # lm-eval's: texts, tokens of the question, of the answer


class AnswerLogits(HFLM):
    """A causal model that lm-eval asks for the log-probabilities of answers.

    Attributes:
        kept: positions at the end of a batch that logits are made of; 0: all.
    """

    kept = 0

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score answers batch by batch, as HFLM does it, the longest first.

        Args:
            requests: questions and answers.
            disable_tqdm: without a progress bar.
            override_bs: rows that pass at once instead of ``batch_size``.

        Returns:
            of each request the sum of its answer's log-probabilities, and whether each token is the likeliest.
        """
        scores: list[Any] = [None] * len(requests)
        shown = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with shown:
            for chosen, kept in self._batches(requests, override_bs or self.batch_size):
                self.kept = kept
                found = super()._loglikelihood_tokens([requests[i] for i in chosen], disable_tqdm=True)
                for i, score in zip(chosen, found, strict=True):
                    scores[i] = score
                shown.update(len(chosen))
        return scores

    def _batches(self, requests: Sequence[Request], most: int) -> Iterator[tuple[list[int], int]]:
        """Give the indices of each batch, and how many last positions hold all of its answers.

        Requests that differ in their last token alone are one row, as HFLM has it.

        Args:
            requests: questions and answers.
            most: rows of a batch.
        """
        position = self.model.config.vocab_size * (self.model.dtype.itemsize + torch.float32.itemsize)  # its bytes
        positions = self.max_length
        chosen: list[int] = []
        rows: set[tuple[int, ...]] = set()
        longest = kept = 0
        tokens = [question + answer for _, question, answer in requests]
        for i in sorted(range(len(requests)), key=lambda i: (-len(tokens[i]), tokens[i])):
            answer, row = requests[i][2], tuple(tokens[i][-positions - 1 : -1])
            longest = longest or len(row)
            need = longest - len(row) + len(answer)
            size = len(rows | {row})
            if chosen and (size > most or size * max(kept, need) * position > LOGITS_BYTES):
                yield chosen, kept
                chosen, rows, longest, kept, need = [], set(), len(row), 0, len(answer)
            chosen.append(i)
            rows.add(row)
            kept = max(kept, need)
        if chosen:
            yield chosen, kept

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Logits ``[B, kept, V]`` of the last positions of token ids ``[B, T]``."""
        with torch.inference_mode():
            logits: Tensor = self.model(inps, logits_to_keep=self.kept).logits
        return logits

"""Samples the next token of each request in a batch, with the parameters of that request.

transformers' continuous batching has temperature, top_p and top_k for each request, but no seed, penalties, bias or
logprobs. It lets a processor see all rows of a batch. This processor samples the token itself, and masks all others.
The defaults are llama.cpp's, so that a model answers alike before and after its export.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of the sampled token and of the most likely ones, before temperature, bias and penalties."""

    logprob: float
    top_logprobs: list[tuple[int, float]]


@dataclass
class Sampling:
    """The parameters of one request, and the logprobs of its tokens."""

    temperature: float = 0.8
    top_k: int = 40  # 0: all
    top_p: float = 0.95
    min_p: float = 0.05
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None
    top_logprobs: int | None = None  # number of most likely tokens to report; None: no logprobs
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    _random: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._random = torch.Generator()
        if self.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(self.seed)

    def sample(self, scores: torch.Tensor, generated: Sequence[int]) -> int:
        """Return the token that follows the generated ones."""
        scores = scores.float().cpu()
        adjusted = self._with_penalties(scores.clone(), generated)
        token = int(adjusted.argmax()) if self.temperature == 0 else self._draw(adjusted / self.temperature)
        if self.top_logprobs is not None:
            logprobs = scores.log_softmax(-1)
            best = logprobs.topk(self.top_logprobs)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            self.logprobs.append(TokenLogprobs(float(logprobs[token]), list(pairs)))
        return token

    def _with_penalties(self, scores: torch.Tensor, generated: Sequence[int]) -> torch.Tensor:
        for token, bias in self.logit_bias.items():
            if token < len(scores):
                scores[token] += bias
        if self.frequency_penalty or self.presence_penalty:
            for token, times in Counter(generated).items():
                scores[token] -= times * self.frequency_penalty + self.presence_penalty
        return scores

    def _draw(self, scores: torch.Tensor) -> int:
        ordered, tokens = scores.sort(descending=True, stable=True)
        if self.top_k:
            ordered = ordered[: self.top_k]
        probabilities = ordered.softmax(-1)
        # A token is dropped when the more likely ones reach top_p together; the first one never is.
        mask = (probabilities.cumsum(-1) - probabilities < self.top_p) & (
            probabilities >= self.min_p * probabilities[0]
        )
        mask[0] = True
        return int(tokens[torch.multinomial(probabilities * mask, 1, generator=self._random)])


class Sampler(ContinuousBatchingLogitsProcessor):
    def __init__(self) -> None:
        self.supported_kwargs, self.ignored_kwargs = {}, ()
        self.by_request_id = dict[str, Sampling]()
        self.steps = 0  # of the model, each for the whole batch
        self._batch: list[Any] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """The requests whose scores come next, in the order of their rows."""
        self._batch = [request.state for request in requests_with_new_token]
        return torch.empty(0, dtype=torch.int32)

    def __call__(self, scores: Any, tensor_arg: torch.Tensor) -> Any:
        self.steps += 1
        masked = torch.full_like(scores, NEGATIVE_INFINITY)
        for row, state in enumerate(self._batch):
            # A cancelled request has no sampling, and leaves the batch before the next step.
            sampling = self.by_request_id.get(state.request_id)
            token = sampling.sample(scores[row], _generated_tokens(state)) if sampling else 0
            masked[row, token] = 0
        return masked


def _generated_tokens(state: Any) -> list[int]:
    """A request that was evicted from the cache returns with its generated tokens as part of its prompt."""
    before = state.initial_tokens[state._true_initial_tokens :] if state._true_initial_tokens else []
    return before + state.generated_tokens

"""lorat_kernels: the log-prob of each row's target under a language-model head, without the logits.

One public door, `linear_logprob`; `lorat_kernels.naive.linear_logprob` is the same function with everything
materialised, for tests and as the definition.
"""

from .linear_logprob import linear_logprob

__all__ = ["linear_logprob"]

"""Exponential of the mean negative log-likelihood of a token."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Perplexity: exp(sum of negative log-likelihoods / number of predicted tokens). Depends on the tokenizer: compare models
with different tokenizers by bits per byte.
"""

INPUTS = """
Args:
    nll (list of float): summed negative log-likelihood in nats, one entry per sequence.
    tokens (list of int): predicted tokens of each sequence.

Returns:
    {"perplexity": float, at least 1; inf when it overflows}

Raises:
    ValueError: no token was predicted.

Example:
    >>> metric.compute(nll=[0.0, 0.0], tokens=[3, 3])
    {'perplexity': 1.0}
"""

CITATION = """
@article{jelinek1977perplexity,
  title = {Perplexity---a measure of the difficulty of speech recognition tasks},
  author = {Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.},
  journal = {The Journal of the Acoustical Society of America},
  volume = {62},
  number = {S1},
  pages = {S63},
  year = {1977}
}
"""


class Perplexity(evaluate.Metric):
    """Loads by path: `evaluate.load("<this folder>")`, without network."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, nll, tokens):
        if sum(tokens) <= 0:
            raise ValueError("no token was predicted: perplexity is not defined")
        with np.errstate(over="ignore"):
            return {"perplexity": float(np.exp(np.sum(nll) / np.sum(tokens)))}

"""Negative log-likelihood in bits per UTF-8 byte of text."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Bits per byte: sum of negative log-likelihoods in bits / UTF-8 bytes of the predicted text. It can be compared between
tokenizers.
"""

INPUTS = """
Args:
    nll (list of float): summed negative log-likelihood in nats, one entry per sequence.
    bytes (list of float): UTF-8 bytes of the predicted text of each sequence (tokens x mean bytes per token where the
        bytes are only known on average).

Returns:
    {"bits_per_byte": float}

Raises:
    ValueError: no byte was predicted.

Example:
    >>> metric.compute(nll=[0.6931471805599453], bytes=[1.0])
    {'bits_per_byte': 1.0}
"""

CITATION = """
@article{gao2020pile,
  title = {The {P}ile: An 800{GB} Dataset of Diverse Text for Language Modeling},
  author = {Gao, Leo and Biderman, Stella and Black, Sid and Golding, Laurence and Hoppe, Travis and Foster, Charles
    and Phang, Jason and He, Horace and Thite, Anish and Nabeshima, Noa and Presser, Shawn and Leahy, Connor},
  journal = {arXiv preprint arXiv:2101.00027},
  year = {2020}
}
"""


class BitsPerByte(evaluate.Metric):
    """Loads by path: `evaluate.load("<this folder>")`, without network."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "bytes": datasets.Value("float64")}),
        )

    def _compute(self, nll, bytes):
        if sum(bytes) <= 0:
            raise ValueError("no byte was predicted: bits per byte are not defined")
        return {"bits_per_byte": float(np.sum(nll) / np.log(2) / np.sum(bytes))}

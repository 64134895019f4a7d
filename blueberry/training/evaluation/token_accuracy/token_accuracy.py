"""Share of next tokens that the model ranks first."""

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Token accuracy: the share of positions at which the predicted token equals the reference token.
Positions whose reference is `ignore_index` do not count.
"""

INPUTS = """
Args:
    predictions (list of lists of int): predicted token ids, (sequences, positions); position t is compared with
        position t of `references`: the caller shifts.
    references (list of lists of int): token ids of the text, the same shape.
    ignore_index (int): reference value that does not count, default -100.

Returns:
    {"accuracy": float in [0, 1]}

Raises:
    ValueError: shapes differ, or every reference is `ignore_index`.

Example:
    >>> metric.compute(predictions=[[5, 7, 9]], references=[[5, 7, -100]])
    {'accuracy': 1.0}
"""

CITATION = ""  # a definition, not a publication


class TokenAccuracy(evaluate.Metric):
    """Loads by path: `evaluate.load("<this folder>")`, without network."""

    def _info(self):
        token_ids = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": token_ids, "references": token_ids}),
        )

    def _compute(self, predictions, references, ignore_index=-100):
        predicted, reference = np.concatenate(predictions), np.concatenate(references)
        if predicted.shape != reference.shape:
            raise ValueError(f"{predicted.size} predictions for {reference.size} references: shift and pad both alike")
        counted = reference != ignore_index
        if not counted.any():
            raise ValueError(f"every reference is ignore_index ({ignore_index}): there is nothing to compare")
        return {"accuracy": float(np.mean(predicted[counted] == reference[counted]))}

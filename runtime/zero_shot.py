"""Zero-shot classification and retrieval on embeddings. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array, Floats
from ..errors import UsageError


def l2(embeddings: Array) -> Floats:
    """Rows [.., E] scaled to length 1 (a zero row stays zero, as in ``torch.nn.functional.normalize``)."""
    norm = np.sqrt(np.add.reduce(embeddings * embeddings, -1, keepdims=True))  # numpy.linalg.norm, directly
    return np.asarray(embeddings / np.maximum(norm, 1e-12), np.float32)


def fill(template: str, label: str) -> str:
    """``template`` with ``{}`` replaced by ``label``; UsageError if there is no ``{}``."""
    if "{}" not in template:
        raise UsageError(f"The template {template!r} has no {{}}.", "The label goes there.", "Add {} to it.")
    return template.replace("{}", label)


def ensemble(text_embeddings: Array, labels: int) -> Floats:
    """Embeddings [labels * templates, E], a label's templates together -> a unit vector a label [labels, E].

    The mean of the normalised template embeddings, normalised again (CLIP paper, section 3.1.4).
    """
    per_label = l2(text_embeddings).reshape(labels, -1, text_embeddings.shape[-1])
    return l2(per_label.mean(1))


def probabilities(images: Array, classes: Array, logit_scale: float) -> Floats:
    """softmax(exp(logit_scale) * cosine) over the classes: [B, E], [L, E] -> [B, L]."""
    logits = np.exp(logit_scale) * (l2(images) @ l2(classes).T)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True), np.float32)


def rank(queries: Array, items: Array, top: int) -> tuple[NDArray[np.int64], Floats]:
    """The ``top`` items by cosine for each query: indices [Q, K] and cosines [Q, K], best first."""
    cosine = l2(queries) @ l2(items).T
    order = top_of(cosine, top)
    return order, np.take_along_axis(cosine, order, 1)


def top_of(scores: Array, top: int) -> NDArray[np.int64]:
    """Places [Q, K] of the ``top`` largest of each row of [Q, N], best first; of equals the first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :top]

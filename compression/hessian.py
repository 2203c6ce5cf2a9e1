"""The Gram matrix of a matrix's inputs, and its inverse as second-order methods use it.

For the squared error of a matrix's output, sum over samples of |(W - Q) x|², the Hessian of every row of W is X^T X. GPTQ and
SparseGPT need its inverse in order of the columns: what is lost in one column is made up for in the later ones.
"""

from __future__ import annotations

import torch

DAMPING = 0.01
MOST_DAMPING = 1.0


def gram_of(x: torch.Tensor) -> torch.Tensor:
    """X^T X / n [K, K] (float32) of inputs [..., K] with n rows."""
    rows = x.detach().float().flatten(0, -2)
    return rows.T @ rows / len(rows)


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper triangular U [K, K] (float64) with U^T U the inverse of the damped Gram matrix.

    Row j of U says what to do when column j is settled and only later ones may still move: an error e in it is best made up
    for by -e / U[j, j] * U[j, j+1:]. The damping, 1 % of the mean diagonal as in the papers, grows tenfold until the
    factorization succeeds. Raises ValueError if the matrix has entries that are not finite.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix of the calibration inputs must be finite, but it is not")
    h = gram.double()
    scale, damping = float(h.diagonal().mean()) or 1.0, DAMPING
    while True:
        factor, failed = torch.linalg.cholesky_ex(h + damping * scale * torch.eye(len(h), dtype=h.dtype))
        if not failed or damping >= MOST_DAMPING:
            break
        damping *= 10
    upper: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper

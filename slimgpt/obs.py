"""Optimal Brain Surgeon for groups of columns of one linear map: the mathematics, with no model in sight.

Shapes: O = output features, D = input features (columns of W), T = tokens, G = groups, S = columns of one group,
K = kept columns.
H = sum over tokens of x x^T (the factor 2 of the paper cancels everywhere), P = H^-1.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DAMPING_STEPS = 6  # from percdamp 0.01 up to 1000 times the mean diagonal: beyond that H says nothing any more


class Gram:
    """Accumulates H = X X^T in float32, block row by block row, since only the upper triangle need be computed.

    Args:
        dim: columns.
        device: where.
        name: of the map, for errors.
    """

    def __init__(self, dim: int, device: torch.device | str, name: str = "H"):
        self.name = name
        self.H_DD = torch.zeros(dim, dim, device=device, dtype=torch.float32)
        self.tokens = 0
        self._strip = max(128, -(-dim // 6))  # six strips do 58 % of the full product

    def add(self, x_TD: Tensor) -> None:
        """Add tokens of any float dtype: ``[..., D]``."""
        x_TD = x_TD.reshape(-1, x_TD.shape[-1]).float()
        for low in range(0, x_TD.shape[1], self._strip):
            high = low + self._strip
            self.H_DD[low:high, low:].addmm_(x_TD[:, low:high].T, x_TD[:, low:])
        self.tokens += x_TD.shape[0]

    def finish(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The whole symmetric H ``[D, D]``.

        Raises:
            ValueError: when an activation was NaN or infinite.
        """
        H_DD = self.H_DD.to(dtype)
        H_DD = H_DD.triu() + H_DD.triu(1).T
        if not bool(torch.isfinite(H_DD).all()):
            raise ValueError(f"{self.name}: the activations hold NaN or infinite values")
        return H_DD


@dataclass(frozen=True)
class Damped:
    """H with damping on its diagonal, its Cholesky factor's existence proven.

    Attributes:
        H_DD: damped H.
        L_DD: its lower Cholesky factor.
        damping: what was added to the diagonal, as a share of the mean diagonal of H.
    """

    H_DD: Tensor
    L_DD: Tensor
    damping: float

    def inverse(self) -> Tensor:
        """P = H^-1 ``[D, D]``, as ``L^-T L^-1``: on CPU far quicker than torch.cholesky_inverse."""
        eye_DD = torch.eye(self.L_DD.shape[0], dtype=self.L_DD.dtype, device=self.L_DD.device)
        L_inv_DD: Tensor = torch.linalg.solve_triangular(self.L_DD, eye_DD, upper=False)
        return L_inv_DD.T @ L_inv_DD


def damp(H_DD: Tensor, percdamp: float, name: str = "H") -> Damped:
    """Add ``percdamp * mean(diag H)`` to the diagonal; ten times more where no Cholesky factor exists then.

    Raises:
        ValueError: when H stays indefinite, which only damaged activations can cause.
    """
    mean = H_DD.diagonal().mean()
    if not bool(mean > 0):
        mean = torch.ones_like(mean)  # every column is dead: any damping serves, all errors are 0
    damping = percdamp
    for _ in range(DAMPING_STEPS):
        damped_DD = H_DD + damping * mean * torch.eye(H_DD.shape[0], dtype=H_DD.dtype, device=H_DD.device)
        L_DD, info = torch.linalg.cholesky_ex(damped_DD)
        if int(info) == 0 and bool(torch.isfinite(L_DD).all()):
            if damping != percdamp:
                logger.warning(
                    "%s: ill-conditioned, damping raised from %g to %g of the mean diagonal", name, percdamp, damping
                )
            return Damped(damped_DD, L_DD, damping)
        damping = max(10 * damping, 1e-4)
    raise ValueError(f"{name}: H stays indefinite with a damping of {damping / 10:g} of its mean diagonal")


def silence_dead_columns(W_OD: Tensor, H_DD: Tensor) -> Tensor:
    """W with the columns that no token reaches (``H_jj = 0``) set to 0: they cost nothing, so they go first."""
    return W_OD * (H_DD.diagonal() > 0)


def group_errors(W_OD: Tensor, P_DD: Tensor, columns_GS: Tensor) -> Tensor:
    """Exact error of removing each group alone: ``e_S = ||L^-1 W_S^T||^2`` with ``P_SS = L L^T``; ``[G]``.

    Args:
        W_OD: weight.
        P_DD: inverse of H.
        columns_GS: the columns of each group.
    """
    L_GSS, W_GSO = _grouped_cholesky(W_OD, P_DD, columns_GS)
    solved_GSO: Tensor = torch.linalg.solve_triangular(L_GSS, W_GSO, upper=False)
    return solved_GSO.square().sum(dim=(1, 2))


def group_errors_paper(W_OD: Tensor, P_DD: Tensor, columns_GS: Tensor) -> Tensor:
    """The paper's score (eq. 5), ``sum W_S^2 / diag(L)^2``: the inverse changes within the group, W does not."""
    L_GSS, W_GSO = _grouped_cholesky(W_OD, P_DD, columns_GS)
    return (W_GSO.square().sum(dim=2) / L_GSS.diagonal(dim1=1, dim2=2).square()).sum(dim=1)


def _grouped_cholesky(W_OD: Tensor, P_DD: Tensor, columns_GS: Tensor) -> tuple[Tensor, Tensor]:
    P_GSS = P_DD[columns_GS[:, :, None], columns_GS[:, None, :]]
    return torch.linalg.cholesky(P_GSS), W_OD.T[columns_GS]


def column_errors(W_OD: Tensor, P_DD: Tensor) -> Tensor:
    """Error of removing each column alone: ``e_j = ||W_:,j||^2 / P_jj`` (paper eq. 4); ``[D]``."""
    return W_OD.square().sum(dim=0) / P_DD.diagonal()


def eliminate(W_OD: Tensor, P_DD: Tensor, columns_S: Tensor, rest_K: Tensor) -> tuple[Tensor, Tensor]:
    """Remove columns S: update the rest of W and P, and drop the rows and columns of S.

    ``W <- W - W_S (P_SS)^-1 P_S,:`` and ``P <- P - P_:,S (P_SS)^-1 P_S,:``. Both are exact.

    Returns:
        W ``[O, K]`` and P ``[K, K]`` over the columns ``rest_K``.
    """
    L_SS = torch.linalg.cholesky(P_DD[columns_S[:, None], columns_S])
    # B = L^-1 P_S,K: then W_S (P_SS)^-1 P_S,K = (L^-1 W_S^T)^T B, and P_K,S (P_SS)^-1 P_S,K = B^T B stays symmetric
    B_SK = torch.linalg.solve_triangular(L_SS, P_DD[columns_S[:, None], rest_K], upper=False)
    W_SO = torch.linalg.solve_triangular(L_SS, W_OD[:, columns_S].T, upper=False)
    return W_OD[:, rest_K] - W_SO.T @ B_SK, P_DD[rest_K[:, None], rest_K] - B_SK.T @ B_SK


def refit(W_OD: Tensor, H_DD: Tensor, kept_K: Tensor) -> Tensor:
    """The least-squares optimum on the kept columns, in closed form: ``W_K = W H_:,K (H_KK)^-1``; ``[O, K]``.

    From the original W and H, so a long chain of eliminations leaves no drift behind.
    """
    L_KK = torch.linalg.cholesky(H_DD[kept_K[:, None], kept_K])
    return torch.cholesky_solve((W_OD @ H_DD[:, kept_K]).T, L_KK).T


def relative_error(W_OD: Tensor, W_OK: Tensor, H_DD: Tensor, kept_K: Tensor) -> float:
    """``||W X - W' X||^2 / ||W X||^2`` from H, where W' has the columns ``kept_K``; 0 when W X is 0."""
    gap_OD = W_OD.clone()
    gap_OD[:, kept_K] -= W_OK
    whole = float(((W_OD @ H_DD) * W_OD).sum())
    return float(((gap_OD @ H_DD) * gap_OD).sum()) / whole if whole > 0 else 0.0

"""Optimal Brain Surgeon for groups of columns of one linear map: the mathematics, with no model in sight.

Shapes: O = output features, D = input features (columns of W), T = tokens, G = groups, S = columns of one group,
R = columns removed so far, K = kept columns.
H = sum over tokens of x x^T (the factor 2 of the paper cancels everywhere), P = H^-1.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DAMPING_STEPS = 6  # from percdamp 0.01 up to 1000 times the mean diagonal: beyond that H says nothing any more
# Units are chosen and refitted in this on every device, so that all of them decide alike. It costs little: CPUs and
# data-centre GPUs (A100, H100) have float64 products at half the float32 rate or better; a consumer GPU has them at a
# 64th and spends minutes instead of seconds (docs/scale.md counts the operations).
SOLVE_DTYPE = torch.float64
ALIGNED = 128  # columns: kernels of 16-bit numbers that begin elsewhere take four times as long
STRIPS = 12  # a symmetric product made in n strips costs (n + 1) / 2n of the full one: 54 %


def strip_width(dim: int) -> int:
    """Columns of one strip of a symmetric product."""
    return max(128, -(-dim // STRIPS))


def _strips(dim: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    step = -(-strip_width(dim) // multiple) * multiple
    return ((low, min(low + step, dim)) for low in range(0, dim, step))


def _mirror(A_DD: Tensor) -> None:
    """Copy the upper triangle onto the lower one, in place."""
    for low, high in _strips(A_DD.shape[0]):
        corner_SS = A_DD[low:high, low:high]
        corner_SS.copy_(corner_SS.triu() + corner_SS.triu(1).T)
        A_DD[high:, low:high] = A_DD[low:high, high:].T


@contextmanager
def _exact_products() -> Iterator[None]:
    """CUDA multiplies float32 matrices without TF32 meanwhile, whatever the program around us has set."""
    cuda = torch.backends.cuda.matmul
    before, cuda.fp32_precision = cuda.fp32_precision, "ieee"
    try:
        yield
    finally:
        cuda.fp32_precision = before


class Gram:
    """Accumulates H = X X^T in float32, strip by strip, since only the upper triangle need be computed.

    Args:
        dim: columns.
        device: where.
        name: of the map, for errors.
    """

    def __init__(self, dim: int, device: torch.device | str, name: str = "H"):
        self.name = name
        self.H_DD = torch.zeros(dim, dim, device=device, dtype=torch.float32)
        self.tokens = 0

    def add(self, x_TD: Tensor) -> None:
        """Add tokens of any float dtype: ``[..., D]``."""
        x_TD = x_TD.reshape(-1, x_TD.shape[-1])
        if x_TD.is_cuda and x_TD.itemsize == 2:  # tensor cores multiply these exactly, and sum in float32
            for low, high in _strips(x_TD.shape[1], ALIGNED):
                H_SD = self.H_DD[low:high, low:]
                torch.addmm(H_SD, x_TD[:, low:high].T, x_TD[:, low:], out_dtype=torch.float32, out=H_SD)
        else:
            with _exact_products():
                x_TD = x_TD.float()
                for low, high in _strips(x_TD.shape[1]):
                    self.H_DD[low:high, low:].addmm_(x_TD[:, low:high].T, x_TD[:, low:])
        self.tokens += x_TD.shape[0]

    def finish(self) -> Tensor:
        """The full symmetric H ``[D, D]`` in SOLVE_DTYPE, handed over: the accumulator is empty afterwards.

        Raises:
            ValueError: when an activation was NaN or infinite.
        """
        H_DD, self.H_DD = self.H_DD, self.H_DD.new_empty(0, 0)
        # every activation enters the diagonal, as a square: what is finite there is finite everywhere
        if not bool(H_DD.diagonal().isfinite().all()):
            raise ValueError(f"{self.name}: the activations hold NaN or infinite values")
        _mirror(H_DD)
        return H_DD.to(SOLVE_DTYPE)


class Inverse(NamedTuple):
    """``P = (H + shift I)^-1``.

    Attributes:
        P_DD: the inverse.
        shift: what was added to each element of the diagonal.
        damping: the same as a share of the mean diagonal of H.
    """

    P_DD: Tensor
    shift: float
    damping: float


def invert(H_DD: Tensor, percdamp: float, name: str = "H") -> Inverse:
    """Invert H with ``percdamp * mean(diag H)`` on its diagonal; ten times more where H is singular to rounding then.

    Raises:
        ValueError: when H stays indefinite, which only damaged activations can cause.
    """
    diagonal_D = H_DD.diagonal().clone()
    mean = float(diagonal_D.mean())
    if not mean > 0:
        mean = 1.0  # every column is dead: any damping serves, all errors are 0
    damping = percdamp
    for _ in range(DAMPING_STEPS):
        H_DD.diagonal().add_(damping * mean)
        L_DD, info = torch.linalg.cholesky_ex(H_DD)
        H_DD.diagonal().copy_(diagonal_D)
        low, high, failed = torch.stack([*L_DD.diagonal().aminmax(), info.to(L_DD.dtype)]).tolist()
        # squares of L's diagonal are what is left of a column once those before it are known
        if not failed and low**2 > 10 * torch.finfo(L_DD.dtype).eps * high**2:
            if damping != percdamp:
                logger.warning(
                    "%s: ill-conditioned, damping raised from %g to %g of the mean diagonal", name, percdamp, damping
                )
            return Inverse(_invert_factor(L_DD), damping * mean, damping)
        damping = max(10 * damping, 1e-4)
    raise ValueError(f"{name}: H stays indefinite with a damping of {damping / 10:g} of its mean diagonal")


def _invert_factor(L_DD: Tensor) -> Tensor:
    """``L^-T L^-1``, written over L: a third of the operations of the full products, and no second matrix.

    On CPU far quicker than torch.cholesky_inverse. Each pass reads only what it has not overwritten yet.
    """
    for low, high in _strips(L_DD.shape[0]):  # L^-1, a strip of columns at a time; it is lower triangular too
        eye_DS = torch.eye(L_DD.shape[0] - low, high - low, dtype=L_DD.dtype, device=L_DD.device)
        L_DD[low:, low:high] = torch.linalg.solve_triangular(L_DD[low:, low:], eye_DS, upper=False)
    for low, high in _strips(L_DD.shape[0]):
        L_DD[:high, low:high] = L_DD[low:, :high].T @ L_DD[low:, low:high]
    _mirror(L_DD)
    return L_DD


def silence_dead_columns(W_OD: Tensor, H_DD: Tensor) -> Tensor:
    """W with the columns that no token reaches (``H_jj = 0``) set to 0: they cost nothing, so they go first.

    W itself where there are none.
    """
    dead_D = H_DD.diagonal() <= 0
    return W_OD.masked_fill(dead_D, 0) if bool(dead_D.any()) else W_OD


class Elimination:
    """W and P while columns go: the rest of W is always the least-squares optimum, ``P`` the inverse of H without them.

    Removing S changes ``W -> W - W_S (P_SS)^-1 P_S,:`` and ``P -> P - P_:,S (P_SS)^-1 P_S,:``, both exactly. With
    ``P_SS = L L^T`` and ``B_S = L^-1 P_S,:`` the second is ``P - B_S^T B_S``: so P is left as it came, the rows B_S are
    kept, and only the requested parts of the present P are computed. This is the Cholesky factorisation of P
    in the order of the removals. Columns keep their index to the end; removed ones must not be requested.

    Nothing here makes the CPU wait for a GPU.

    Args:
        W_OD: weight; it is left alone.
        P_DD: inverse of H; it is left alone.
        capacity: columns that will be removed at most.
    """

    def __init__(self, W_OD: Tensor, P_DD: Tensor, capacity: int):
        self.W_OD, self._P_DD = W_OD.clone(), P_DD
        self._diagonal_D = P_DD.diagonal().clone()
        self._B_RD = P_DD.new_empty(capacity, P_DD.shape[0])
        self._gone_D = torch.zeros(P_DD.shape[0], dtype=torch.bool, device=P_DD.device)
        self._removed = 0

    def column_errors(self) -> Tensor:
        """Error of removing each column alone, ``e_j = ||W_:,j||^2 / P_jj`` (paper eq. 4); ``[D]``, gone: infinite."""
        norms_D: Tensor = torch.linalg.vector_norm(self.W_OD, dim=0)  # no second W, which squares would be
        return norms_D.square_().div_(self._diagonal_D).masked_fill_(self._gone_D, torch.inf)

    def group_errors(self, columns_GS: Tensor) -> Tensor:
        """Exact error of removing each group alone: ``e_S = ||L^-1 W_S^T||^2`` with ``P_SS = L L^T``; ``[G]``."""
        L_GSS, W_GSO = self._grouped_cholesky(columns_GS)
        solved_GSO: Tensor = torch.linalg.solve_triangular(L_GSS, W_GSO, upper=False)
        return solved_GSO.square().sum(dim=(1, 2))

    def group_errors_paper(self, columns_GS: Tensor) -> Tensor:
        """The paper's score (eq. 5), ``sum W_S^2 / diag(L)^2``: P changes within the group, W does not; ``[G]``."""
        L_GSS, W_GSO = self._grouped_cholesky(columns_GS)
        return (W_GSO.square().sum(dim=2) / L_GSS.diagonal(dim1=1, dim2=2).square()).sum(dim=1)

    def group_errors_diagonal(self, columns_GS: Tensor) -> Tensor:
        """The paper's ablation without grouped Cholesky: ``e_j`` (eq. 4) summed over each group's columns; ``[G]``.

        W and P are those after all removals so far; within the group neither changes. Unlike the other two, it does not
        notice where ``P_SS`` is not positive definite: the removal does.
        """
        return self.column_errors()[columns_GS].sum(dim=1)

    def _grouped_cholesky(self, columns_GS: Tensor) -> tuple[Tensor, Tensor]:
        P_GSS = self._P_DD[columns_GS[:, :, None], columns_GS[:, None, :]]
        if self._removed:
            B_GRS = self._B_RD[: self._removed, columns_GS].transpose(0, 1)
            P_GSS = torch.baddbmm(P_GSS, B_GRS.mT, B_GRS, alpha=-1)
        return _cholesky(P_GSS), self.W_OD.T[columns_GS]

    def remove(self, columns_S: Tensor) -> Tensor:
        """Remove these columns; returns the exact error that adds, as a tensor on the device."""
        high = self._removed + len(columns_S)
        B_RD, B_SD = self._B_RD[: self._removed], self._B_RD[self._removed : high]
        P_SD = torch.addmm(self._P_DD[columns_S], B_RD[:, columns_S].T, B_RD, alpha=-1)
        L_SS = _cholesky(P_SD[:, columns_S])
        B_SD.copy_(torch.linalg.solve_triangular(L_SS, P_SD, upper=False))
        solved_SO: Tensor = torch.linalg.solve_triangular(L_SS, self.W_OD[:, columns_S].T, upper=False)
        self.W_OD.addmm_(solved_SO.T, B_SD, alpha=-1)
        self._diagonal_D -= B_SD.square().sum(dim=0)
        self._gone_D[columns_S] = True
        self._removed = high
        return solved_SO.square().sum()


def _cholesky(A_SS: Tensor) -> Tensor:
    """Without torch.linalg.cholesky's check, which waits for a GPU: a failure shows as an error that is not finite."""
    L_SS, info = torch.linalg.cholesky_ex(A_SS)
    assert isinstance(L_SS, Tensor)
    return L_SS.masked_fill_((info != 0)[..., None, None], torch.nan)  # LAPACK leaves finite numbers behind


def refit(W_OD: Tensor, H_DD: Tensor, shift: float, kept_K: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The least-squares optimum on the kept columns, ``W_K = W H_:,K (H_KK)^-1`` with the shift added to diag(H).

    From the original W and H, so a long chain of eliminations leaves no drift behind.

    Args:
        W_OD: weight.
        H_DD: H without damping.
        shift: of ``invert``.
        kept_K: columns that stay.
        dtype: the weight is rounded to this.

    Returns:
        The rounded W' ``[O, K]`` and its relative error ``||W X - W' X||^2 / ||W X||^2`` (without the shift; 0 where
        W X is 0), as ``tr(W H W^T) - 2 tr(W' (W H)_K^T) + tr(W' H_KK W'^T)``, the last from ``H_KK = L L^T``.
    """
    H_KK = H_DD[kept_K[:, None], kept_K]
    H_KK.diagonal().add_(shift)
    L_KK = torch.linalg.cholesky(H_KK)
    del H_KK  # L L^T will do: a third matrix of this size would be the peak of the run
    WH_OD = W_OD @ H_DD
    WH_OK = WH_OD[:, kept_K]
    solved_KO = torch.linalg.solve_triangular(L_KK, (WH_OK + shift * W_OD[:, kept_K]).T, upper=False)
    W_OK = torch.linalg.solve_triangular(L_KK.mT, solved_KO, upper=True).T  # torch.cholesky_solve would copy L
    del solved_KO
    rounded_OK = W_OK.to(dtype)
    W_OK = rounded_OK.to(W_OD.dtype)
    quadratic = (W_OK @ L_KK).square().sum() - shift * W_OK.square().sum()
    total, rest = torch.stack([(WH_OD * W_OD).sum(), quadratic - 2 * (WH_OK * W_OK).sum()]).tolist()
    return rounded_OK, max(0.0, total + rest) / total if total > 0 else 0.0

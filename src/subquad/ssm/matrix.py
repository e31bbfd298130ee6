"""The three shapes a state matrix A [...,N,N] comes in, and what is cheap in each.

    Dense       any matrix                            products N^2, inverses N^3
    Diagonal    diag(lam)                             both N
    DPLR        diag(lam) - p q^*, of low rank r      both N r

A step of the Euler and bilinear methods needs inverses, products and sums with the identity, and
all three shapes are closed under these: a diagonal plus low-rank system stays one when discretised.
Only the exponential (zero-order hold) leaves DPLR.

    ... any batch   N state size   r rank   k columns
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from subquad.errors import fail


def adjoint(x: Tensor) -> Tensor:
    """x^*: transposed and conjugated."""
    return x.mT.conj()


DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Singular(ValueError):
    """An inverse was asked for that is none, or has next to no right digit."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix that is all there: `matrix` [...,N,N]."""

    matrix: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    @property
    def batch(self) -> torch.Size:
        return self.matrix.shape[:-2]

    @property
    def size(self) -> int:
        return self.matrix.shape[-1]

    @property
    def mT(self) -> Dense:
        return Dense(self.matrix.mT)

    def dense(self) -> Tensor:
        return self.matrix

    def __matmul__(self, x: Tensor) -> Tensor:
        """A x for columns x [...,N,k]."""
        return self.matrix @ x

    def square(self) -> Dense:
        return Dense(self.matrix @ self.matrix)

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> Dense:
        """scale A + shift I, for numbers or one number a batch entry [...]."""
        eye = torch.eye(self.size, dtype=self.matrix.dtype, device=self.matrix.device)
        return Dense(_column(scale, 2) * self.matrix + _column(shift, 2) * eye)

    def solve(self, x: Tensor) -> Tensor:
        """A^-1 x."""
        return torch.linalg.solve_ex(self.matrix, x)[0]

    def inverse(self) -> Dense:
        inverse, _ = torch.linalg.inv_ex(self.matrix)
        if not torch.compiler.is_compiling():
            with torch.no_grad():
                condition = (1 + _one_norm(self.matrix)) * _one_norm(inverse)
                _check_regular(condition)
        return Dense(inverse)

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvals(self.matrix)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """diag(lam): the numbers of the state do not interact. `lam` [...,N], real or complex."""

    lam: Tensor

    def check(self) -> None:
        """Raise ValueError for what cannot be a diagonal."""
        check_parameter("A.lam", self.lam, 1, "[...,N]")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.lam,)

    @property
    def batch(self) -> torch.Size:
        return self.lam.shape[:-1]

    @property
    def size(self) -> int:
        return self.lam.shape[-1]

    @property
    def mT(self) -> Diagonal:
        return self

    def dense(self) -> Tensor:
        return torch.diag_embed(self.lam)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.lam[..., None] * x

    def square(self) -> Diagonal:
        return Diagonal(self.lam.square())

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> Diagonal:
        return Diagonal(_column(scale, 1) * self.lam + _column(shift, 1))

    def solve(self, x: Tensor) -> Tensor:
        """A^-1 x."""
        return x / self.lam[..., None]

    def inverse(self) -> Diagonal:
        inverse = 1 / self.lam
        if not torch.compiler.is_compiling():
            _check_regular(inverse.detach().abs())
        return Diagonal(inverse)

    def eigenvalues(self) -> Tensor:
        return self.lam


@dataclass(frozen=True, eq=False)
class DPLR:
    """diag(lam) - p q^*, diagonal plus low rank: S4's matrix (Gu et al. 2022, arXiv:2111.00396).

    Args:
        lam: [...,N], real or complex.
        p, q: [...,N,r]; q is conjugated and transposed in the product. A vector is [...,N,1].
    """

    lam: Tensor
    p: Tensor
    q: Tensor

    def check(self) -> None:
        """Raise ValueError for what does not fit together."""
        N = check_parameter("A.lam", self.lam, 1, "[...,N]").shape[-1]
        for name, x in (("A.p", self.p), ("A.q", self.q)):
            check_parameter(name, x, 2, "[...,N,r]")
            if x.shape[-2] != N or x.shape[-1] != self.p.shape[-1]:
                want = f"[...,{N},{self.p.shape[-1]}]"
                raise fail(
                    name, f"shape {tuple(x.shape)}", want, "a vector is a column, x[:, None]"
                )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.lam, self.p, self.q)

    @property
    def batch(self) -> torch.Size:
        return torch.broadcast_shapes(self.lam.shape[:-1], self.p.shape[:-2], self.q.shape[:-2])

    @property
    def size(self) -> int:
        return self.lam.shape[-1]

    @property
    def mT(self) -> DPLR:
        return DPLR(self.lam, self.q.conj(), self.p.conj())

    def dense(self) -> Tensor:
        return torch.diag_embed(self.lam) - self.p @ adjoint(self.q)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.lam[..., None] * x - self.p @ (adjoint(self.q) @ x)

    def square(self) -> Dense:
        """Dense, for the rank would double."""
        return Dense(self @ self.dense())

    def affine(self, scale: Tensor | float, shift: Tensor | float) -> DPLR:
        lam = _column(scale, 1) * self.lam + _column(shift, 1)
        return DPLR(lam, _column(scale, 2) * self.p, self.q)

    def solve(self, x: Tensor) -> Tensor:
        """A^-1 x; as a dense matrix where Woodbury's formula does not hold."""
        try:
            return self.inverse() @ x
        except Singular:
            return Dense(self.dense()).solve(x)

    def inverse(self) -> DPLR:
        """(L - p q^*)^-1 = L^-1 + L^-1 p (1 - q^* L^-1 p)^-1 q^* L^-1 (Woodbury).

        Also Singular if L is, whatever the sum.
        """
        diagonal = Diagonal(self.lam).inverse()
        p = diagonal @ self.p
        product = adjoint(self.q) @ p
        eye = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
        core = Dense(eye - product).inverse()
        return DPLR(diagonal.lam, -(p @ core.matrix), diagonal.lam.conj()[..., None] * self.q)

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvals(self.dense())


StateMatrix: TypeAlias = Dense | Diagonal | DPLR


def cast(A: StateMatrix, dtype: torch.dtype) -> StateMatrix:
    return type(A)(*(t.to(dtype) for t in A.tensors))


def unsqueeze(A: StateMatrix) -> StateMatrix:
    """A with one more, last batch dimension of size 1: to be met with many points at once."""
    if isinstance(A, Dense):
        return Dense(A.matrix[..., None, :, :])
    if isinstance(A, Diagonal):
        return Diagonal(A.lam[..., None, :])
    return DPLR(A.lam[..., None, :], A.p[..., None, :, :], A.q[..., None, :, :])


def check_parameter(name: str, x: object, ndim: int, layout: str) -> Tensor:
    """`x` must be a real or complex tensor of at least `ndim` dimensions, none of them empty."""
    if not isinstance(x, Tensor):
        raise fail(name, type(x).__name__, f"a torch tensor {layout}", "torch.as_tensor(...)")
    if x.dtype not in DTYPES:
        raise fail(name, x.dtype, "float32 or 64, complex64 or 128", f"{name}.double()")
    if x.ndim < ndim or 0 in x.shape:
        expected = f"{layout}, no size 0" if 0 in x.shape else layout
        raise fail(name, f"shape {tuple(x.shape)}", expected, "check its layout and sizes")
    return x


def _column(x: Tensor | float, ndim: int) -> Tensor | float:
    """A number a batch entry [...] made to broadcast against [...,N] or [...,N,N]."""
    return x[(..., *[None] * ndim)] if isinstance(x, Tensor) else x


def _check_regular(condition: Tensor) -> None:
    """`condition`: how much larger errors get, for a matrix that is I plus something."""
    if not bool((16 * torch.finfo(condition.dtype).eps * condition < 1).all()):
        raise Singular("the matrix is singular")


def _one_norm(x: Tensor) -> Tensor:
    return x.abs().sum(-2).amax(-1)

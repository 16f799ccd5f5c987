"""Defences: what true gradients look like, and noise does not.

The gradient of one sample's loss with respect to the weight of a Linear layer that sees one vector a sample is an outer
product, ``delta a^T``: a matrix of rank 1. Noise on its entries has full rank. So

- the share of such a row's energy that lies outside its best matrix of rank 1 says whether there is noise at all: on
  clean gradients it is of rounding size, and nothing is changed;
- where there is noise, the row is replaced by that best matrix, which keeps the signal and about
  ``(a + b) / (a b)`` of the noise's energy for an (a, b) matrix. A convolution's gradient is a sum over positions with
  fast-falling singular values; there ``_CONV_RANK`` are kept.

Mean gradients of whole batches have no low rank. Where there is noise, slopes are therefore averaged over the rows of
single samples. Those of exact rank are cleaned before, which costs nothing of the signal. The others are not: the mean
over n rows has an n-th of the noise anyway, and what a low rank cuts off adds up.

Where rows are those of mini-batches, noise is looked for in the gradients of a few samples apart. Slopes are then the
mean of the middle quarter of each entry over mini-batches (:func:`middle_mean`).

Place in the pipeline: between capture and regression.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swap_prune.fisher.factor import DenseFactor, FisherFactor
from swap_prune.fisher.layers import layer_input
from swap_prune.losses import LossFn
from swap_prune.memory.process import pass_on_shortage
from swap_prune.network.bound import Bound
from swap_prune.network.modes import eval_mode
from swap_prune.samples.batches import batch_size, in_own_containers, is_single, split_batches
from swap_prune.selection import Selection

__all__ = ["APART", "LowRank", "low_rank_rows", "middle_mean", "outer_product_layers"]

_CLEAN = 1e-4  # share of energy outside rank 1 that rounding may leave
PROBE = 32  # rows that are looked at to see whether there is noise
PIECE = 4  # of them at once, for the memory
APART = 8  # samples whose gradients are taken to look at, where rows are those of mini-batches
_CONV_RANK = 3  # docs/method.md
_TRIMMED = 0.375  # of the rows, at either side of a middle mean
_SORTED = 2**20  # entries that are sorted at once for it
_ITERATIONS = 3  # of the subspace iteration
_CHUNK_BYTES = 16 * 2**20  # of rows that are worked on together: what a cache holds
_GPU_CHUNK_BYTES = 256 * 2**20  # the same on a GPU, where small kernels are dear
_EXPONENT = 126  # powers of two that float32 has, both ways


@dataclass(frozen=True)
class LowRank:
    """The defence of one run.

    Attributes:
        shapes: Parameter name to the shape of its gradient as a matrix; one entry for each that has such a shape.
        places: Parameter name to its columns of G.
        exact: Names of the layers whose per-sample gradients have rank 1.
        per_sample: Whether the rows of G belong to single samples.
    """

    shapes: Mapping[str, tuple[int, int]]
    places: Mapping[str, slice]
    exact: tuple[str, ...]
    per_sample: bool

    @classmethod
    def of(cls, model: nn.Module, selection: Selection, loss_fn: LossFn, batch: Any, *, per_sample: bool) -> LowRank:
        """Look at a network once; see :func:`outer_product_layers` for the arguments."""
        shapes = {
            name: (shape[0], shape.numel() // shape[0])
            for name, shape in selection.shapes.items()
            if len(shape) >= 2 and shape.numel() > 0
        }
        exact = outer_product_layers(model, selection, loss_fn, batch)
        return cls(shapes, selection.slices(), exact, per_sample)

    def noise_seen(self, factor: FisherFactor) -> float:
        """Look at the first rows of G, those of single samples; see :meth:`noise_in`."""
        seen = min(PROBE, factor.shape[0])
        return self.noise_in(factor.row_span(start, min(start + PIECE, seen)) for start in range(0, seen, PIECE))

    def noise_in(self, pieces: Iterable[Tensor]) -> float:
        """Look at rows of single samples, a few (m, p) at a time.

        Returns:
            The largest share of energy outside rank 1 over the layers where there should be none; 0 for clean.
        """
        if not self.exact:
            return 0.0
        energies = {name: [0.0, 0.0] for name in self.exact}
        for rows in pieces:
            for name, (energy, rest) in energies.items():
                more, beyond = _energies(rows[:, self.places[name]].reshape(-1, *self.shapes[name]))
                energies[name] = [energy + more, rest + beyond]
        share = max(rest / energy if energy > 0 else 0.0 for energy, rest in energies.values())
        return share if share > _CLEAN else 0.0

    def mean_row(self, factor: DenseFactor) -> Tensor:
        """Return the mean of noisy rows, (p,), which may be overwritten: cleaned where that is exact.

        Of mini-batches it is the mean of the middle quarter.
        """
        if not self.per_sample:
            return middle_mean(factor.matrix)
        exact = replace(self, shapes={name: self.shapes[name] for name in self.exact})
        return exact.clean_rows_(factor).matrix.mean(0)

    def clean_rows_(self, factor: DenseFactor) -> DenseFactor:
        """Overwrite per-sample rows of G by their leading outer products, layer by layer, in chunks of rows."""
        n = factor.shape[0]
        together = _CHUNK_BYTES if factor.matrix.device.type == "cpu" else _GPU_CHUNK_BYTES
        for name, (a, b) in self.shapes.items():
            rank = 1 if name in self.exact else _CONV_RANK
            if not self.per_sample or min(a, b) <= rank:
                continue
            size = max(1, together // (4 * a * b * factor.matrix.element_size()))
            for start in range(0, n, size):
                rows = factor.matrix[start : start + size, self.places[name]]
                rows.copy_(low_rank_rows(rows.reshape(-1, a, b), rank).reshape(len(rows), -1))
        return factor


def middle_mean(rows: Tensor) -> Tensor:
    """Return the mean of the middle quarter of each entry over rows (n, p), (p,).

    What noise makes of an entry in fewer than three eighths of the rows, to either side, is left out, however loud it
    is (the coordinate-wise trimmed mean; Yin et al., ICML 2018, arXiv 1803.01498).

    Args:
        rows: Gradients of batches that are about as large; they count alike.
    """
    cut = int(_TRIMMED * len(rows))
    blocks = torch.split(rows, max(1, _SORTED // len(rows)), dim=1)
    return torch.cat([block.sort(dim=0).values[cut : len(rows) - cut].mean(0) for block in blocks])


def _energies(matrices: Tensor) -> tuple[float, float]:
    """Return the energy of matrices (m, a, b), and that outside the best ones of rank 1."""
    scale = float(matrices.abs().amax())
    if scale == 0:
        return 0.0, 0.0
    matrices = matrices / scale  # or squares of small gradients would be zero
    rest = (matrices - low_rank_rows(matrices, 1)).double().square_().sum()
    return float(matrices.double().square_().sum()) * scale**2, float(rest) * scale**2


def outer_product_layers(model: nn.Module, selection: Selection, loss_fn: LossFn, batch: Any) -> tuple[str, ...]:
    """Return the selected weights of Linear layers that see one vector a sample, once, and are used nowhere else.

    Args:
        model: The network.
        selection: The selected weights.
        loss_fn: Used to run the network.
        batch: A batch to run it on.
    """
    weights = dict(model.named_parameters())
    names = {id(weights[name]): name for name in selection.names}
    users: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in names:
                users.setdefault(names[id(parameter)], []).append(module)
    single = {name: used[0] for name, used in users.items() if len(used) == 1 and _is_plain(used[0], weights[name])}
    calls: dict[str, list[bool]] = {name: [] for name in single}
    size = batch_size(batch)

    def watch(name: str) -> Any:
        def see(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            shape = layer_input(inputs, named).shape
            calls[name].append(len(shape) == 2 and shape[0] == size)  # more vectors than samples are tokens

        return see

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in single.items()]
    try:
        with eval_mode(model), torch.no_grad():
            loss_fn(model, in_own_containers(batch))
    finally:
        for handle in handles:
            handle.remove()
    return _without_other_uses(model, selection, loss_fn, batch, [n for n, seen in calls.items() if seen == [True]])


def _without_other_uses(
    model: nn.Module, selection: Selection, loss_fn: LossFn, batch: Any, names: Sequence[str]
) -> tuple[str, ...]:
    """Return the weights whose gradients of a few samples, each alone, have rank 1, or are others each time.

    A weight may be used outside its layer too, as in a penalty or a decoder that shares it. Its gradients are then of
    higher rank, and the same each time. Those that a user's own noise is in are not.
    """
    exact, weights = dict.fromkeys(names), selection.read(model)
    for sample in filter(is_single, split_batches([batch], 1)[:APART] if exact else []):
        both = [_gradients_apart(model, selection, loss_fn, sample, weights) for _ in range(2)]  # the same each time?
        if not all(both):
            break  # a network that takes no sample alone
        for name in list(exact):
            one, other = (gradients[name] for gradients in both)
            if one is None or other is None or one.ndim != 2 or not torch.equal(one, other):
                continue
            energy, rest = _energies(one.to(weights).unsqueeze(0)) if min(one.shape) > 1 else (0.0, 0.0)
            if rest > (_CLEAN + torch.finfo(one.dtype).eps ** 2) * energy:  # entries are rounded
                del exact[name]
    return tuple(exact)


def _gradients_apart(
    model: nn.Module, selection: Selection, loss_fn: LossFn, sample: Any, weights: Tensor
) -> dict[str, Tensor | None]:
    """Return the gradients of one sample's loss, by name; none where it cannot be run alone."""
    try:
        with eval_mode(model), torch.enable_grad():
            losses, leaves = Bound(model, loss_fn).with_leaves(selection, sample, weights)
            found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
    except Exception as error:  # rows may be those of mini-batches, which do not need that it can
        pass_on_shortage(error)
        return {}
    return dict(zip(selection.names, found, strict=True))


def _is_plain(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the very weight that a Linear layer multiplies with; hooks may make another from it."""
    plain = type(module) is nn.Linear and not module._forward_pre_hooks
    return plain and module.weight is parameter


def low_rank_rows(rows: Tensor, rank: int) -> Tensor:
    """Return the best approximations of a rank, (n, a, b), by batched subspace iteration (Halko et al., 2011).

    Args:
        rows: Matrices, (n, a, b).
        rank: At least 1, below a and b.
    """
    n, a, b = rows.shape
    if a > b:
        return low_rank_rows(rows.transpose(1, 2), rank).transpose(1, 2)
    largest_entry = torch.linalg.vector_norm(rows, torch.inf, (1, 2), keepdim=True)
    exponent = torch.frexp(largest_entry).exponent.clamp(-_EXPONENT, _EXPONENT)
    rows = rows * torch.ldexp(torch.ones_like(largest_entry), -exponent)  # the fourth power of one may be no number
    gram = rows @ rows.transpose(1, 2)  # (n, a, a): the smaller side
    diagonal = gram.diagonal(dim1=1, dim2=2)
    largest = diagonal.topk(rank, dim=1).indices
    basis = gram.gather(2, largest.unsqueeze(1).expand(n, a, rank))  # a first guess: where the energy is
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(gram @ basis)
    return torch.ldexp(basis, exponent) @ (basis.transpose(1, 2) @ rows)

"""How many bytes a run will hold in each of its phases, from counts.

Forecasts come from counts (rows, weights, samples) and from the bytes that one sample keeps for its backward pass; they
are meant to lie above what is then measured.

Place in the pipeline: beneath planning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from swap_prune.distributed import PARTS
from swap_prune.fisher.backends.blocked import block_bytes
from swap_prune.fisher.capture.layers import piece_bytes
from swap_prune.fisher.capture.sketch import MINI_BATCH
from swap_prune.fisher.defence.gradients import LOOKED_CLOSELY_AT, PIECE
from swap_prune.fisher.storage import HOLDING_NO_ROWS, Storage, StorageKind, chunk_bytes
from swap_prune.regression.swap import SHARE, SHORTLIST
from swap_prune.regression.tuning import TUNING_ROWS
from swap_prune.samples.spill import Spilled
from swap_prune.surgery.batchnorm import MISFIT_SAMPLES

__all__ = ["Workload", "held_of_g", "memory_phases"]

_LIBRARIES = 200 * 2**20  # code and heaps that torch touches only once it computes
_OTHER_LIBRARIES = 64 * 2**20  # those that it has not touched when it has run one sample
_SEEN = 6  # copies of a row that is looked at: taken again, in float64, and what a treatment makes of it
_GRAM = 512 * 2**20  # two copies of a block of columns
_VECTORS, _HOLES = 8, 8  # p-sized arrays that the solver and the pipeline hold at once; freed, and kept by the heap
_OF_EWR = 2  # more of them: the fit before steps, and the coupled one
_MAPPED_BYTES = 32 * 2**20  # glibc gives arrays of that size back at once
_INDEX = 112  # bytes that solver and candidates hold for each kept weight: its index, and the values there
_SQUARES = 6  # n x n arrays in float64: factors, systems, plans
_GRAMS = 14  # and in the weights' precision: of each fit, floors included, and where a path begins, with its indices
_BACKWARD, _BACKWARD_TENSORS = 2, 8  # what a backward pass holds, in units of what was kept; in large tensors beside it
_FORWARD, _FORWARD_TENSORS = 0.5, 6  # what a forward pass alone holds, in the same units
_COMPARED = 8  # tensors of the size of a batch's outputs, where they are compared with the dense network's
_READ = 4  # batches of samples held where one after the other is read: in hand, joined, being joined, and read
_BLOCKS = 10  # of G, that products hold, or that came and went and left holes in the heap
_CONTEST = 2  # p-sized arrays that a contest keeps while another is held
_PASS_VECTORS = 1  # p-sized arrays of a factor that holds nothing of G: weights that noise has changed
_COUPLED = 1.1  # copies of rows that couplings are chosen on, and a little of what is done with them
_EXCHANGE = SHORTLIST * SHARE * 28  # bytes that swaps copy a row and kept weight: these columns, in float64 thrice


@dataclass(frozen=True)
class Workload:
    """What the need of a run depends on.

    Attributes:
        rows: n, rows of G.
        samples: Calibration samples a stage.
        weights: p.
        kept: k of the stage that keeps most.
        method: Name of the method.
        itemsize: Bytes of an entry of a gradient.
        kept_bytes: Bytes that one sample keeps for its backward pass; 0: none was run.
        largest_bytes: Bytes of the largest tensor among them; 0: not known.
        unfused_bytes: As ``kept_bytes``, where attention is not fused, as passes along a direction need it.
        in_batches: Whether a row is the gradient of a mini-batch.
        mini_batch: Samples of one.
        compared: Rows of single samples that may be taken beside those of mini-batches; 0: none.
        row_noise: Whether a noise model changes the rows of G.
        slopes_held: Whether slopes are averaged over gradients that are held together, whatever is in them.
        sample_bytes: Bytes of a sample itself.
        can_spill: Whether samples can lie in files.
        output_bytes: Bytes of its outputs, where the loss compares them.
        spare: Samples that are held out of a stage.
        judged: Samples that the number of stages is judged by, all along.
        recalibrated: Samples that BatchNorm is recalibrated with, at the most, a few batches at a time.
        doubted: Whether inputs may be shifted back.
        trained: Samples of a step of fine-tuning; 0: there is none.
        training: Bytes of gradients and of the optimiser's state in fine-tuning.
        largest_parameter: Bytes of the largest parameter that is trained.
        copies: Bytes of copies of the whole network, where all of it will change.
        held: Bytes that the process holds already, the model included.
        device: Whose memory is meant.
        processes: How many share G, in storage ``sharded``.
        columns: Columns of G that the method copies at once in float64, in any storage; None: it does not say.
        row_numbers: Numbers that a row of low rank takes.
        unsuited: Why rows of low rank are not to be had, or empty.
        counts: Which of these are others where so many samples a stage are asked for; None: rows are in proportion.
    """

    rows: int
    samples: int
    weights: int
    kept: int
    method: str
    itemsize: int = 4
    kept_bytes: int = 0
    largest_bytes: int = 0
    unfused_bytes: int = 0
    sample_bytes: int = 0
    can_spill: bool = False
    output_bytes: int = 0
    spare: int = 0
    judged: int = 0
    recalibrated: int = 0
    doubted: bool = False
    trained: int = 0
    training: int = 0
    largest_parameter: int = 0
    copies: int = 0
    in_batches: bool = False
    mini_batch: int = MINI_BATCH
    compared: int = 0
    row_noise: bool = False
    slopes_held: bool = False
    held: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    processes: int = 1
    columns: int | None = None
    row_numbers: int = 0
    unsuited: str = ""
    counts: Callable[[int], Mapping[str, Any]] | None = None

    def of(self, samples: int) -> Workload:
        """Return the same of so many samples, and with one kind of rows."""
        if self.counts is None:
            return replace(self, samples=samples, rows=-(-samples * self.rows // self.samples), compared=0)
        return replace(self, **{**self.counts(samples), "compared": 0})


def memory_phases(load: Workload, storage: Storage) -> dict[str, int]:
    """Return the bytes that the process holds in each phase.

    Args:
        load: The run.
        storage: How G is held, and what lies in files: of samples, then, a few batches are held.
    """
    phases = _phases(load, storage)
    if not load.compared:
        return phases
    beside = held_of_g(load, storage.kind) + (load.samples + load.spare) * load.output_bytes  # while others are taken
    beside += _CONTEST * load.itemsize * load.weights
    others = _phases(replace(load, rows=load.compared, in_batches=False, compared=0), storage)
    return {name: max(need, beside + others[name]) for name, need in phases.items()}


def _phases(load: Workload, storage: Storage) -> dict[str, int]:
    """Return the bytes that the process holds in each phase, with one G."""
    vector, n = load.itemsize * load.weights, load.rows
    kind, at_once, lean = storage.kind, storage.at_once, not storage.copies_columns
    factor, in_memory = held_of_g(load, kind), storage.spilled == "nothing"
    libraries = _OTHER_LIBRARIES if load.kept_bytes else _LIBRARIES
    rest = load.held + load.copies + libraries + 2 * vector  # copies of the weights: to restore, and those asked of
    rest += load.judged * load.sample_bytes if in_memory else 0
    forwards = storage.forwards
    drawn_at_once = max(forwards, load.mini_batch) if load.in_batches else forwards
    in_hand = _READ * drawn_at_once
    drawn = (load.samples + load.spare) if in_memory else min(load.samples + load.spare, in_hand)
    signs = 0 if load.in_batches and storage.holds_rows else max(load.rows, load.samples) * load.output_bytes
    lasting = signs if kind == "matrix-free" else 0
    common = rest + factor + drawn * load.sample_bytes + lasting
    blocks = _BLOCKS * block_bytes(load.device) if lean else min(_GRAM, 2 * n * load.kept * load.itemsize)
    if kind == "matrix-free":
        blocks = 0  # passes count its columns
    vectors = _VECTORS + (_OF_EWR if load.method == "ewr" else 0) + (_HOLES if vector < _MAPPED_BYTES else 0)
    solve = common + vectors * vector + _INDEX * load.kept + (_SQUARES * 8 + _GRAMS * load.itemsize) * n * n + blocks
    copies = _column_copies(load, lean=lean)
    # a natural-gradient step keeps its columns during trials, and multiplies them before
    step = min(copies, n * load.kept * load.itemsize) - (blocks if lean else 0)
    forward = min(forwards, load.samples) * _forward_bytes(load)
    asking = min(drawn_at_once, load.samples) * _forward_bytes(load)
    backward = min(at_once, load.samples) * _backward_bytes(load, storage.spilled)
    known = _PASS_VECTORS * vector if kind == "matrix-free" else 0
    passes = known + _passes(load, storage) if kind == "matrix-free" else 0
    compared = _COMPARED * min(forwards, load.samples) * load.output_bytes  # outputs beside the dense network's
    drawing = load.mini_batch * _COMPARED * load.output_bytes if load.in_batches else compared
    shifted = 0
    if load.doubted:  # before G is there; shifted samples lie beside those that they were
        shifted = rest + (2 if in_memory else 1) * drawn * load.sample_bytes + backward
    again = 0
    if (load.row_noise or load.slopes_held) and not load.in_batches:  # as rows of G
        rows = max(factor, (load.samples + load.spare) * vector)  # in the end of all samples
        again = rows + _capture(load, replace(storage, kind="float32", lean=False))
    read = min(load.recalibrated, max(MISFIT_SAMPLES, in_hand) if in_memory else in_hand)
    looks = 2 if load.in_batches else 1  # in small batches, where there is noise, and in whole ones
    # outputs of the dense network, for slopes and trials; in the end slopes are over all samples
    taught = looks * load.samples + (1 + looks) * load.spare
    trial = max(forward + compared, max(backward, again) + _slopes(load, storage), passes)
    phases = {
        "capture": common + known + signs - lasting + max(_capture(load, storage), asking + drawing),
        "defend": max(common + _defence(load, kind), shifted),
        "solve": solve + copies + passes,
        "trials": solve + taught * load.output_bytes + step + trial,
        "recalibrate": rest + (read * load.sample_bytes + asking if load.recalibrated else 0),
    }
    return phases | ({"finetune": rest + _training(load, storage.spilled)} if load.trained else {})


def _defence(load: Workload, kind: StorageKind) -> int:
    """Return what looking for noise in the rows holds: two looks at a few at once, and what is made of them."""
    if kind in HOLDING_NO_ROWS:
        return 0
    looked_at = 2 if load.in_batches else min(PIECE, load.rows)
    if load.row_noise and kind == "float32":
        looked_at = max(looked_at, min(LOOKED_CLOSELY_AT, load.rows))
    return _SEEN * looked_at * load.itemsize * load.weights


def _slopes(load: Workload, storage: Storage) -> int:
    """Return what gradients of batches take: all of them together in float32, or sums that they are added to."""
    vector = load.itemsize * load.weights
    if (load.row_noise or load.slopes_held) and load.in_batches:  # those of mini-batches, and their mean
        return (max(load.rows, -(-(load.samples + load.spare) // load.mini_batch)) + 1) * vector
    if storage.kind == "float32":
        return -(-(load.samples + load.spare) // storage.at_once) * vector
    return (2 if storage.kind != "sharded" else 3 + -(-PARTS // load.processes)) * vector


def _training(load: Workload, spilled: Spilled) -> int:
    """Return what a step of fine-tuning holds: a batch and what it is made of, temporaries, masks and what was zero."""
    sample = 2 * load.sample_bytes + _backward_bytes(load, spilled) + _COMPARED * load.output_bytes
    return load.training + load.trained * sample + 2 * load.largest_parameter + 2 * load.weights


def _forward_bytes(load: Workload) -> int:
    """Return what a forward pass alone holds of a sample: a few large tensors, or half of what it would keep."""
    half = int(_FORWARD * load.kept_bytes)
    return min(half, _FORWARD_TENSORS * load.largest_bytes) if load.largest_bytes else half


def _backward_bytes(load: Workload, spilled: Spilled = "nothing") -> int:
    """Return what a backward pass holds of a sample: what was kept, and a few large tensors or as much again."""
    if spilled == "activations" and load.largest_bytes:
        return min(load.kept_bytes, _BACKWARD_TENSORS * load.largest_bytes)
    twice, largest = _BACKWARD * load.kept_bytes, load.largest_bytes
    if not largest:
        return twice
    return min(max(twice, load.kept_bytes + 4 * largest), load.kept_bytes + _BACKWARD_TENSORS * largest)


def held_of_g(load: Workload, kind: StorageKind) -> int:
    """Return what is held of G itself."""
    entries = load.rows * load.weights
    match kind:
        case "float32":
            return load.itemsize * entries
        case "float16" | "bfloat16":
            return 2 * entries
        case "low-rank":
            return load.itemsize * load.rows * load.row_numbers
        case "sharded":
            own = -(-PARTS // load.processes) * -(-load.weights // PARTS)  # columns
            return load.itemsize * load.rows * min(load.weights, own)
        case "mapped" | "matrix-free":
            return 0


def _capture(load: Workload, storage: Storage) -> int:
    """Return what capture holds beside the rows that are done."""
    vector, kind, at_once = load.itemsize * load.weights, storage.kind, storage.at_once
    lean = not storage.copies_columns and kind != "low-rank"
    budget = chunk_bytes(load.device, at_once, lean=lean, roomy=storage.roomy)
    piece = piece_bytes(load.device)
    if kind == "low-rank":  # inputs and gradients of the layers of a chunk, then the parts of a layer beside the whole
        chunk = max(1, min(2 * at_once, load.rows, budget // (load.kept_bytes + vector)) // 2)
        chunk = load.mini_batch if load.in_batches else chunk
        return chunk * (load.kept_bytes + _backward_bytes(load)) + 6 * vector + 4 * piece + held_of_g(load, kind)
    if load.in_batches:
        return load.mini_batch * _backward_bytes(load, storage.spilled) + 3 * vector
    chunk = max(1, min(2 * at_once, load.rows, budget // (load.kept_bytes + vector)))
    buffered = 1 if kind != "float32" else 0
    return chunk * (_backward_bytes(load) + (1 + buffered) * vector) + 2 * vector + 2 * piece


def _passes(load: Workload, storage: Storage) -> int:
    """Return what products hold that pass through the network: columns, and a chunk of rows that they are cut out of.

    A pass along a direction, or back, holds less than the chunk or what a trial does, but where attention is not fused.
    """
    vector = load.itemsize * load.weights
    columns = 2 * max(block_bytes(load.device), min(load.rows, storage.block_vectors) * vector)
    part = _backward_bytes(load, storage.spilled) + max(0, _BACKWARD * (load.unfused_bytes - load.kept_bytes))
    return columns + max(min(storage.at_once, load.samples) * part, _capture(load, storage))


def _column_copies(load: Workload, *, lean: bool) -> int:
    """Return the bytes of columns of G that the method copies at once; lean, only those that nothing holds back."""
    n, k, p = load.rows, load.kept, load.weights
    if load.columns is not None:
        return 4 * 8 * n * min(p, load.columns)
    if lean or load.method in ("obd", "cbs"):
        return 0
    if load.method == "chita":
        return int(1.5 * n * k) * load.itemsize
    coupled = int(_COUPLED * min(n, TUNING_ROWS) * p) * load.itemsize if load.method == "ewr" else 0
    return max(2 * n * k * load.itemsize, int(_EXCHANGE * n * k), coupled)  # LR's, or a user's own method's

"""Every way to hold G, against the products of the dense float64 matrix."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from swap_prune.fisher.backends import blocked
from swap_prune.fisher.backends.half import HalfFactor, cut_and_weigh, row_scales
from swap_prune.fisher.backends.mapped import MappedFactor, MappedWriter
from swap_prune.fisher.factor import DenseFactor, SubFactor
from tests.cases import normal

EXACT, FLOAT16, BFLOAT16 = 1e-5, 2.0**-11, 2.0**-8  # relative to the sizes that are added up


def mapped(matrix, directory, parts=3):
    writer = MappedWriter(directory, len(matrix), matrix.shape[1], matrix.dtype)
    for rows in torch.tensor_split(matrix, parts):
        writer.append(rows)
    return writer.finish()


def embedded(matrix):
    """The same G as some rows and columns, in another order, of a larger one."""
    n, p = matrix.shape
    whole = normal(2 * n + 1, p + 3, seed=9, dtype=matrix.dtype)
    rows, columns = torch.randperm(2 * n + 1)[:n], torch.randperm(p + 3)[:p]
    whole[rows.unsqueeze(1), columns] = matrix
    return SubFactor(DenseFactor(whole), rows, columns)


KINDS = {
    "dense": (lambda G, _: DenseFactor(G), EXACT),
    "lean": (lambda G, _: DenseFactor(G, limit=2), EXACT),
    "float16": (lambda G, _: HalfFactor.of(G, torch.float16), FLOAT16),
    "bfloat16": (lambda G, _: HalfFactor.of(G, torch.bfloat16), BFLOAT16),
    "mapped": (mapped, EXACT),
    "part": (lambda G, _: embedded(G), EXACT),
}


@pytest.mark.parametrize("block", [16, 400, 2**25])
@pytest.mark.parametrize(("n", "p"), [(7, 20), (20, 7), (1, 5), (5, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, n, p, block, tmp_path, monkeypatch):
    """All that a solver may ask, in one block and in many; rows of very different size."""
    monkeypatch.setattr(blocked, "BLOCK_BYTES", block)
    monkeypatch.setattr("swap_prune.fisher.backends.mapped.BLOCK_BYTES", block)
    make, rounding = KINDS[kind]
    G32 = (normal(n, p, seed=n + p) * torch.logspace(-6, 3, n, dtype=torch.float64).unsqueeze(1)).float()
    factor, G = make(G32, tmp_path), G32.double()
    w, v = normal(p, seed=1).float(), normal(n, seed=2).float()
    scale = normal(p, seed=3).float().abs() * (torch.arange(p) % 3 != 1)

    def close(result, expected, sizes):
        assert result.dtype == torch.float32 and result.shape == expected.shape
        assert bool(((result.double() - expected).abs() <= 2 * rounding * sizes + 1e-30).all())

    assert factor.shape == (n, p)
    close(factor.matvec(w), G @ w.double(), G.abs() @ w.double().abs())
    close(factor.rmatvec(v), G.T @ v.double(), G.abs().T @ v.double().abs())
    close(factor.diagonal(), G.square().mean(0), G.square().mean(0))
    half = scale.double().sqrt()
    close(factor.gram(scale), (G * scale.double()) @ G.T, (G * half).abs() @ (G * half).abs().T)
    index = torch.tensor([p - 1, 0, p // 2])
    close(factor.columns(index), G[:, index], G[:, index].abs())
    assert factor.columns(index[:0]).shape == (n, 0)
    close(factor.row_span(len(G) // 2, 99), G[len(G) // 2 :], G[len(G) // 2 :].abs())
    rows = torch.tensor([n - 1, 0, n // 2])
    some, R = factor.rows(rows), G[rows]
    assert some.shape == (3, p) and some.rows(torch.tensor([2, 0])).shape == (2, p)
    close(some.matvec(w), R @ w.double(), R.abs() @ w.double().abs())
    close(some.rmatvec(v[rows]), R.T @ v[rows].double(), R.abs().T @ v[rows].double().abs())
    close(some.diagonal(), R.square().mean(0), R.square().mean(0))
    close(some.gram(scale), (R * scale.double()) @ R.T, (R * half).abs() @ (R * half).abs().T)
    close(some.row_span(len(R) - 1, 99), R[-1:], R[-1:].abs())


def test_float16_bears_any_size_of_a_row():
    rows = torch.stack([torch.full((4,), size) for size in (1e-28, 1e-8, 0.0, 1.0, 7e4, 3e38)])
    scale = row_scales(rows)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((6,), 0.5)), "powers of two"
    factor = HalfFactor.of(rows, torch.float16)
    torch.testing.assert_close(factor.columns(torch.arange(4)), rows, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "p"), [(9, 1), (1, 7), (6, 64), (37, 1000)])
def test_matrix_units_multiply_float32_vectors(n, p, dtype, monkeypatch):
    """What a GPU does, on the CPU: vectors of any size are not rounded to 16 bits."""
    monkeypatch.setattr(HalfFactor, "_by_matrix_units", property(lambda _: True))
    monkeypatch.setattr("swap_prune.fisher.backends.half._SLICE", 300)
    factor = HalfFactor.of((normal(n, p) * torch.logspace(-6, 3, n, dtype=torch.float64).unsqueeze(1)).float(), dtype)
    G = factor.columns(torch.arange(p)).double()
    w = normal(p, seed=1) * torch.logspace(-4, 3, p, dtype=torch.float64)
    v = normal(n, seed=2) * torch.logspace(5, -5, n, dtype=torch.float64)
    scale = normal(p, seed=3) * 1e4 * (torch.arange(p) % 3 != 1)

    def close(result, expected, sizes, rounding):
        assert result.dtype == torch.float32 and result.shape == expected.shape
        assert bool(((result.double() - expected).abs() <= rounding * sizes.max() + 1e-30).all())

    close(factor.matvec(w.float()) / factor.scale, (G @ w) / factor.scale, (G.abs() @ w.abs()) / factor.scale, 1e-6)
    close(factor.rmatvec(v.float()), G.T @ v, G.abs().T @ v.abs(), 1e-6)
    close(factor.diagonal(), G.square().mean(0), G.square().mean(0), 1e-6)
    absolute = (G * scale.abs()).abs() @ G.T.abs()
    root = absolute.diagonal().sqrt()
    own = (factor.gram(scale.float()).double() - (G * scale) @ G.T).abs() / root / root.unsqueeze(1)
    assert bool((own <= 2.0**-15).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 6, 7])
def test_weighted_columns_lose_nothing_to_rounding(dtype, n):
    stored, index = normal(n, 50).to(dtype), torch.tensor([3, 3, 49, 0])
    weights = normal(4, seed=1).float()
    part, both = cut_and_weigh(stored, index, weights)
    first, second = both.split([2 * (n // 2), 2 * (n - n // 2)])
    high, low = (torch.cat(pieces) for pieces in zip(first.tensor_split(2), second.tensor_split(2), strict=True))
    assert torch.equal(part, stored[:, index])
    product = part.double() * weights.double()
    assert torch.equal(high, product.float().to(dtype))
    limits = torch.finfo(dtype)
    allowed = limits.eps**2 / 2 * product.abs() + limits.smallest_normal * limits.eps
    assert bool(((high.double() - low.double() - product).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_are_left_as_stored_where_matrix_units_multiply_them(dtype, monkeypatch):
    factor = HalfFactor.of(normal(5, 40).float(), dtype)
    index = torch.tensor([7, 0, 39])
    assert factor.exact_columns(index).dtype == torch.float32
    monkeypatch.setattr(HalfFactor, "_by_matrix_units", property(lambda _: True))
    found = factor.exact_columns(index)
    assert found.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert torch.equal(found.float(), factor.columns(index))


@pytest.mark.parametrize("size", [1e-34, 1e-30, 1.0, 1e30])
def test_matrix_units_bear_vectors_of_any_size(size, monkeypatch):
    monkeypatch.setattr(HalfFactor, "_by_matrix_units", property(lambda _: True))
    factor = HalfFactor.of(normal(10, 100).float(), torch.float16)
    exact = factor.columns(torch.arange(100)).double()
    v, w = normal(10, seed=1).float() * size, normal(100, seed=2).float() * size
    for found, expected in ((factor.rmatvec(v), exact.T @ v.double()), (factor.matvec(w), exact @ w.double())):
        assert bool(((found.double() - expected).abs() <= 1e-5 * expected.abs().max()).all())


def test_matrix_units_lose_what_float32_cannot_hold(monkeypatch):
    monkeypatch.setattr(HalfFactor, "_by_matrix_units", property(lambda _: True))
    factor = HalfFactor.of(normal(10, 100).float() * 1e-20, torch.float16)
    products = factor.rmatvec(normal(10).float() * 1e-18), factor.matvec(normal(100).float() * 1e-40)
    assert all(bool((product.abs() < 1e-36).all()) for product in products), "small, and a number"


@pytest.mark.parametrize(
    ("stored", "scale", "message"),
    [
        (torch.zeros(3, 4), torch.ones(3), "bfloat16 or float16"),
        (torch.zeros(3, 4).half(), torch.ones(4), "scale"),
        (torch.zeros(0, 4).half(), torch.ones(0), "n, p >= 1"),
    ],
)
def test_half_precision_of_another_kind_is_refused(stored, scale, message):
    with pytest.raises(ValueError, match=message):
        HalfFactor(stored, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_finished_file_is_opened_with_the_same_bits(dtype, tmp_path):
    G = normal(9, 33, dtype=dtype)
    mapped(G, tmp_path)
    (path,) = tmp_path.iterdir()
    again = MappedFactor.open(path)
    assert again.shape == (9, 33) and torch.equal(again.columns(torch.arange(33)), G)
    again.delete()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_on_which_no_room_can_be_reserved_is_written_to(tmp_path, monkeypatch):
    def unsupported(*_arguments):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    matrix = normal(3, 5000, dtype=torch.float32)
    factor = mapped(matrix, tmp_path)
    assert torch.equal(factor.row_span(0, 3), matrix)
    assert torch.equal(MappedFactor.open(factor.path).row_span(0, 3), matrix)


def test_fewer_rows_than_announced(tmp_path):
    writer = MappedWriter(tmp_path, 10, 4)
    writer.append(torch.ones(3, 4))
    assert MappedFactor.open(writer.finish().path).shape == (3, 4)


def test_what_a_killed_writer_leaves_is_not_taken_for_whole(tmp_path):
    writer = MappedWriter(tmp_path, 6, 50)
    writer.append(normal(6, 50).float())
    writer._file.flush()
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    with pytest.raises(ValueError, match="did not come to its end"):
        MappedFactor.open(left)
    writer.discard()


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "version", "header"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = mapped(normal(5, 40).float(), tmp_path).path
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[:-1]
    elif damage == "longer":
        data += b"\0"
    elif damage == "flipped":
        data[-7] ^= 1
    elif damage == "version":
        data = data.replace(b'"version": 1', b'"version": 9')
    else:
        data[:4] = b"\0\0\0\0"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="capture G again"):
        MappedFactor.open(path)


def test_a_full_disk_is_one_value_error_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"needs a file of .* GB in .* free"):
        MappedWriter(tmp_path, 10**6, 10**9)  # 4 petabytes
    assert list(tmp_path.iterdir()) == []
    writer = MappedWriter(tmp_path, 2, 3)

    def full(_data):
        raise OSError(28, os.strerror(28))

    writer._file.close()
    monkeypatch.setattr(writer, "_file", type("Full", (), {"write": staticmethod(full), "close": lambda self: None})())
    with pytest.raises(ValueError, match="No space left"):
        writer.append(torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="another directory"):
        MappedWriter(tmp_path / "nowhere", 2, 3)


def test_a_file_that_takes_the_name_of_another_does_not_change_it(tmp_path):
    """Another run may replace a kept G while this one reads it."""
    ours, theirs = mapped(torch.ones(4, 6), tmp_path), mapped(torch.full((4, 6), 2.0), tmp_path)
    again = MappedFactor.open(ours.path)
    theirs.path.replace(ours.path)
    for factor in (ours, again):
        assert float(factor.matvec(torch.ones(6)).sum()) == 24.0
    assert float(MappedFactor.open(ours.path).matvec(torch.ones(6)).sum()) == 48.0
    ours.delete()
    with pytest.raises(ValueError, match="was deleted"):
        ours.matvec(torch.ones(6))
    assert float(again.columns(torch.arange(2)).sum()) == 8.0

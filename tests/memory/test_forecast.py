"""What forecasts count."""

import re
from dataclasses import replace

import pytest

from swap_prune.fisher.storage import Storage
from swap_prune.memory.forecast import memory_phases
from swap_prune.memory.planning import plan_memory
from swap_prune.methods import WoodFisher
from tests.test_process_memory import GB, load


def phases(work, kind="float32", lean=False):
    return memory_phases(work, Storage(kind, lean))


def test_what_a_method_copies_counts_where_nothing_holds_it_back():
    n, p = 500, 200_000
    plain = phases(load(n, p, "obd"))
    assert phases(replace(load(n, p, "of a user"), columns=0)) == plain, "it may say that it copies none"
    lr, ewr, own = (phases(load(n, p, name)) for name in ("lr", "ewr", "of a user"))
    assert own == lr, "it may solve the same problems"
    for lean in (False, True):  # blocks of the Fisher are copied in any case
        wood = phases(replace(load(n, p, "woodfisher"), columns=2000), lean=lean)
        assert wood["solve"] - phases(load(n, p, "obd"), lean=lean)["solve"] == 4 * 8 * n * 2000
    assert lr["solve"] - plain["solve"] >= 2 * n * (p // 10) * 4
    assert ewr["solve"] - plain["solve"] >= 256 * p * 4, "rows that the coupling is chosen on are copied"
    assert phases(load(n, p, "lr"), lean=True)["solve"] == phases(load(n, p, "obd"), lean=True)["solve"]


@pytest.mark.parametrize(("block", "p", "columns"), [("auto", 50_000, 50_000), ("auto", 50_001, 2000), (70, 60, 60)])
def test_woodfisher_says_how_large_its_blocks_are(block, p, columns):
    assert WoodFisher(block=block).columns_at_once(p) == columns


@pytest.mark.parametrize("kind", ["float32", "low-rank", "matrix-free"])
@pytest.mark.parametrize("mini_batches", [False, True])
def test_signs_that_are_held_count(kind, mini_batches):
    """Those of rows of mini-batches are drawn one by one; a matrix-free factor keeps all of them."""
    work = replace(load(100, 10**5), samples=1600, row_numbers=9, in_batches=mini_batches)
    with_outputs = replace(work, output_bytes=4000)
    plain, more = (memory_phases(one, Storage(kind)) for one in (work, with_outputs))
    signs, taught = 1600 * 4000, 1600 * 4000
    drawn_one_by_one = kind == "float32" and mini_batches
    assert (more["capture"] - plain["capture"] < signs) == drawn_one_by_one
    assert more["solve"] - plain["solve"] == (signs if kind == "matrix-free" else 0)
    assert more["trials"] - plain["trials"] >= taught + (signs if kind == "matrix-free" else 0)


def test_square_arrays_and_libraries_count():
    small, large = phases(load(1000, 100)), phases(load(4000, 100))
    assert large["solve"] - small["solve"] >= 6 * 8 * (4000**2 - 1000**2)
    assert min(small.values()) >= 300 * 2**20 + 200 * 2**20


def test_a_row_of_gradients_for_each_batch_counts_in_trials():
    works = [replace(load(100, 10**6), samples=n) for n in (64, 6400)]
    for lean in (False, True):
        few, many = (phases(work, lean=lean)["trials"] for work in works)
        assert many - few == 99 * 4 * 10**6
    few, many = (phases(work, "float16")["trials"] for work in works)
    assert many == few, "they are added up one by one"


def test_a_capture_of_mini_batches_holds_one_of_them():
    work = replace(load(2000, 1000), kept_bytes=10**6)
    assert phases(replace(work, in_batches=True))["capture"] < phases(work)["capture"] - 50 * 2 * 10**6


def test_processes_share_what_is_held():
    one, four = (phases(replace(load(1000, 10**6), processes=n), "sharded", True)["capture"] for n in (1, 4))
    assert one - four == pytest.approx(0.75 * 4 * 10**9, rel=0.02)


def test_the_file_has_all_of_g_and_sharing_is_never_taken_by_itself(tmp_path):
    assert plan_memory(load(1000, 10**6), None, "mapped").require().disk == 4 * 10**9
    assert "sharded" not in [f.name for f in plan_memory(load(1000, 10**6), None).forecasts]


def test_samples_that_are_offered_count_in_rows_of_mini_batches():
    work = replace(load(10**5, 2_600_000), samples=16 * 10**5, in_batches=True)
    refused = plan_memory(work, 4 * GB, "float32")
    fits = int(re.search(r"samples=(\d+)", refused.why)[1])
    assert work.of(fits).rows == -(-fits // 16)
    plan_memory(work.of(fits), 4 * GB, "float32").require()
    assert plan_memory(work.of(int(fits / 0.9)), 4 * GB, "float32").chosen is None


def test_what_runs_at_once_and_who_shares_count_in_slopes():
    work = replace(load(100, 10**6), samples=6400)
    many, few = (memory_phases(work, Storage(at_once=n))["trials"] for n in (16, 64))
    assert many - few == 300 * 4 * 10**6, "gradients of 400 batches, or of 100"
    work = replace(work, rows=1, samples=64, processes=2)
    alone, shared = (phases(work, kind)["trials"] for kind in ("float16", "sharded"))
    assert shared - alone >= 5 * 4 * 10**6, "sums that are sent on beside those that are added to"


def test_noise_on_rows_is_as_dear_where_the_solver_makes_no_copies():
    work = replace(load(1000, 10**6), row_noise=True, kept_bytes=10**5)
    quiet = replace(work, row_noise=False)
    more = [phases(work, lean=lean)["trials"] - phases(quiet, lean=lean)["trials"] for lean in (False, True)]
    assert more[0] == more[1] > 4 * 1000 * 10**6


def test_a_storage_says_how_many_samples_run_and_whether_columns_are_copied():
    assert Storage(at_once=4).forwards == 8 and Storage(at_once=4, spilled="activations").forwards == 4
    kinds = [("float32", False), ("float32", True), ("float16", False)]
    assert [Storage(kind, lean).copies_columns for kind, lean in kinds] == [True, False, False]

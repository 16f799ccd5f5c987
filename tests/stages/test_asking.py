"""What a stage lets its method ask the network: in the end, slopes over held-out samples as well."""

import pytest
import torch
from torch import nn

from swap_prune import prune
from swap_prune.samples.batches import batch_size
from tests.stages.test_runner import asking, own_labels, sure_network
from tests.test_pipeline import small_data


def samples_in(batches):
    return sum(batch_size(one.batch) for one in batches)


def trials_of(slope):
    """Return what answers, of a slope over all samples."""
    return slope.args[0].__self__


@pytest.mark.parametrize(("noise", "stages"), [(None, [1, 2, 3]), ("labels:fraction=0.4", [3])])
def test_samples_that_judge_later_stages_are_learned_from_in_the_last_alone(noise, stages):
    method = asking()
    prune(sure_network(), own_labels(1800), 0.5, method, samples=300, stages=3, noise=noise, progress=False)
    asked = [problem.all_samples for problem in method.problems]
    assert [number for number, one in enumerate(asked, 1) if one is not None] == stages
    last = method.problems[-1]
    narrow, wide = last.slope.__self__, trials_of(asked[-1]().slope)
    assert samples_in(narrow.fitting) == samples_in(narrow.held_out) == 300 and samples_in(wide.fitting) == 600
    held_out = torch.cat([one.batch[0] for one in narrow.held_out])
    assert torch.equal(torch.cat([one.batch[0] for one in wide.fitting[len(narrow.fitting) :]]), held_out)
    assert all((one.trust is None) == (noise is None) for one in wide.fitting), "labels are believed as they were"
    assert wide.whole == [] and asked[-1]().whole_slope is None


def test_whole_slopes_are_over_all_samples_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 3))
    method, noise = asking(), "poison:fraction=0.2,strength=100"
    prune(model, small_data(700), 0.5, method, samples=300, noise=noise, progress=False)
    (problem,) = method.problems
    assert problem.whole_slope is not None
    narrow, wide = problem.slope.__self__, trials_of(problem.all_samples().whole_slope)
    assert samples_in(narrow.whole) == 300 and samples_in(wide.whole) == 600
    assert max(batch_size(one.batch) for one in wide.fitting) < max(batch_size(one.batch) for one in wide.whole) == 64

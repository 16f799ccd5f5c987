"""Fine-tuning, step by step."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from swap_prune import FineTune, finetune

DATA = TensorDataset(
    torch.cat([torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(9, 1)], 1),
    torch.arange(9) % 3,
)


def test_the_mean_loss_of_an_epoch_counts_every_sample_once():
    """Batches of 8 and 1."""
    model = nn.Linear(3, 3, bias=False)
    masks = {"weight": torch.ones(3, 3, dtype=torch.bool)}
    seen = []

    def loss_fn(net, batch):
        losses = nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")
        seen.append(losses.detach())
        return losses

    report = finetune(model, DATA, FineTune(epochs=1, batch_size=8, lr=1e-9), loss_fn=loss_fn, masks=masks)
    assert report.steps == 2, "a sample alone is passed over only where BatchNorm needs two"
    assert report.losses[0] == pytest.approx(float(torch.cat(seen[1:]).mean()))


def test_a_kept_weight_that_was_zero_before_stays_zero():
    """Its input is zero, so that nothing trains it."""
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight[:, 2] = 0
    masks = {"weight": torch.ones(3, 3, dtype=torch.bool)}
    finetune(model, DATA, FineTune(epochs=1, batch_size=9), masks=masks)
    assert not model.weight[:, 2].any()


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_optimiser_is_torchs_with_these_settings(name):
    from copy import deepcopy

    model, masks = nn.Linear(3, 3), {"weight": torch.ones(3, 3, dtype=torch.bool)}
    other = deepcopy(model)
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.3),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.999), weight_decay=0.3),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.5, 0.999), weight_decay=0.3),
    }[name](other.parameters())
    batch = DATA.tensors
    finetune(
        model,
        [batch],
        FineTune(epochs=3, optimizer=name, lr=0.1, momentum=0.5, weight_decay=0.3, schedule="constant", batch_size=9),
        masks=masks,
    )
    for _ in range(3):
        make.zero_grad()
        nn.functional.cross_entropy(other(batch[0]), batch[1]).backward()
        make.step()
    torch.testing.assert_close(model.weight, other.weight)
    torch.testing.assert_close(model.bias, other.bias)


def test_a_last_step_that_leaves_no_finite_weights_is_refused():
    """Its loss was finite."""
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="the weights are not finite after the last step"):
        finetune(
            model,
            DATA,
            FineTune(epochs=1, batch_size=9, lr=1e35),
            masks={"weight": torch.ones(3, 3, dtype=torch.bool)},
            loss_fn=lambda net, batch: 1e6 * net(batch[0]).sum(1),
        )
    assert torch.equal(model.weight, before)

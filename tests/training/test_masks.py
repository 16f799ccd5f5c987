"""Masks kept through every optimiser: exact zeros, nothing builds up behind them, as if the weights were not there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swap_prune import finetune, keep_masks, load_pruned, masks_of, prune, recalibrate_batchnorm
from tests.test_pipeline import small_data, small_network

Maker = Callable[[Iterable[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
    "lbfgs searching": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 6, generator=GENERATOR)
GOALS = torch.randn(40, 5, generator=GENERATOR)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def pruned_network() -> nn.Sequential:
    model = network()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[layer.weight.abs() < layer.weight.abs().median()] = 0
    return model


def step(model: nn.Module, optimizer: Optimizer, inputs: torch.Tensor = INPUTS, goals: torch.Tensor = GOALS) -> float:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - goals).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(closure).item()
    loss = closure()
    optimizer.step()
    return loss.item()


def test_the_norm_that_gradients_are_clipped_by_is_that_of_kept_weights() -> None:
    """As if the pruned weights were not there: a network in which they are constants takes the same steps."""
    torch.manual_seed(0)
    start = torch.randn(5, 6)
    start[torch.rand(5, 6) < 0.8] = 0
    layer = nn.Linear(6, 5, bias=False)
    layer.weight.data.copy_(start)
    kept = nn.Parameter(start[start != 0].clone())

    def smaller(inputs: torch.Tensor) -> torch.Tensor:
        weight = torch.zeros(5, 6).masked_scatter(start != 0, kept)
        return inputs @ weight.T

    own, other = torch.optim.SGD(layer.parameters(), lr=0.1), torch.optim.SGD([kept], lr=0.1)
    keeper = keep_masks(layer, own)
    for _ in range(3):
        norms = []
        for function, parameters, optimizer in ((layer, [layer.weight], own), (smaller, [kept], other)):
            optimizer.zero_grad()
            (function(INPUTS) - GOALS).square().mean().backward()
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.05))
            optimizer.step()
        torch.testing.assert_close(*norms)
    torch.testing.assert_close(layer.weight[start != 0], kept)
    keeper.remove()
    (layer(INPUTS) - GOALS).square().mean().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad[start == 0].any()), "the hooks are off"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_after_every_step_and_the_others_learn(name: str) -> None:
    model = pruned_network()
    masks = masks_of(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    keep_masks(model, optimizer)
    losses = []
    for _ in range(12):
        losses.append(step(model, optimizer))
        for parameter, mask in zip((model[0].weight, model[2].weight), masks.values(), strict=True):
            assert int((parameter == 0).sum()) == int((~mask).sum())
            assert not parameter[~mask].any()
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    assert not value[~mask].any()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_keeper_they_come_back(name: str) -> None:
    """So the tests around this one can fail."""
    model = pruned_network()
    optimizer = OPTIMIZERS[name](model.parameters())
    keeper = keep_masks(model, optimizer)
    keeper.remove()
    for _ in range(3):
        step(model, optimizer)
    assert int((model[0].weight == 0).sum()) < 5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_as_if_the_pruned_weights_were_not_there(name: str) -> None:
    """A linear map without some of its inputs, and one that never had them, take the same path."""
    full, part = nn.Linear(6, 1).double(), nn.Linear(3, 1).double()
    kept = torch.tensor([True, False, True, False, False, True])
    with torch.no_grad():
        full.weight[:, ~kept] = 0
        part.weight.copy_(full.weight[:, kept])
        part.bias.copy_(full.bias)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (full, part)]
    keep_masks(full, optimizers[0], {"weight": kept.view(1, 6)})
    for _ in range(8):
        step(full, optimizers[0], INPUTS.double(), GOALS[:, :1].double())
        step(part, optimizers[1], INPUTS[:, kept].double(), GOALS[:, :1].double())
        assert torch.allclose(full.weight[:, kept], part.weight, rtol=1e-6)
        assert not full.weight[:, ~kept].any()


@pytest.mark.parametrize("name", ["momentum", "adam", "lbfgs"])
def test_an_optimiser_that_trained_the_dense_network_forgets_what_is_pruned(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    masks = {"0.weight": model[0].weight.detach().abs() > 0.2}
    keep_masks(model, optimizer, masks)
    assert not model[0].weight[~masks["0.weight"]].any(), "pruned at once"
    for _ in range(3):
        step(model, optimizer)
        assert not model[0].weight[~masks["0.weight"]].any()


def test_a_memory_loaded_later_is_cleared_as_well() -> None:
    model = network()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    step(model, optimizer)
    memory = copy.deepcopy(optimizer.state_dict())
    masks = {"0.weight": model[0].weight.detach() > 0}
    keep_masks(model, optimizer, masks)
    optimizer.load_state_dict(memory)
    assert optimizer.state[model[0].weight]["momentum_buffer"][~masks["0.weight"]].any()
    step(model, optimizer)
    assert not model[0].weight[~masks["0.weight"]].any()
    assert not optimizer.state[model[0].weight]["momentum_buffer"][~masks["0.weight"]].any()


def test_half_precision_with_weight_decay() -> None:
    model = pruned_network().to(torch.bfloat16)
    masks = masks_of(model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    keep_masks(model, optimizer)
    for _ in range(20):
        step(model, optimizer, INPUTS.bfloat16(), GOALS.bfloat16())
        assert not any(dict(model.named_parameters())[name][~mask].any() for name, mask in masks.items())


def test_what_an_optimiser_remembers_as_a_sparse_tensor_is_left() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True))
    mask = torch.rand(10, 4, generator=GENERATOR) > 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keep_masks(model, optimizer, {"0.weight": mask})
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(6)).sum().backward()
        optimizer.step()
    assert not bool(model[0].weight[~mask].any()) and bool(model[0].weight[mask].all())


@pytest.mark.parametrize("make", ["hand", "LBFGS"])
def test_gradients_that_were_written_by_hand_do_not_build_up(make: str) -> None:
    """No backward pass clears them, so the step has to."""
    model = pruned_network()
    layer, mask = model[0], model[0].weight.detach() != 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if make == "LBFGS":
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)  # type: ignore[assignment]
    keep_masks(model, optimizer)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(layer.weight.grad.clone()))

    def closure() -> float:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return 1.0

    closure()
    optimizer.step(closure if make == "LBFGS" else None)  # type: ignore[arg-type]
    assert not bool(layer.weight[~mask].any())
    assert not bool(seen[0][~mask].any()) and bool(seen[0][mask].all())


def test_a_gradient_that_is_not_finite_behind_the_mask_does_no_harm() -> None:
    model = pruned_network()
    mask = masks_of(model)["0.weight"]
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keep_masks(model, optimizer)
    model(INPUTS).sum().backward()
    model[0].weight.grad[~mask] = float("nan")
    optimizer.step()
    assert model[0].weight.isfinite().all() and not model[0].weight[~mask].any()


def test_several_optimisers_and_wrappers_of_them() -> None:
    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    model = pruned_network()
    masks = masks_of(model)
    parts = [OPTIMIZERS["adamw"](model[0].parameters()), OPTIMIZERS["momentum"](model[2].parameters())]
    with keep_masks(model, [Wrapper(Wrapper(parts[0])), parts[1]]):  # type: ignore[list-item]
        for _ in range(3):
            for part in parts:
                step(model, part)
    assert {name: int((~mask).sum()) for name, mask in masks_of(model).items()} == {
        name: int((~mask).sum()) for name, mask in masks.items()
    }
    step(model, parts[0])
    assert model[0].weight[~masks["0.weight"]].any(), "the context is over"


def test_masks_of_a_wrapped_network_fit_the_network_in_it() -> None:
    model = network()
    model[0].weight.data[:, :3] = 0
    wrapped = nn.DataParallel(model)
    for one, other in ((wrapped, model), (model, wrapped)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with keep_masks(other, optimizer, masks_of(one)):
            model(INPUTS).sum().backward()
            optimizer.step()
        assert int(model[0].weight.count_nonzero()) == 24


def test_masks_are_the_zeros_of_what_is_selected() -> None:
    model = pruned_network()
    assert list(masks_of(model)) == ["0.weight", "2.weight"]
    assert torch.equal(masks_of(model, ignore="0")["2.weight"], model[2].weight != 0)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "dense": (lambda: keep_masks(m := network(), sgd(m)), "no mask to keep: prune it first"),
    "other model": (lambda: keep_masks(pruned_network(), sgd(network())), "holds none of the 2 masked parameters"),
    "no optimiser": (lambda: keep_masks(network(), 0.1), "must be a torch.optim.Optimizer, got a float"),  # type: ignore[arg-type]
    "unknown": (lambda: keep_masks(m := network(), sgd(m), {"9.weight": torch.ones(1).bool()}), "'9.weight'"),
    "shape": (
        lambda: keep_masks(m := network(), sgd(m), {"0.weight": torch.ones(6, 8).bool()}),
        r"shape \(8, 6\), got torch.bool \(6, 8\)",
    ),
    "numbers": (lambda: keep_masks(m := network(), sgd(m), {"0.weight": torch.ones(8, 6)}), "got torch.float32"),
    "target": (lambda: masks_of(network(), ["Conv9d"]), "Conv9d"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


class Normed(Optimizer):
    """Steps of a fixed length: what is pruned would shorten those of the others."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= 0.1 * p.grad / p.grad.norm()


def test_gradients_of_pruned_weights_do_not_shorten_a_step():
    model = nn.Linear(4, 1, bias=False)
    mask = torch.tensor([[True, False, True, False]])
    optimizer = Normed(model.parameters())
    keep_masks(model, optimizer, {"weight": mask})
    before = model.weight.detach().clone()
    model(torch.tensor([[1.0, 100.0, 1.0, 100.0]])).sum().backward()
    optimizer.step()
    assert float((model.weight - before).detach().norm()) == pytest.approx(0.1)


class SteppingBetween(torch.optim.SGD):
    """Moves all weights before it asks for the loss again, as a line search does."""

    @torch.no_grad()
    def step(self, closure=None):
        for _ in range(2):
            with torch.enable_grad():
                closure()
            for group in self.param_groups:
                for p in group["params"]:
                    p += 1.0


def test_a_loss_that_is_asked_for_within_a_step_is_that_of_masked_weights():
    model, seen = nn.Linear(3, 2, bias=False), []
    with torch.no_grad():
        model.weight[0, 0] = 0
    optimizer = SteppingBetween(model.parameters(), lr=0.1)

    def closure():
        seen.append(model.weight[0, 0].item())
        loss = model(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    with keep_masks(model, optimizer):
        optimizer.step(closure)
    assert seen == [0.0, 0.0]


def test_layers_that_are_unfrozen_later_have_masked_gradients_too() -> None:
    model = pruned_network()
    model[0].requires_grad_(False)
    with keep_masks(model, torch.optim.SGD(model.parameters(), lr=0.1)):
        assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
        model[0].requires_grad_(True)
        nn.functional.mse_loss(model(INPUTS), GOALS).backward()
        for layer in (model[0], model[2]):
            assert layer.weight.grad.count_nonzero() == layer.weight.count_nonzero() > 0


def test_a_network_without_values_has_no_masks() -> None:
    model = pruned_network().to("meta")
    with pytest.raises(ValueError, match="lies on the meta device"):
        masks_of(model)
    for network in (model, pruned_network()):
        data = [(INPUTS, torch.zeros(40, dtype=torch.long))]
        with pytest.raises(ValueError, match="lies on the meta device"):
            finetune(network, data, teacher=model, progress=False)
    with pytest.raises(ValueError, match="lies on the meta device"):
        recalibrate_batchnorm(model, data)


def test_a_step_under_masks_of_before_another_pruning_is_refused() -> None:
    model, data = small_network(), small_data()
    prune(model, data, 0.5, "magnitude", progress=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inputs, labels = data[:16]

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    keeper = keep_masks(model, optimizer)
    step()
    kept = prune(model, data, 0.8, "magnitude", progress=False).kept
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" not in name}
    with pytest.raises(ValueError, match=r"pruned again.* since keep_masks was called.*remove\(\).*keep_masks anew"):
        step()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items() if "num" not in name)
    with keep_masks(model, optimizer):  # the old hooks are there still, and do no harm
        step()
        keeper.remove()
        step()
    assert sum(int(mask.sum()) for mask in masks_of(model).values()) == kept
    with keep_masks(model, optimizer):
        with pytest.raises(ValueError, match="sparsity"):
            prune(model, data, 2.0, "magnitude", progress=False)
        step()  # a call that changed nothing makes no masks old


def test_a_step_under_masks_of_before_an_artifact_is_refused(tmp_path: Path) -> None:
    model, data = small_network(), small_data()
    sparser = small_network()
    prune(sparser, data, 0.8, "magnitude", progress=False).save(tmp_path / "pruned")
    prune(model, data, 0.5, "magnitude", progress=False).save(tmp_path / "same")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with keep_masks(model, optimizer):
        load_pruned(model, tmp_path / "same")
        optimizer.step()
        load_pruned(model, tmp_path / "pruned")
        with pytest.raises(ValueError, match="or a pruned one was loaded, since keep_masks was called"):
            optimizer.step()


def test_an_artifact_is_loaded_where_a_shared_weight_has_its_other_name_first(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            setattr(self, first, nn.Linear(6, 6))
            setattr(self, second, nn.Linear(6, 6))
            getattr(self, second).weight = getattr(self, first).weight

        def forward(self, inputs: Tensor) -> Tensor:
            return self.a(torch.relu(self.b(inputs)))  # type: ignore[no-any-return]

    data = [(torch.randn(20, 6), torch.arange(20) % 6)]
    prune(Tied("a", "b"), data, 0.5, "magnitude", progress=False).save(tmp_path / "out")
    other = Tied("b", "a")
    load_pruned(other, tmp_path / "out")
    assert int(other.a.weight.count_nonzero()) == 18


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("case", ["a part", "a wrapper", "two optimisers"])
def test_masks_are_old_whatever_is_pruned_of_the_network(case: str) -> None:
    model = two_layers()
    prune(model, None, 0.5, "magnitude", progress=False)
    wrapped = nn.Sequential(model)
    optimizer, other = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.1)
    keeper = keep_masks(wrapped if case == "a wrapper" else model, optimizer)
    prune(model[0] if case == "a part" else model, None, 0.8, "magnitude", progress=False)
    if case == "two optimisers":
        keep_masks(model, other)
        other.step()
    with pytest.raises(ValueError, match="pruned again"):
        optimizer.step()
    keeper.remove()


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_masks_that_lose_nothing_stay_good(sparsity: float) -> None:
    model, untouched = two_layers(), two_layers()
    for network in (model, untouched):
        prune(network, None, 0.5, "magnitude", progress=False)
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (model, untouched)]
    with keep_masks(model, optimizers[0]), keep_masks(untouched, optimizers[1]) as keeper:
        prune(model, None, sparsity, "magnitude", progress=False)
        optimizers[0].step()
        prune(model, None, 0.9, "magnitude", progress=False)
        optimizers[1].step()
        pickle.dumps(keeper)

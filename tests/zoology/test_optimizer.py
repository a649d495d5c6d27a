"""AdamW on flat vectors is PyTorch's; 16-bit copies follow their masters."""

import pytest
import torch
from torch import nn

from zoology.graphs import compile_apart, finish_step
from zoology.model import LanguageModel
from zoology.optimizer import FlatAdamW


class Two(nn.Module):
    """A large and some small parameters, one of them without a gradient."""

    def __init__(self):
        super().__init__()
        self.large = nn.Linear(300, 250)
        self.small = nn.Linear(250, 3)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.small(torch.tanh(self.large(x))).square().sum()


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_flat_adamw_is_adamw(clip_norm):
    torch.manual_seed(0)
    flat, plain = Two(), Two()
    plain.load_state_dict(flat.state_dict())
    names = [name for name, _ in flat.named_parameters() if name != "unused"]
    ours = FlatAdamW(flat, names, weight_decay=0.1, clip_norm=clip_norm)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.1)
    for step in range(1, 6):
        lr, x = 0.01 / step, torch.randn(4, 300)
        grads = torch.autograd.grad(flat(x), ours.parameters)
        with torch.no_grad():
            ours.step(grads, torch.tensor(ours.scalars_at(step, lr)))
        theirs.zero_grad()
        theirs.param_groups[0]["lr"] = lr
        plain(x).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        theirs.step()
    assert len(ours.vectors) == 2
    for (name, one), other in zip(flat.named_parameters(), plain.parameters()):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7), name


def test_linear_layers_read_a_bfloat16_copy_that_follows_the_master():
    torch.manual_seed(0)
    model = Two()
    names = [name for name, _ in model.named_parameters() if name != "unused"]
    before = model.small.weight.detach().clone()
    optimizer = FlatAdamW(model, names, weight_decay=0.0, clip_norm=None, low_precision=torch.bfloat16)
    assert model.small.weight.dtype == torch.bfloat16
    grads = torch.autograd.grad(model(torch.randn(4, 300).bfloat16()), optimizer.parameters)
    assert grads[names.index("small.weight")].dtype == torch.bfloat16
    with torch.no_grad():
        # Far below what bfloat16 could add up.
        for step in range(1, 9):
            optimizer.step(grads, torch.tensor(optimizer.scalars_at(step, 1e-5)))
    master = optimizer.masters["small.weight"]
    moved = (master - before)[grads[names.index("small.weight")] != 0].abs()
    assert torch.allclose(moved, torch.full_like(moved, 8e-5), rtol=1e-2)
    assert torch.equal(model.small.weight, master.bfloat16())


def test_layers_that_compute_in_float32_keep_their_weights(small_run):
    model = LanguageModel(small_run(("hyena",)).model)
    names = [name for name, _ in model.named_parameters()]
    FlatAdamW(model, names, weight_decay=0.0, clip_norm=None, low_precision=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtypes[name] for name in names if ".filter." in name} == {torch.float32}
    assert dtypes["blocks.0.mixer.in_proj.weight"] == torch.bfloat16


def test_the_end_of_a_step_is_one_graph():
    results = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model = Two()
        names = [name for name, _ in model.named_parameters() if name != "unused"]
        optimizer = FlatAdamW(model, names, weight_decay=0.1, clip_norm=0.1, low_precision=torch.bfloat16)
        grads = [torch.randn_like(parameter) for parameter in optimizer.parameters]
        scalars = torch.tensor([[0.0, 1.0, 1.0], optimizer.scalars_at(1, 1e-2)])
        losses, counter = torch.zeros(2), torch.ones(1, dtype=torch.int64)
        finish = finish_step if backend is None else compile_apart(finish_step, backend=backend)
        tables = (scalars, losses, counter)
        finish(optimizer.vectors, optimizer.group(grads), *tables, torch.tensor(3.0), **optimizer.options)
        results.append([*optimizer.vectors[0], *optimizer.vectors[1], losses])
        assert counter.tolist() == [2]
        assert losses.tolist() == [0.0, 3.0]
    for plain, traced in zip(*results):
        assert torch.equal(plain, traced)

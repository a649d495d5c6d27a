"""How close kernels with gradients have to be to the truth. A module, because interpreted tests import it, too."""

import torch


def check(run, inputs, state_given, weights, dtype, device, case):
    """Outputs, states and gradients of the kernels: off by at most four times plain PyTorch's error, or 4 roundings.

    That is the rule of the parity check of backends; operands of products are rounded to the dtype of the inputs.
    `run(inputs, backend)` returns an output and a last state for inputs by name; what is differentiated is their sum,
    weighted by `weights`, that of the state only where one is given.
    """
    weights = [weight.to(device) for weight in weights]

    def found(backend, wide):
        leaves = {
            name: part.to(device, torch.float64 if wide else part.dtype).requires_grad_()
            for name, part in inputs.items()
        }
        o, last = run(leaves, backend)
        total = (o.double() * weights[0]).sum()
        if state_given:
            total = total + (last.double() * weights[1]).sum()
        return [o, last, *torch.autograd.grad(total, list(leaves.values()))]

    def off(actual, exact):
        return float((actual.double() - exact).norm() / exact.norm())

    exact = found("reference", True)
    for actual, rough, wanted in zip(found("triton", False), found("reference", False), exact, strict=True):
        assert actual.dtype == rough.dtype
        allowed = 4 * max(off(rough, wanted), torch.finfo(dtype).eps)
        assert off(actual, wanted) <= allowed, (case, dtype, off(actual, wanted), allowed)

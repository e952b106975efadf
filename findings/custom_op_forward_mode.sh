#!/usr/bin/env bash
# Forward-mode derivatives of an operation that has only a backward formula.
#
# One would guess: an error that no forward formula is there. An autograd.Function without jvp gives one.
#
# What happens: an operation made with torch.library.custom_op and register_autograd gives a derivative of zero
# under torch.func.jvp and jacfwd, without an error. Its backward is right. The same is seen in torch itself: the
# chunked path of linear_cross_entropy (its documentation says that forward mode is not supported) has the slope
# zero.
#
# Versions: torch==2.13.0; seen with Python 3.11.
#
# Output seen:
#   custom op, backward:            [3.0, 12.0, 27.0]
#   Function without jvp, func.jvp:  NotImplementedError
#   custom op, func.jvp:            [1.0, 8.0, 27.0] [0.0, 0.0, 0.0]
#   custom op, func.jacfwd:         [0.0, 0.0, 0.0]
#   linear_cross_entropy, options=None: loss 2.96, slope 1.39
#   linear_cross_entropy, chunked     : loss 2.96, slope 0.00
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check torch==2.13.0
python - <<'PY'
import torch
import torch.nn.functional as F


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


@torch.library.custom_op("demo::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_autograd(
    lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)

x, one = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
leaf = x.clone().requires_grad_()
(back,) = torch.autograd.grad(cube(leaf).sum(), leaf)
print("custom op, backward:           ", back.tolist())
assert back.tolist() == [3.0, 12.0, 27.0]

try:
    torch.func.jvp(Cube.apply, (x,), (one,))
    raise SystemExit("jvp of the Function did not raise")
except (RuntimeError, NotImplementedError) as error:
    print("Function without jvp, func.jvp: ", type(error).__name__)

value, tangent = torch.func.jvp(cube, (x,), (one,))
print("custom op, func.jvp:           ", value.tolist(), tangent.tolist())
print("custom op, func.jacfwd:        ", torch.func.jacfwd(cube)(x).diagonal().tolist())
assert value.tolist() == [1.0, 8.0, 27.0] and tangent.tolist() == [0.0, 0.0, 0.0]
assert not torch.func.jacfwd(cube)(x).any()

torch.manual_seed(0)
states, head, targets = torch.randn(6, 4), torch.randn(9, 4), torch.randint(0, 9, (6,))
for name, options in (("options=None", None), ("chunked", torch.nn.LinearCrossEntropyOptions())):
    loss, slope = torch.func.jvp(
        lambda s: F.linear_cross_entropy(s, head, targets, options=options), (states,), (states,)
    )
    print(f"linear_cross_entropy, {name:12s}: loss {loss:.2f}, slope {slope:.2f}")
    assert (slope == 0) == (options is not None)
PY

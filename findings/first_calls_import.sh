#!/usr/bin/env bash
# What the first call of some everyday operations imports, each in a process of its own, on the CPU, nothing compiled.
#
# One would guess: import torch has loaded whatever eager training takes. A gradient of a vector-valued output, by
# backward(G) or autograd.grad(y, x, G), loads no more than that of a scalar; nor does making an optimizer.
#
# What happens: with a gradient given, the first call imports SymPy, to compare two shapes; the same gradient as
# backward() of (y * G).sum() imports nothing. The first optimizer, plain SGD too, imports the compiler, TorchDynamo,
# because add_param_group is marked as not to be compiled: nearly as long as import torch itself, in every process. A
# step by hand imports nothing.
#
# Versions: torch==2.13.0; seen with Python 3.11.
#
# Output seen:
#   a scalar's backward()        SymPy False  TorchDynamo False      0 modules, 0.00 s
#   backward(G)                  SymPy True   TorchDynamo False    487 modules, 0.29 s
#   autograd.grad(y, x, G)       SymPy True   TorchDynamo False    487 modules, 0.35 s
#   backward() of (y * G).sum()  SymPy False  TorchDynamo False      0 modules, 0.00 s
#   SGD([x])                     SymPy True   TorchDynamo True     804 modules, 0.94 s
#   a step by hand               SymPy False  TorchDynamo False      0 modules, 0.00 s
# (the counts and seconds are of one machine; import torch takes about 1 s there)
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
source venv/bin/activate
python -m pip install --quiet --disable-pip-version-check torch==2.13.0
python - <<'PY'
import subprocess
import sys

first = """
import sys, time, torch
x = torch.ones(3, requires_grad=True)
y, G = 2 * x, torch.ones(3)
before, start = set(sys.modules), time.perf_counter()
{call}
seconds = time.perf_counter() - start
new = set(sys.modules) - before
print("sympy" in new, "torch._dynamo" in new, len(new), f"{{seconds:.2f}}")
"""
calls = [
    ("a scalar's backward()", "y.sum().backward()", "False False"),
    ("backward(G)", "y.backward(G)", "True False"),
    ("autograd.grad(y, x, G)", "torch.autograd.grad(y, x, G)", "True False"),
    ("backward() of (y * G).sum()", "(y * G).sum().backward()", "False False"),
    ("SGD([x])", "torch.optim.SGD([x], lr=0.1)", "True True"),
    ("a step by hand", "y.sum().backward()\nwith torch.no_grad(): x -= 0.1 * x.grad", "False False"),
]
for name, call, loads in calls:
    done = subprocess.run([sys.executable, "-c", first.format(call=call)], capture_output=True, text=True, check=True)
    sympy, dynamo, count, seconds = done.stdout.split()
    print(f"{name:28s} SymPy {sympy:6s} TorchDynamo {dynamo:6s} {int(count):5d} modules, {seconds} s")
    assert f"{sympy} {dynamo}" == loads, name
PY

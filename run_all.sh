#!/usr/bin/env bash
# Set up once, then run everything and draw every figure.
#   ./run_all.sh [flags]     flags that both scripts know, e.g. --preset full --seeds 5 --out_dir results/full
#   ./run_all.sh test        the tests
# Works from any folder. Needs Python 3.10 or newer; a virtual environment is made in .venv, unless the
# current python already has every package. Interrupted? The same command goes on after the last whole run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

has_packages() {    # does this python have everything, with torch 2.6 or newer?
    "$1" - 2>/dev/null <<'EOF'
import importlib.util, re, sys
assert sys.version_info >= (3, 10)
assert all(importlib.util.find_spec(m) for m in "numpy torch matplotlib tqdm rich pytest".split())
import torch
assert tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) >= (2, 6)
EOF
}

find_python() {     # the first python that is new enough
    for name in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        "$name" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null && { echo "$name"; return; }
    done
    echo "run_all.sh: no Python 3.10 or newer was found: install one and run this again" >&2
    exit 2
}

set_up() {          # sets $python
    if has_packages python3; then
        python=python3
    else
        python="$here/.venv/bin/python"
        if ! has_packages "$python"; then
            base=$(find_python)
            echo "installing the packages of requirements.txt into $here/.venv (once)"
            [ -x "$python" ] || "$base" -m venv "$here/.venv"
            "$python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
        fi
    fi
    "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "at", sys.executable + ", torch", torch.__version__)'
}

if [ "${1:-}" = test ]; then
    set_up
    cd "$here"
    exec "$python" -m pytest -q "${@:2}" test_myopic.py
fi

preset=""
for word in "$@"; do
    case "${word%%=*}" in
        --preset|--arms|--device|--seeds|--seed|--out_dir|--fresh|--plot_only|--dtype|--compile) ;;
        --block_size|--n_layer|--n_head|--n_embd|--batch_size|--max_iters|--learning_rate) ;;
        --gradient_accumulation_steps|--help) ;;
        --*) echo "run_all.sh: $word belongs to one of the scripts: call synthetic.py or myopic_gpt.py with it" >&2
             exit 2 ;;
    esac
    case "$word" in --preset*) preset=given ;; esac
done

set_up
if [ -z "$preset" ]; then
    preset=$("$python" -c 'import torch; print("full" if torch.cuda.is_available() else "quick")')
    set -- --preset "$preset" "$@"
fi
echo "synthetic.py, then myopic_gpt.py: training, figures, one table each. From nothing, the preset smoke takes"
echo "about 1 minute, quick about 12 on two CPU cores; runs that are recorded already are not repeated."
"$python" "$here/synthetic.py" "$@"
"$python" "$here/myopic_gpt.py" "$@"

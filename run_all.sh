#!/usr/bin/env bash
# Set up once, then run everything and draw every figure.
#   ./run_all.sh [flags]     first the preset demo, then quick (full if there is CUDA), or the one that
#                            --preset names; flags are those that both scripts know: --seed 0 1, --jobs 4
#   ./run_all.sh test        the tests
# Works from any folder. Needs Python 3.10 or newer; a virtual environment is made in .venv, unless the
# current python has every package. Interrupted? The same command goes on after the last finished run.
set -euo pipefail
export PYTHONUNBUFFERED=1 MPLBACKEND=agg PIP_USER=0 # lines at once; figures to files; pip to .venv
unset CDPATH PYTHONHOME PYTHONOPTIMIZE PYTHONSAFEPATH PIP_TARGET PIP_PREFIX # a user's, of other use
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")") # a link to this file works, too

inside() { (cd "$here" && "$@"); } # python looks for modules in its folder first: here, not the user's

has_packages() { # says which python this is, if it has every package
    inside "$1" - 2>/dev/null <<'EOF_PYTHON'
import sys, numpy, matplotlib, tqdm, rich, pytest, torch
from torch.optim import Muon  # came with 2.9; the tests compare with it
print(sys.executable, "with torch", torch.__version__)
EOF_PYTHON
}

set_up() { # sets $python
    for python in python3 python "$here/.venv/bin/python" "$here/.venv/Scripts/python.exe"; do
        if has_packages "$python"; then return; fi
    done
    for base in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if inside "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "installing the packages of requirements.txt into $here/.venv (once)"
            inside "$base" -m venv .venv
            python="$here/.venv/bin/python"
            [ -x "$python" ] || python="$here/.venv/Scripts/python.exe"
            inside "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
            return
        fi
    done
    echo "run_all.sh: no Python 3.10 or newer was found: install one and run this again" >&2
    exit 2
}

case "${1:-}" in
-h | --help)
    sed -n '2,7s/^# //p' "$here/run_all.sh"
    exit ;;
test)
    set_up
    cd "$here"
    exec "$python" -m pytest -q "${@:2}" test_myopic.py ;;
esac

set_up
# A flag that one of the scripts does not know is refused before anything is trained or made.
large=$(inside "$python" - "$@" <<'EOF_PYTHON'
import sys, torch, myopic_gpt, synthetic
words = sys.argv[1:]
for script in (synthetic, myopic_gpt):
    sys.argv[0] = script.__file__  # for the line that names the error
    with myopic_gpt.no_traceback():
        script.flags(words)
print("full" if torch.cuda.is_available() else "quick")
EOF_PYTHON
)
presets=(demo "$large")
case " $* " in *" --preset"*) presets=("") ;; esac
for preset in "${presets[@]}"; do
    for script in synthetic.py myopic_gpt.py; do # the sines first: they show most
        echo "== $script ${preset:+--preset $preset }$*"
        "$python" "$here/$script" ${preset:+--preset "$preset"} "$@"
    done
done

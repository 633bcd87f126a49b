#!/usr/bin/env bash
# Make or complete the environment in $VENV; called by the Makefile.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:?} python=${PYTHON:-python3}
requirements=${REQUIREMENTS:-requirements.txt}
own=0
[[ $venv == "${STACK_VENV:-.venv}" ]] || own=1

if [[ ! -x $venv/bin/python ]]; then
    newest=12
    # torch 2.1 has no wheels for Python 3.12.
    [[ $requirements != requirements/openmmlab.txt ]] || newest=11
    if ! "$python" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest))"; then
        echo "error: Python 3.10 to 3.$newest is needed, and $python is $("$python" --version 2>&1);" \
            "name another with PYTHON=" >&2
        exit 2
    fi
    echo "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
py=$venv/bin/python

# Somebody's own environment may hold the other family of mm packages: leave a complete one alone.
if [[ $own == 1 ]] && "$py" - <<'CHECK'
import sys
from importlib.util import find_spec
needed = "torch torchvision mmengine mmcv mmdet mmpretrain pycocotools".split()
sys.exit(any(find_spec(name) is None for name in needed))
CHECK
then
    echo "using the torch and mm packages of $venv as they are"
else
    other=$("$py" - "$requirements" <<'OTHER'
import sys
from importlib.metadata import packages_distributions
forks = sys.argv[1] != "requirements/openmmlab.txt"
providers = packages_distributions()
found = {d for m in ("mmengine", "mmcv", "mmdet", "mmpretrain") for d in providers.get(m, ())}
print(*sorted(d for d in found if d.lower().startswith("onedl") != forks))
OTHER
    )
    if [[ -n $other ]]; then
        echo "error: $venv has $other, whose files $requirements would overwrite; name another" \
            "environment with VENV=, or see 'In another mm project' in README.md" >&2
        exit 2
    fi
    echo "installing $requirements into $venv (minutes on the first call)"
    "$py" -m pip install --disable-pip-version-check --quiet --progress-bar off -r "$requirements"
fi
"$py" -m pip install --disable-pip-version-check --quiet -r requirements/dev.txt
# Their current releases do not fit the originals' old torch and numpy.
[[ $requirements == requirements/openmmlab.txt ]] ||
    "$py" -m pip install --disable-pip-version-check --quiet -r requirements/extras.txt
"$py" -m pip install --disable-pip-version-check --quiet --no-deps -e .

# mm packages require OpenCV's desktop build, which needs libGL; machines without a screen often
# have none. The headless build is the same module without windows.
if ! "$py" -c 'import cv2' 2>/dev/null; then
    version=$("$py" -c 'from importlib.metadata import version; print(version("opencv-python"))')
    echo "this machine cannot load OpenCV's desktop build; installing the headless one"
    "$py" -m pip install --disable-pip-version-check --quiet --force-reinstall --no-deps \
        "opencv-python-headless==$version"
    "$py" -c 'import cv2'
fi

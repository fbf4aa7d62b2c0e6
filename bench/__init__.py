"""Benches. Run from the repository without installing it: the kernel package is then found in its folder."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("flowmo_kernels") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

"""The compiled extension: found or not, loaded without a driver, and errors that say what was launched."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowmo_kernels import _cuda, _ext

ROOT = Path(__file__).resolve().parents[2]
PRESENT = importlib.util.find_spec("flowmo_kernels._C") is not None


def launchers() -> list[str]:
    """The table of contents in csrc/launchers.h."""
    text = (ROOT / "csrc" / "launchers.h").read_text()
    return re.findall(r"X\((\w+)\)", text.split("#define FLOWMO_LAUNCHERS(X)")[1])


def test_every_launcher_has_a_function() -> None:
    assert set(launchers()) <= {*_cuda.__all__, "qk_norm_rope"}
    assert set(_cuda.__all__) - set(launchers()) == {"ema", "hold_norms", "qk_norm_rope_"}


def test_absent_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "find_spec", lambda name: None)
    _ext.extension.cache_clear()
    reason = _ext.missing()
    assert reason is not None and "FLOWMO_CUDA=1" in reason
    with pytest.raises(ImportError, match="without its CUDA extension"):
        _ext.launch("norm_modulate", torch.zeros(1))


def test_broken_raises_with_the_reason(tmp_path: Path) -> None:
    """A file in the extension's place that is no library: importing the ops works, using it says why not."""
    program = (
        "import sys, importlib.util, importlib.machinery as m\n"
        "from flowmo_kernels import _ext\n"
        f"loader = m.ExtensionFileLoader('flowmo_kernels._C', {str(tmp_path / '_C.so')!r})\n"
        "spec = importlib.util.spec_from_file_location('flowmo_kernels._C', loader.path, loader=loader)\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        return spec if name == 'flowmo_kernels._C' else None\n"
        "sys.meta_path.insert(0, Finder)\n"
        "_ext.missing()\n"
    )
    (tmp_path / "_C.so").write_bytes(b"not a library")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "kernels")
    assert done.returncode and "is installed but does not load" in done.stderr
    assert "_C.so" in done.stderr.splitlines()[-1], "the loader's own reason is missing"


@pytest.mark.skipif(not PRESENT, reason="the CUDA extension is not built here")
class TestPresent:
    def test_it_loads_without_a_driver_and_holds_every_launcher(self) -> None:
        module = _ext.extension()
        assert _ext.missing() is None
        for name in launchers():
            assert callable(getattr(module, name)), name

    def test_cpu_tensors_are_refused(self) -> None:
        with pytest.raises(ValueError, match="CUDA kernels need CUDA tensors; these lie on cpu"):
            _cuda.norm_modulate(torch.zeros(1, 2, 8), None, None)

    @pytest.mark.gpu
    def test_tensors_of_two_devices_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"one device; these lie on \['cpu', 'cuda:0'\]"):
            _cuda.norm_modulate(torch.zeros(1, 2, 8, device="cuda"), torch.zeros(1, 8), torch.zeros(1, 8))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a card")
    def test_a_refused_launch_gives_a_code_with_a_message(self) -> None:
        module = _ext.extension()
        code = module.euler_step(16, 16, 16, 16, 0, 0.5, 1.0, 8, 0, 0)
        assert code != 0 and len(module.error_text(code)) > 5

    @pytest.mark.gpu
    def test_a_launch_error_names_op_and_shapes(self) -> None:
        x = torch.zeros(1, 2, 3, device="cuda")
        with pytest.raises(_ext.KernelLaunchError, match=r"lfq on float32 \[1, 2, 3\].*invalid argument"):
            _ext.launch("lfq", *[x] * 10, 6, 3, 3, 99, 1, 1, 0.1, 1e-5, 0)

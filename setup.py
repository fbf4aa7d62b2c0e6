"""Two packages from two folders, and the compiled CUDA extension `flowmo_kernels._C` when there is a compiler.

The extension knows nothing of torch: it needs nvcc, a C++ compiler, pybind11 and ninja, and one build serves every
torch. Environment:

    FLOWMO_CUDA        auto (default): compile when nvcc is found; 1: compile, an error without nvcc; 0: do not
    FLOWMO_CUDA_ARCHS  architectures, for example "sm_90a" or "sm_80;sm_90a" (default: sm_80, sm_90a and sm_100,
                       as far as the found nvcc knows them)
    CUDA_HOME          where to look for bin/nvcc first; otherwise PATH, then /usr/local/cuda

Metadata stays in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("sm_80", "sm_90a", "sm_100")
SWITCH = "FLOWMO_CUDA"


def say(text: str) -> None:
    """One line in the build's log; not while pip only asks for metadata, so that it stands there once."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(f"flowmo: {text}", flush=True)


def find_nvcc() -> str | None:
    """The nvcc to use: CUDA_HOME, then PATH, then the usual folder."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if (nvcc := Path(home) / "bin" / "nvcc").is_file():
            return str(nvcc)
    if found := shutil.which("nvcc"):
        return found
    usual = Path("/usr/local/cuda/bin/nvcc")
    return str(usual) if usual.is_file() else None


def architectures(nvcc: str) -> list[str]:
    """The architectures to compile for: FLOWMO_CUDA_ARCHS, or the defaults that this nvcc knows."""
    known = set(subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split())

    def is_known(arch: str) -> bool:
        return arch in known or arch.rstrip("af") in known  # the list leaves out the "a" and "f" variants

    if asked := os.environ.get("FLOWMO_CUDA_ARCHS"):
        archs = [a for a in re.split(r"[;, ]+", asked) if a]
        for arch in archs:
            if not re.fullmatch(r"sm_\d+[af]?", arch) or not is_known(arch):
                raise SystemExit(
                    f"FLOWMO_CUDA_ARCHS: {arch!r} is not an architecture of {nvcc}; it knows {', '.join(sorted(known))}"
                )
        return archs
    return [arch for arch in DEFAULT_ARCHS if is_known(arch)]


def wanted_nvcc() -> str | None:
    """nvcc when the extension is to be compiled; None, with one line saying why, when it is not."""
    switch = os.environ.get(SWITCH, "auto").lower()
    if switch not in ("0", "1", "auto"):
        raise SystemExit(f"{SWITCH}={switch!r}: expected 0, 1 or auto")
    if switch == "0":
        say(f"{SWITCH}=0, installing without the CUDA extension")
        return None
    nvcc = find_nvcc()
    if nvcc is None and switch == "1":
        raise SystemExit(
            f"{SWITCH}=1 but no nvcc was found in CUDA_HOME, PATH or /usr/local/cuda: install the CUDA toolkit, "
            f"set CUDA_HOME, or set {SWITCH}=0"
        )
    if nvcc is None:
        say("no nvcc found, installing without the CUDA extension (Triton and PyTorch paths remain)")
    return nvcc


def generate_code_flags(archs: list[str]) -> list[str]:
    """One machine code per architecture, and PTX of the last portable one so that later cards can run it."""
    portable = [arch for arch in archs if arch[-1].isdigit()]
    flags = []
    for arch in archs:
        number = arch.removeprefix("sm_")
        code = f"[{arch},compute_{number}]" if portable and arch == portable[-1] else arch
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def ninja_quote(text: str | Path) -> str:
    return str(text).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def write_ninja(folder: Path, target: Path, nvcc: str, archs: list[str]) -> None:
    """build.ninja: every .cu and bindings.cpp to an object file, then one shared library."""
    import pybind11

    sources = sorted((ROOT / "csrc").glob("*.cu"))
    compiler = os.environ.get("CXX", "g++").split()[0]
    cuda_flags = ["-O3", "-std=c++17", "-lineinfo", "-Xfatbin=-compress-all", "-ccbin", compiler]
    cuda_flags += ["--threads", str(len(archs)), "-Xcompiler", "-fPIC,-fvisibility=hidden", *generate_code_flags(archs)]
    includes = [f'-I"{pybind11.get_include()}"', f'-I"{sysconfig.get_path("include")}"']
    text = [
        "ninja_required_version = 1.5",
        "rule cuda",
        f"  command = {ninja_quote(nvcc)} {' '.join(cuda_flags)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule cxx",
        f"  command = {compiler} -O1 -std=c++17 -fPIC -fvisibility=hidden {' '.join(includes)} -MD -MF $out.d"
        " -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
        "rule link",
        f"  command = {ninja_quote(nvcc)} -ccbin {compiler} -shared -cudart static -Xcompiler -fPIC"
        " -Xlinker --strip-debug $in -o $out",
        "  description = link $out",
    ]
    bindings = ROOT / "csrc" / "bindings.cpp"
    objects = []
    for source in [bindings, *sources]:  # the C++ file takes longest, so it goes first
        name = f"{source.stem}.o"
        rule = "cuda" if source.suffix == ".cu" else "cxx"
        text.append(f"build {name}: {rule} {ninja_quote(source)}")
        objects.append(name)
    text.append(f"build {ninja_quote(target)}: link {' '.join(objects)}")
    content = "\n".join(text) + "\n"
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != content:
        file.write_text(content)


def ninja_command() -> str:
    if found := shutil.which("ninja"):
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


class NinjaBuild(build_ext):
    """Compiles with nvcc and ninja; what has not changed since the last build is kept (folder build/csrc-...)."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None  # ext_modules is empty without it
        archs = architectures(nvcc)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"csrc-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / target.name
        write_ninja(folder, built, nvcc, archs)
        say(f"compiling the CUDA extension with {nvcc} for {', '.join(archs)}")
        jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try:
            subprocess.run([ninja_command(), "-C", str(folder), "-j", str(max(1, jobs))], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"flowmo: compiling the CUDA extension failed (messages above); {SWITCH}=0 installs without it"
            ) from error
        shutil.copy2(built, target)


PACKAGES = {"flowmo": "flowmo", "flowmo_kernels": "kernels/flowmo_kernels"}


def packages() -> list[str]:
    """Both packages with their subpackages; kernels/ itself is a folder, not a package."""
    found = []
    for name, folder in PACKAGES.items():
        found += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return found


setup(
    packages=packages(),
    package_dir=PACKAGES,
    ext_modules=[Extension("flowmo_kernels._C", [])] if wanted_nvcc() else [],
    cmdclass={"build_ext": NinjaBuild},
)

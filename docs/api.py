"""Write the API reference, from the docstrings, as a folder of web pages: python docs/api.py OUT

    pip install -e ".[docs]" -c constraints.txt
    python docs/api.py build/api
    python docs/api.py --show              serve it at http://localhost:8080 instead

It needs no network. A docstring or annotation that pdoc cannot read is an error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import typing
import warnings
from pathlib import Path

ROLE = re.compile(r":(?:class|meth|func|mod|attr|data):`~?([^`]+)`")
NEEDS = {"flowmo.demo.page": "gradio"}  # modules that an extra belongs to


def modules() -> list[str]:
    """Every public module of both packages. (pdoc alone stops at what a package names in `__all__`.)"""
    found = []
    for package in ("flowmo", "flowmo_kernels"):
        found.append(package)
        for info in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            needed = NEEDS.get(info.name)
            private = any(part.startswith("_") for part in info.name.split("."))
            if not private and (needed is None or importlib.util.find_spec(needed)):
                found.append(info.name)
    return found


def name_annotations(name: str) -> None:
    """Resolve the annotations of a module's named tuples: their constructors are made elsewhere, where no name is."""
    for _, value in inspect.getmembers(importlib.import_module(name), inspect.isclass):
        if issubclass(value, tuple) and hasattr(value, "_fields") and value.__module__ == name:
            value.__new__.__annotations__ = typing.get_type_hints(value)


def main(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", nargs="?", type=Path, help="folder to write")
    p.add_argument("--show", action="store_true", help="serve the pages instead of writing them")
    p.add_argument("--no-source", action="store_true", help="without the code: half the size")
    options = p.parse_args(arguments)
    if options.show == (options.out is not None):
        p.error("name a folder, or --show")
    if importlib.util.find_spec("pdoc") is None:
        p.error('the reference is made by pdoc: pip install -e ".[docs]" -c constraints.txt')
    import pdoc.docstrings
    import pdoc.render
    import pdoc.web

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of imported packages
    warnings.filterwarnings("ignore", message="The module specification")  # pdoc finds some by itself as well
    names = modules()
    for name in names:
        name_annotations(name)
    convert = pdoc.docstrings.convert
    pdoc.docstrings.convert = lambda text, *rest: convert(ROLE.sub(r"`\1`", text), *rest)
    pdoc.render.configure(docformat="google", show_source=not options.no_source, search=True)
    if options.show:
        with pdoc.web.DocServer(("localhost", 8080), names) as server:
            print("open http://localhost:8080/ in a browser; Ctrl-C ends", flush=True)
            server.serve_forever()
    pdoc.pdoc(*names, output_directory=options.out)
    print(f"wrote {len(names)} modules; open {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

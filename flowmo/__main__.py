"""The commands of FlowMo: python -m flowmo [COMMAND ...]

python -m flowmo                        this list
python -m flowmo reconstruct photo.jpg  the same as python -m flowmo.reconstruct photo.jpg
python -m flowmo tokenize --help        what a command takes, with examples
"""

from __future__ import annotations

import ast
import difflib
import importlib
from pathlib import Path

import flowmo
from flowmo import cli


def commands() -> dict[str, str]:
    """Name of every command, as after `python -m flowmo.`, and the first line of what it says about itself.

    A command is a module that hands its `main` to `cli.run`; modules are read, not imported.
    """
    root = Path(flowmo.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        place = path.parent if path.name == "__main__.py" else path.with_suffix("")  # a package is a command, too
        if place == root or "cli.run(main)" not in text:
            continue
        name = ".".join(place.relative_to(root).parts)
        said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
        found[name] = said.split(": python -m ")[0].rstrip(".")
    return dict(sorted(found.items(), key=lambda item: ("." in item[0], item[0])))


def main(arguments: list[str]) -> int | None:
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        width = max(map(len, known))
        for name, said in known.items():
            print(f"  {name:{width}}  {said}")
        print("\nEvery command has --help, and --debug for the traceback of an error.")
        return 0
    name = arguments[0].removeprefix("flowmo.").replace("-", "_")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no command {arguments[0]!r}{hint} `python -m flowmo` lists them")
    module = importlib.import_module(f"flowmo.{name}")
    return module.main(arguments[1:])


if __name__ == "__main__":
    cli.run(main)

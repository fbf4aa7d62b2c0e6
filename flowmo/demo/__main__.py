"""A page in the browser that tokenizes photographs and compares settings: python -m flowmo.demo [--checkpoint C]"""

from __future__ import annotations

from flowmo import cli
from flowmo.demo import main

if __name__ == "__main__":
    cli.run(main)

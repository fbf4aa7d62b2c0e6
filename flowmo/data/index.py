"""Write the JSON index of tar archives: python -m flowmo.data.index ARCHIVE... [--out INDEX.json]

    python -m flowmo.data.index ILSVRC2012_img_train.tar --out imagenet_train_index.json
    python -m flowmo.data.index shards/ --out index.json

Tar archives inside a tar archive are looked into. With the index, training starts without reading every header:
data.path=ILSVRC2012_img_train.tar data.index=imagenet_train_index.json. Without --out it goes beside the first archive.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flowmo import cli
from flowmo.data.archive import find_archives, scan
from flowmo.files import atomic_write


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m flowmo.data.index", description=__doc__, formatter_class=cli.Help)
    parser.add_argument("archives", nargs="+", help="tar archives, or folders or patterns of them")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    archives = []
    for given in options.archives:
        found = find_archives(given)
        if not found:
            raise FileNotFoundError(f"no tar archive at {given}: name a .tar file, a folder of them, or a pattern")
        archives += found
    entries = [entry for archive in archives for entry in scan(archive)]
    records = [e.as_record(with_archive=len(archives) > 1) for e in entries]
    out = options.out or archives[0].with_suffix(".json")
    atomic_write(out, lambda name: Path(name).write_text(json.dumps(records)))
    classes = len({e.group for e in entries})
    print(f"wrote {out}: {len(entries)} pictures of {classes} classes in {len(archives)} archives")
    return 0


if __name__ == "__main__":
    cli.run(main)

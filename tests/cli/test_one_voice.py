"""Mistakes under torchrun: said once where all processes have them, and by whoever has one of its own."""

from __future__ import annotations

import re

from tests.processes import together

# Several commands in one pair of processes, each with what torchrun changes when it starts them anew.
SCRIPT = """
import os, sys, warnings
import torch.distributed as dist
from flowmo import cli, evaluate, one_voice, train
rank = int(os.environ["RANK"])
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)

def only(which, words="of its own"):
    def main(arguments):
        if rank == which:
            raise ValueError(words)
    return main

def each(arguments):
    raise ValueError(f"card {rank} is gone: \\udcff")  # as of a file whose name is not UTF-8

def stopped(arguments):
    raise KeyboardInterrupt

cases = [
    ("misspelt", train.main, ["tiny", "data.pth=IMAGES"]),
    ("traceback", train.main, ["tiny", "data.pth=IMAGES", "--debug"]),
    ("usage", evaluate.main, ["--limits", "3"]),
    ("second", only(1), []),
    ("first", only(0), []),
    ("each", each, []),
    ("stopped", stopped, []),
    ("path", train.main, ["tiny", "data.path=nowhere", "trainer.device=cpu", f"run={sys.argv[1]}/run"]),
]
for number, (name, main, arguments) in enumerate(cases):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    sys.argv[1:], given = arguments, sys.argv[1:]
    # Where nobody else will come the wait is for nothing; elsewhere a slow machine has all the time it needs.
    one_voice.OTHERS = one_voice.FIRST = 0.2 if name in ("second", "first") else 60.0
    store.set(f"{name}/{rank}", "")
    store.wait([f"{name}/0", f"{name}/1"])
    print(f"\\n<{name}>", flush=True)
    try:
        cli.run(main)
    except SystemExit as end:
        print(f"</{name}> {end.code}", flush=True)
    sys.argv[1:] = given
assert dist.is_initialized(), "the last mistake should be found after the processes have met"
"""


def test_an_error_of_all_is_said_once_and_that_of_one_by_its_process(tmp_path):
    told = together(SCRIPT, str(tmp_path))
    found = re.compile(r"<(\w+)>\n(.*?)</\1> (\d+)", re.DOTALL)
    parts = [{m[1]: (m[2].strip(), m[3]) for m in found.finditer(text)} for text in told]
    for name, code in (("misspelt", "1"), ("traceback", "1"), ("usage", "2"), ("path", "1"), ("stopped", "130")):
        assert parts[0][name][1] == parts[1][name][1] == code, name
        assert parts[0][name][0] and not parts[1][name][0], f"{name}: {parts}"
    assert parts[0]["misspelt"][0].startswith("error: ") and "did you mean data.path?" in parts[0]["misspelt"][0]
    assert parts[0]["traceback"][0].startswith("Traceback") and "ConfigError" in parts[0]["traceback"][0]
    assert "usage: python -m flowmo.evaluate" in parts[0]["usage"][0]
    assert parts[0]["usage"][0].endswith("error: unrecognized arguments: --limits 3")
    assert parts[0]["path"][0].startswith("error: no such file or folder: nowhere")
    shows = "\n(--debug shows where)"
    for rank, name in enumerate(("first", "second")):
        assert parts[rank][name] == (f"error in process {rank} of 2: of its own{shows}", "1")
        assert parts[1 - rank][name] == ("", "0")
        assert parts[rank]["each"] == (f"error in process {rank} of 2: card {rank} is gone: \\udcff{shows}", "1")

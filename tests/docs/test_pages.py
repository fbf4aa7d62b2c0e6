"""Every command and every Python block of docs/ runs; of those marked as not run the options are checked."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowmo import FlowMo, evaluate
from flowmo.config import known_keys, parse
from flowmo.generator.network import Generator
from flowmo.training.flops import step_flops
from tests.docs.blocks import PAGES, ROOT, Block, blocks

names = [page.stem for page in PAGES]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder that looks like a clone to a reader's commands, and takes what they write."""
    for name in ("docs", "bench", "tests", "kernels", "csrc", "flowmo", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_blocks_run_in_order(page, place, monkeypatch):
    for name in ("TRITON_INTERPRET", "FLOWMO_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    namespace: dict[str, object] = {"__name__": "reader"}
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        assert block.kind in ("bash", "python"), f"{where}: say bash or python, or indent what is no code"
        if block.why_not is not None:
            continue
        if block.kind == "python":
            torch.manual_seed(0)
            exec(compile(block.text, where, "exec"), namespace)
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{where}\n{block.text}\n{done.stdout}\n{done.stderr}"
    torch.set_num_threads(threads)


class Parsed(Exception):
    """The options of a command are right; nothing is to run."""


def check_options(words: list[str], monkeypatch) -> None:
    """Raises, or ends the process, where a command has an option or key that its program does not know."""
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "pip":
        return
    if words[0] == "pytest":
        assert all((ROOT / w).exists() for w in words[1:] if not w.startswith("-")), words
        return
    assert words[0] == "python", words
    if words[1:3] == ["-m", "flowmo.train"]:
        parse(words[3:])
        return

    read = argparse.ArgumentParser.parse_args

    def parse_only(parser, arguments=None, namespace=None):
        read(parser, arguments, namespace)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(os, "environ", os.environ.copy())
        if words[1] == "-m":
            importlib.import_module(words[2]).main(words[3:])
        else:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_options_of_what_is_not_run_are_right(page, monkeypatch):
    for block in blocks(page):
        if block.why_not is None:
            continue
        assert block.kind == "bash" and block.why_not.startswith("needs "), f"{page.name}, line {block.line}"
        for words in block.commands():
            check_options(words, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        "python -m flowmo.train lo data.pth=IMAGES",
        "python -m flowmo.tokenize IMAGES --oot tokens/",
        "torchrun --nproc-per-node 8 -m flowmo.train hi trainer.paralel=fsdp",
        "python bench/ops.py --onyl lfq",
        "pytest tests/ops/test_no_such_op.py",
    ],
)
def test_a_wrong_option_is_seen(words, monkeypatch, capsys):
    with pytest.raises((ValueError, SystemExit, AssertionError)):
        check_options(words.split(), monkeypatch)


def test_blocks_are_found():
    page = ROOT / "docs" / "kernels.md"
    found = blocks(page)
    assert [b.why_not is None for b in found].count(True) == 2 and len(found) == 6
    fence = "`" * 3
    assert Block("bash", "a \\\n b # c\n", None, 1).commands() == [["a", "b"]] and fence not in found[0].text


def test_options_in_the_readme_are_right(monkeypatch):
    """Its blocks for CI are run there; here the options of all its commands are checked."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if re.match(r"(python -m flowmo[. ]\S|torchrun )", line)]
    assert len(commands) > 10
    for command in commands:
        words = shlex.split(command, comments=True)
        if words != ["python", "-m", "flowmo.train"]:
            check_options(words, monkeypatch)


def test_costs_are_those_of_the_code():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([\d,]+) steps of (\d+) \| ([\d.]+)e21 \|$", page, re.M)
    assert len(rows) == 4
    for run, steps, batch, operations in rows:
        config = parse([*run.split(), *(["init=RUN"] if "stage" in run else [])])
        assert (config.trainer.steps, config.data.batch) == (int(steps.replace(",", "")), int(batch))
        whole = min(config.optim.freeze_encoder_at or config.trainer.steps, config.trainer.steps)
        total = whole * step_flops(config, False) + (config.trainer.steps - whole) * step_flops(config, True)
        digits = len(operations.partition(".")[2])
        assert round(total / 1e21, digits) == float(operations), run


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=[*names, "README"])
def test_evaluations_name_all_weights_that_they_need(page):
    """A measure whose weights are not named ends the command, unless it is left out by --skip."""
    for block in blocks(page):
        for words in block.commands() if block.kind == "bash" else []:
            if "flowmo.evaluate" not in words and not {"flowmo.analyse", "modes"} & set(words) == {"flowmo.analyse"}:
                continue
            skipped = evaluate.skipped_measures(words[words.index("--skip") + 1]) if "--skip" in words else ()
            judges = ["inception"] if "--samples" in words else ["inception", "lpips-vgg", "lpips-alex"]
            for judge in judges:
                left_out = judge.replace("inception", "fid") in skipped
                assert left_out or f"--{judge}" in words, f"{page.name}, line {block.line}: --{judge} or --skip"


def test_checkpoints_take_what_the_page_says():
    """fp32 weights of everything; average and two moments of what learns; the decoder alone learns in Stage 1B."""
    page = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"That is ([\d.]+) GB and ([\d.]+) GB for `lo` and `hi`, ([\d.]+) and ([\d.]+) GB for `small`, "
        r"([\d.]+) and [\d.]+ GB for Stage 1B of `lo`.*?`lo` ends with (\d+) of them, (\d+) GB",
        page,
    )
    assert said
    found = []
    for name in ("lo", "small"):
        with torch.device("meta"):
            model = FlowMo(name)
        whole = sum(p.numel() for p in model.parameters())
        idle = {id(p) for part in (model.encoder, model.decoder) for p in part.unread_parameters()}
        learns = sum(p.numel() for p in model.parameters() if id(p) not in idle)
        found += [4 * (whole + 3 * learns) / 1e9, 4 * whole / 1e9]
        if name == "lo":
            decoder = sum(p.numel() for p in model.decoder.parameters() if id(p) not in idle)
            posttrain = 4 * (whole + 3 * decoder) / 1e9
    t = parse(["lo"]).trainer
    last = {t.steps - i * t.save_every for i in range(t.keep)}
    kept = len(last | set(range(t.keep_every, t.steps + 1, t.keep_every)))
    expected = [*(f"{x:.1f}" for x in (*found, posttrain)), str(kept), f"{kept * found[0]:.0f}"]
    assert list(said.groups()) == expected


def test_sizes_in_the_readme_are_those_of_the_models():
    rows = re.findall(r"^\| `([\w-]+)`[^|]*\|([^|]*)\|([^|]*)\| ([\d,]{7,}) \|", (ROOT / "README.md").read_text(), re.M)
    assert {"lo", "hi", "small", "continuous", "quickstart", "tiny"} <= {name for name, *_ in rows}
    for name, tokens, rate, parameters in rows:
        config = parse([name])
        with torch.device("meta"):
            model = Generator(config.generator.network) if config.stage == "maskgit" else FlowMo(config.model)
        assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(",", "")), name
        if config.stage == "pretrain" and config.model.discrete:
            assert tokens.split(",")[0].strip() == f"{config.model.tokens} x {config.model.entropy_bits}", name
            assert rate.strip() == f"{config.model.bits_per_pixel:.4f}", name


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_keys_that_are_named_are_known():
    known = set(known_keys())
    for page in PAGES:
        for key in re.findall(r"`([a-z]+\.[a-z_.]+)=[^`]*`", page.read_text(encoding="utf-8")):
            assert key in known, f"{page.name}: {key}"


def test_paths_that_are_named_exist():
    """A file in backticks, below one of the project's folders, is there."""
    for page in PAGES:
        for path in re.findall(
            r"`((?:flowmo|kernels|csrc|bench|tests|docs)/[\w./]+)`", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"

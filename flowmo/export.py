"""Write a model in another form: python -m flowmo.export SOURCE OUT [--dtype fp32|bf16|fp16]

python -m flowmo.export runs/lo flowmo_lo.safetensors --dtype bf16    one file that from_pretrained reads
python -m flowmo.export runs/lo flowmo_lo.pth                         the layout of the authors' release
python -m flowmo.export flowmo_lo.pth lo/                             a model folder
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch

from flowmo import FlowMo, cli
from flowmo.engine import Schedule
from flowmo.pretrained import config_text, save_file_with_config, save_released

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m flowmo.export", description=__doc__, formatter_class=cli.Help)
    p.add_argument("source", help="released .pth, model folder or training run")
    p.add_argument("out", type=Path, help="a .safetensors or .pth file, or a folder")
    p.add_argument("--dtype", choices=tuple(DTYPES), help="cast the weights; default: as they are")
    options = p.parse_args(arguments)
    model = FlowMo.from_pretrained(options.source, dtype=DTYPES.get(options.dtype))
    out: Path = options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        save_file_with_config(model, out)
    elif out.suffix == ".pth":
        c = model.config
        if c.quantizer == "fsq" or (c.quantizer == "none" and c.latent_channels != 16):
            raise ValueError(
                f"{out}: the released layout cannot say that the quantizer is {c.quantizer}, and its readers would "
                "take it for another; write a .safetensors file or a folder"
            )
        save_released(model.state_dict(), out, config=config_text(model))
        if model.sampler != Schedule():
            s = model.sampler
            own = f"--steps {s.steps} --rho {s.rho:g} --guidance {s.guidance:g}"
            print(f"other programs that read this layout do not know this decoder's own sampler, which is {own}")
    elif not out.suffix:
        model.save_pretrained(out)
    else:
        raise ValueError(f"{out}: expected a name ending in .safetensors or .pth, or a folder")
    for path in sorted(out.iterdir()) if out.is_dir() else [out]:
        print(f"{path}  {path.stat().st_size:,} bytes  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return 0


if __name__ == "__main__":
    cli.run(main)

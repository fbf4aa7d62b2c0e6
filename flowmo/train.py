"""Train FlowMo: python -m flowmo.train [preset] [key=value ...]

    python -m flowmo.train                                    five minutes on built-in photographs, any CPU
    python -m flowmo.train lo data.path=IMAGES loss.perceptual_weights=vgg16-397923af.pth
    python -m flowmo.train small data.path=IMAGES loss.perceptual=none trainer.accumulate=2
    python -m flowmo.train small data.path=IMAGES model.quantizer=fsq model.latent_channels=6 run=runs/fsq ...
    python -m flowmo.train lo stage=posttrain init=runs/lo data.path=IMAGES posttrain.resnet_weights=RESNET50.pth
    python -m flowmo.train lo stage=distill init=runs/post data.path=IMAGES posttrain.resnet_weights=RESNET50.pth
    python -m flowmo.train maskgit data.tokens=TOKENS         Stage 2: the generator, on a cache of flowmo.tokenize
    torchrun --nproc-per-node 8 -m flowmo.train lo data.path=ILSVRC2012_img_train.tar data.index=index.json ...
    python -m flowmo.train lo --dry-run                       print the resolved configuration and stop

Presets: lo, hi, small, continuous, tiny, quickstart; of Stage 2 maskgit, maskgit-quickstart. The same command again
resumes its run folder, also with another number of processes. python -m flowmo.training.report RUN writes its curves
and grids into one page.
"""

from __future__ import annotations

import logging

from flowmo import cli
from flowmo.config import parse, to_yaml


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    config = parse([a for a in arguments if a != "--dry-run"])
    if "--dry-run" in arguments:
        print(to_yaml(config), end="")
        return 0
    logging.getLogger("flowmo.engine").setLevel(logging.WARNING)  # every sample grid prepares its own plan
    from flowmo import quickstart  # late, so that mistakes in the command are said at once
    from flowmo.training.loop import Trainer

    if config.preset == "quickstart" and config.stage == "pretrain" and config.data.path == "samples":
        return quickstart.run(config)
    Trainer(config).fit()
    return 0


if __name__ == "__main__":
    cli.run(main)

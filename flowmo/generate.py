"""Draw new pictures: python -m flowmo.generate --tokenizer T --generator G --classes 0,1,2 --n 8 --out DIR

    python -m flowmo.generate --tokenizer flowmo_lo.pth --generator runs/maskgit --classes 207,388 --n 8 --out dogs/
    torchrun --nproc-per-node 8 -m flowmo.generate --tokenizer flowmo_lo.pth --generator runs/maskgit --classes all \\
        --per-class 50 --no-png --out fid50k/

Writes DIR/pictures/NUMBER_CLASS.png, DIR/grid.png (a row to a class) and DIR/samples.npz with arr_0, uint8
[N, H, W, 3], and arr_1, the classes: balanced and shuffled, as the ADM evaluator wants it.
The same command again goes on where it was stopped, after kill -9 too, also with another number of processes, and
ends in the same pictures, bit for bit on one kind of card; DIR/settings.json says what they depend on.
Several processes, which torchrun starts, draw the same pictures as one with the same --seed and --batch; torchrun
wants --per-class written for --n.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from flowmo import FlowMo, cli
from flowmo.data import make_grid, save_png, to_uint8
from flowmo.data.tokens import layout_of
from flowmo.generator.network import Generator
from flowmo.generator.sampler import SamplerPlan
from flowmo.generator.samples import SampleFolder, digest
from flowmo.generator_config import TokenSamplerConfig
from flowmo.training import distributed
from flowmo.training.precision import take_device
from flowmo.training.state import noise_seed

GRID_ROWS, GRID_COLUMNS = 16, 8
PLACES = ("start", "end", "span")  # of a step, where it counts
T = TypeVar("T")


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    cli.at_least(1, options, "n", "batch", "steps", "decoder_steps")
    cli.output_folder(options.out)
    processes = distributed.join()
    rank, world = processes.rank, processes.world
    device = take_device(options.device, processes)
    fast = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if fast else torch.float32
    generator, tokenizer = load_pair(options.generator, options.tokenizer, device, dtype)
    classes = parse_classes(options.classes, generator)
    labels = shuffled_labels(classes, options.n, options.seed)
    batch = min(options.batch, len(labels))
    settings = settings_of(options, generator, tokenizer, batch, classes) if processes.first else {}
    folder = SampleFolder(options.out, labels, batch, tokenizer.config.image_size, settings)
    todo = first_says(lambda: folder.begin(options.overwrite), processes)
    left = sum(folder.sizes[number] for number in todo)
    if not todo and first_says(lambda: folder.finished, processes):
        if processes.first:
            print(f"{options.out} holds these {len(labels)} pictures already; --overwrite draws them again")
        return 0
    plan = SamplerPlan(generator, batch, sampler_config(options))
    if processes.first:
        kept = f", {len(labels) - left} of them there already" if left < len(labels) else ""
        print(
            f"{len(labels)} pictures of {len(classes)} classes{kept}, {world} processes, {plan.describe()}, "
            f"{dtype}; {cli.kernels()}",
            flush=True,
        )
    decoder = {"steps": options.decoder_steps, "guidance": options.decoder_guidance}
    bar = cli.Progress(left, shown=processes.first)
    for number, pictures in generate(plan, tokenizer, labels, options.seed, todo[rank::world], **decoder):
        if not options.no_png:
            for i, picture in enumerate(pictures, number * batch):
                save_png(picture, options.out / "pictures" / f"{i:06d}_{int(labels[i]):04d}.png")
        folder.keep(number, pictures.permute(0, 2, 3, 1).numpy())  # last: a batch that is kept is finished
        bar.update(len(pictures) * world)  # the others are about as far
    bar.close()
    distributed.barrier()
    if processes.first:
        folder.write_archive()
        save_png(class_grid(folder, classes[:GRID_ROWS], generator), options.out / "grid.png")
        folder.finish()
        print(f"wrote {len(labels)} pictures, grid.png and samples.npz to {options.out}")
    return 0


def settings_of(
    options: argparse.Namespace, generator: Generator, tokenizer: FlowMo, batch: int, classes: list[int]
) -> dict[str, Any]:
    """What the pictures depend on; weights by their digests, wherever they lie."""
    decoder = tokenizer.schedule(options.decoder_steps, guidance=options.decoder_guidance)
    return {
        "classes": "all" if classes == list(range(generator.config.classes)) else ",".join(map(str, classes)),
        "n": options.n,
        "seed": options.seed,
        "batch": batch,
        "png": not options.no_png,
        "device": generator.device.type,
        "precision": str(tokenizer.dtype).removeprefix("torch."),
        **asdict(sampler_config(options)),
        **{f"decoder_{name}": value for name, value in decoder._asdict().items()},
        "generator": digest(generator, generator.config),
        "tokenizer": digest(tokenizer, tokenizer.config),
    }


def first_says(ask: Callable[[], T], processes: distributed.Processes) -> T:
    """What the first process answers, in all of them; its error too."""
    answer: T | Exception | None = None
    if processes.first:
        try:
            answer = ask()
        except (ValueError, OSError) as error:
            answer = error
    answer = distributed.from_first(answer)
    if isinstance(answer, Exception):
        raise answer
    return cast(T, answer)


def load_pair(
    generator: str | Path, tokenizer: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple[Generator, FlowMo]:
    """Both models, checked against each other.

    Raises:
        ValueError: the generator speaks tokens of another tokenizer or layout.
    """
    network = Generator.from_pretrained(generator, device=device, dtype=dtype)
    # in fp32 first: the fingerprint is of these weights
    model = FlowMo.from_pretrained(tokenizer, dtype=torch.float32)
    layout = layout_of(model, network.layout.grouping if network.layout else "parity")
    c = network.config
    wrong = network.layout.differences(layout) if network.layout else []
    if (c.tokens, c.bits) != (layout.tokens, layout.bits):
        wrong.append(f"network: {c.tokens} tokens of {c.bits} bits and {layout.tokens} of {layout.bits}")
    if c.codes != layout.vocabulary:
        wrong.append(f"values of a token: {c.codes} and {layout.vocabulary}")
    if wrong:
        raise ValueError(
            f"{generator} speaks other tokens than {tokenizer} (generator and tokenizer: {'; '.join(wrong)}); use the "
            "tokenizer that its token cache was made with"
        )
    network.layout = layout
    return network, model.to(device, dtype)


def generate(
    plan: SamplerPlan,
    tokenizer: FlowMo,
    labels: Tensor,  # [N] int64
    seed: int = 0,
    batches: Sequence[int] | None = None,
    **decoder: float,
) -> Iterator[tuple[int, Tensor]]:  # number of the batch, pictures [n, 3, S, S] uint8
    """Pictures of labels, a batch of the plan at a time; `decoder` are options of FlowMo.decode.

    The noise of a batch depends on the seed and its number alone, and every batch is computed at the plan's size:
    whoever draws which `batches` (all by default), after whatever others, they are the same to the last bit.
    """
    layout = plan.model.layout or layout_of(tokenizer)
    parts = labels.split(plan.batch)
    for number in range(len(parts)) if batches is None else batches:
        n, own = len(parts[number]), noise_seed(seed, number, 0)
        codes = layout.decode(plan(parts[number].to(plan.device), seed=own))
        side = tokenizer.config.image_size
        noise = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(own))
        codes, noise = (torch.cat([x, x[-1:].expand(plan.batch - n, *x.shape[1:])]) for x in (codes, noise))
        yield number, to_uint8(tokenizer.decode(codes, noise=noise, **decoder)[:n]).cpu()  # type: ignore[arg-type]


def class_grid(folder: SampleFolder, classes: list[int], generator: Generator) -> Image.Image:
    """A row of pictures for each of some classes."""
    rows = []
    for label in classes:
        chosen = torch.nonzero(folder.labels == label).flatten()[:GRID_COLUMNS].tolist()
        rows.append(torch.from_numpy(folder.pictures(chosen)).permute(0, 3, 1, 2))
    names = [generator.class_names[c] if c < len(generator.class_names) else str(c) for c in classes]
    return make_grid(rows, names)


def shuffled_labels(classes: list[int], n: int, seed: int) -> Tensor:  # [len(classes) n] int64
    """n of every class, in random order: the Inception Score is taken over consecutive parts."""
    labels = torch.tensor(classes).repeat_interleave(n)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def parse_classes(text: str, generator: Generator) -> list[int]:
    """'0,1,2', '0-9', names, mixtures of these, or 'all'.

    Raises:
        ValueError: no class of the generator, or one named twice.
    """
    count, names = generator.config.classes, generator.class_names
    if text == "all":
        return list(range(count))
    classes: list[int] = []
    for word in text.split(","):
        first, dash, last = word.partition("-")
        if word in names:
            classes.append(names.index(word))
        elif word.isdecimal():
            classes.append(int(word))
        elif dash and first.isdecimal() and last.isdecimal():
            classes.extend(range(int(first), int(last) + 1))
        else:
            known = f", or names such as {', '.join(names[:5])}" if names else ""
            raise ValueError(f"--classes {text}: {word!r} is no class; expected numbers 0 to {count - 1}{known}")
    if not classes or not 0 <= min(classes) <= max(classes) < count:
        raise ValueError(f"--classes {text}: the generator has the classes 0 to {count - 1}")
    if len(set(classes)) < len(classes):
        raise ValueError(f"--classes {text}: a class is named twice; --n says how many pictures of each")
    return classes


def sampler_config(options: argparse.Namespace) -> TokenSamplerConfig:
    return TokenSamplerConfig(
        steps=options.steps,
        guidance=options.guidance,
        guidance_form=options.guidance_form,
        guidance_decay=options.guidance_decay,
        guidance_power=options.guidance_power,
        guidance_at=options.guidance_at,
        schedule=options.schedule,
        softmax_annealing=not options.no_softmax_annealing,
        softmax_temperature=options.softmax_temperature,
        randomize_temperature=options.temperature,
        temperature_at=options.temperature_at,
        draw=options.draw,
        confidence=options.confidence,
        confidence_noise=options.confidence_noise,
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m flowmo.generate", description=__doc__, formatter_class=cli.Help)
    p.add_argument("--tokenizer", required=True, help="released .pth, model folder or run")
    p.add_argument("--generator", required=True, help="model folder or run of Stage 2")
    p.add_argument("--classes", default="all", help="0,1,2 or 0-9 or names or all")
    # torchrun takes --n for one of its own options
    p.add_argument("--n", "--per-class", type=int, default=8, help="pictures of each class")
    p.add_argument("--out", required=True, type=Path, help="folder of what is written")
    p.add_argument("--no-png", action="store_true", help="write samples.npz and the grid only")
    p.add_argument("--overwrite", action="store_true", help="remove what an earlier run left in DIR and begin anew")
    p.add_argument("--batch", type=int, default=32, help="pictures at once")
    p.add_argument("--seed", type=int, default=0, help="of tokens and decoding noise")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 on CUDA")
    tokens, d = p.add_argument_group("drawing tokens"), TokenSamplerConfig()
    tokens.add_argument("--steps", type=int, default=d.steps, help="passes of the generator")
    tokens.add_argument("--guidance", type=float, default=d.guidance, help="shift of the logits; 0 is off")
    tokens.add_argument("--guidance-form", default=d.guidance_form, choices=("shift", "interpolate"))
    tokens.add_argument("--guidance-decay", default=d.guidance_decay, choices=("constant", "linear", "cosine"))
    tokens.add_argument("--guidance-power", type=float, default=d.guidance_power, help="of the cosine decay")
    tokens.add_argument("--guidance-at", default=d.guidance_at, choices=PLACES, help="how steps count for the decay")
    tokens.add_argument("--temperature", type=float, default=d.randomize_temperature, help="of the Gumbel noise")
    tokens.add_argument("--temperature-at", default=d.temperature_at, choices=PLACES, help="how steps count for it")
    tokens.add_argument("--softmax-temperature", type=float, default=d.softmax_temperature, help="divides the logits")
    tokens.add_argument("--no-softmax-annealing", action="store_true")
    tokens.add_argument("--schedule", default=d.schedule, choices=("arccos", "cosine", "proportional"))
    tokens.add_argument("--draw", default=d.draw, choices=("annealed", "categorical"))
    tokens.add_argument("--confidence", default=d.confidence, choices=("logit", "log_prob"))
    tokens.add_argument("--confidence-noise", type=float, help="temperature of its noise; default: --temperature")
    decoder = p.add_argument_group("decoding them")
    decoder.add_argument("--decoder-steps", type=int, help="default: the tokenizer's own, 25 unless distilled")
    decoder.add_argument("--decoder-guidance", type=float, help="default: the tokenizer's own, 1.5")
    return p


if __name__ == "__main__":
    cli.run(main)

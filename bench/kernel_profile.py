"""Which kernels each op launches on a card, and how long each takes, from the profiler.

    python bench/kernel_profile.py --out bench/results/profile.csv [--only lfq] [--trace FOLDER]

One row per op, provider and kernel name. --trace also writes a Chrome trace of each.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from bench.cases import CARD, cases  # noqa: E402
from bench.ops import providers  # noqa: E402
from bench.timing import environment  # noqa: E402

CALLS = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "profile.csv")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--skip", nargs="*", default=[], help="providers to leave out, such as compile")
    parser.add_argument("--trace", type=Path, help="folder for Chrome traces")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench/kernel_profile.py reads kernel times of a CUDA card and there is none")
        return 2
    common = environment()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "shape", "provider", "kernel", "launches", "us_per_call", *common])
        writer.writeheader()
        for case in cases(CARD):
            if options.only not in case.name:
                continue
            inputs = case.make("cuda")
            for provider, call in providers(case):
                if provider in options.skip:
                    continue
                try:
                    for _ in range(3):
                        call(*inputs)
                    torch.cuda.synchronize()
                except Exception as error:  # Triton's and the compilers' errors have no common base
                    print(f"    {provider} failed: {(str(error) or repr(error)).splitlines()[0][:120]}")
                    continue
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
                    for _ in range(CALLS):
                        call(*inputs)
                    torch.cuda.synchronize()
                if options.trace:
                    options.trace.mkdir(parents=True, exist_ok=True)
                    name = f"{case.name}-{case.shape}-{provider}".replace("/", "-").replace(" ", "_")
                    recorded.export_chrome_trace(str(options.trace / f"{name}.json"))
                for event in recorded.key_averages():
                    if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total > 0:
                        writer.writerow(
                            {"case": case.name, "shape": case.shape, "provider": provider, "kernel": event.key[:120],
                             "launches": event.count / CALLS,
                             "us_per_call": f"{event.self_device_time_total / CALLS:.2f}"} | common
                        )  # fmt: skip
                file.flush()
            print(f"{case.name} {case.shape}")
            torch.cuda.empty_cache()
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

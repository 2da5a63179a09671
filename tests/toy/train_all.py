"""Trains the codec and the three toys, or goes on: each from its checkpoint; what is done is left alone.

    VSF_COMFYUI=.../ComfyUI python tests/toy/train_all.py --out DIR
    VSF_COMFYUI=.../ComfyUI python tests/toy/train_all.py --out DIR --device cuda

On CPUs ``--jobs`` processes of one thread each, for about seven hours of one core in all, in this order: codec, SD3,
Flux, Wan. On a GPU all at the same time, ``--minutes`` long. Logs and what was reached are beside the weights.
"""

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPU = {
    "codec": ["--steps", "6000"],
    "sd3": ["--steps", "7000", "--float32"],
    "flux": ["--steps", "4500", "--float32"],
    "wan": ["--steps", "7000", "--float32"],
}
"""About 0.4, 1.0, 1.7 and 1.0 seconds a step on one AVX2 core."""
GPU = {
    "codec": ["--batch", "64", "--fresh", "16", "--pool", "4000", "--steps", "100000"],
    **{
        family: ["--batch", "256", "--fresh", "64", "--pool", "65536", "--steps", "100000", *compiled]
        for family, compiled in (("sd3", ["--compile"]), ("flux", []), ("wan", ["--compile"]))
    },
}


def command(name: str, options: argparse.Namespace) -> list[str]:
    """What trains one of them."""
    out = [f"--out={options.out / name}.safetensors", f"--device={options.device}"]
    if options.minutes:
        out.append(f"--minutes={options.minutes}")
    own = (CPU if options.device == "cpu" else GPU)[name]
    if name == "codec":
        return [sys.executable, str(HERE / "train_codec.py"), *out, *own]
    return [
        sys.executable,
        str(HERE / "train.py"),
        f"--family={name}",
        f"--codec={options.out}/codec.safetensors",
        *out,
        *own,
    ]


def run(name: str, options: argparse.Namespace) -> int:
    """Trains one of them, its output in a log; gives its exit code."""
    with (options.out / f"{name}.log").open("a") as log:
        code = subprocess.run(command(name, options), stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    print(f"{name}: {'done' if code == 0 else f'exit code {code}, see {name}.log'}", flush=True)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, help="how many at the same time; default: 2 on CPUs, all on a GPU")
    parser.add_argument("--minutes", type=float, help="end each after so many; default on a GPU: 8")
    options = parser.parse_args()
    if options.device != "cpu":
        options.minutes = options.minutes or 8.0
    options.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs or (2 if options.device == "cpu" else len(GPU))) as pool:
        codec = pool.submit(run, "codec", options)
        while not codec.done() and not (options.out / "codec.safetensors").exists():
            time.sleep(1)
        jobs = [codec, *(pool.submit(run, name, options) for name in ("sd3", "flux", "wan"))]
    return max(job.result() for job in jobs)


if __name__ == "__main__":
    sys.exit(main())

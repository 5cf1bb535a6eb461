"""Images a second through the input pipeline, beside plain loops that decode and augment.

    python benchmarks/input.py                      # photographs are made up, in a temporary folder
    python benchmarks/input.py --images FOLDER      # JPEG files of one's own, in any subfolders

The plain loops call the functions of the pipeline, one image after the other, in as many processes
as the pipeline has workers, and hand nothing over: *decode* reads the file, *loop* augments too (a
random resized crop, mirroring, RandAugment of magnitude 9). *Pipeline* is `train_batches` up to
batches in the main process, which then does nothing with them. All are measured in turn, warm; the
table shows medians and, for the ratio of pipeline and loop, the least and greatest of one round.

The estimate below the table says how many cores feed an accelerator that trains a ViT-B/16: 17.5 G
multiplications an image forward, three times as much in a training step, two operations each, at a
share of the peak that ``--peak`` and ``--shares`` give. Nothing of it is measured but the images.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from gaudi_jax.data.augment import training_image
from gaudi_jax.data.images import FileSource
from gaudi_jax.data.pipeline import train_batches

AUGMENTATION: dict[str, Any] = {"least_area": 0.08, "flip": True, "magnitude": 9.0}
EPOCH = 200_000
VIT_B_MULTIPLICATIONS = 17.5e9  # an image, forward


def photograph(rng: np.random.Generator, width: int = 500, height: int = 375) -> Image.Image:
    """Smooth shapes with ever finer texture; about 100 KB as a JPEG file, like ImageNet's."""
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(9):
        rows, columns = 3 * 2**octave, 4 * 2**octave
        # Channels go together for the most part, as they do in photographs.
        noise = rng.normal(size=(rows, columns, 1)) + 0.5 * rng.normal(size=(rows, columns, 3))
        for channel in range(3):
            waves = Image.fromarray(noise[..., channel].astype(np.float32))
            enlarged = waves.resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += 0.86**octave * np.asarray(enlarged)
    pixels = 120 + 60 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_photographs(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(count):
        photograph(rng).save(folder / f"{number}.jpg", quality=90)


def decode_all(source: FileSource, count: int, seed: int) -> None:
    for index in np.random.default_rng(seed).integers(len(source), size=count):
        _ = source[int(index)]


def augment_all(source: FileSource, size: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for index in rng.integers(len(source), size=count):
        training_image(source[int(index)]["image"], rng, size=size, **AUGMENTATION)


class Loops:
    """A plain loop in several processes that stay alive."""

    def __init__(self, processes: int, stack: ExitStack):
        self._processes = processes
        self._pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))

    def rate(self, loop: Callable[[int, int], None], images: int, seed: int) -> float:
        each = images // self._processes
        calls = [(each, seed + place) for place in range(self._processes)]
        start = time.perf_counter()
        self._pool.starmap(loop, calls, chunksize=1)
        return each * self._processes / (time.perf_counter() - start)


class Pipeline:
    """The training pipeline with its workers running."""

    def __init__(
        self, source: FileSource, batch_size: int, size: int, workers: int, stack: ExitStack
    ):
        self._batches = train_batches(
            source, batch_size=batch_size, image_size=size, seed=0, workers=workers, **AUGMENTATION
        )
        stack.callback(self._batches.close)
        # More than a worker makes while nobody asks: two in buffers, two that wait to enter them.
        self._batch_size, self._ahead = batch_size, 6 * workers

    def rate(self, images: int) -> float:
        for _ in range(self._ahead):
            next(self._batches)
        count = images // self._batch_size
        start = time.perf_counter()
        for _ in range(count):
            next(self._batches)
        seconds = time.perf_counter() - start
        # Workers go on until their buffers are full, and must not disturb what is measured next.
        time.sleep(self._ahead * seconds / count)
        return count * self._batch_size / seconds


def measure(
    files: list[str], args: argparse.Namespace, stack: ExitStack
) -> dict[tuple[str, int], list[float]]:
    """Rates by what is measured and the number of workers, one for each round."""
    source = FileSource(files, [0] * len(files), pictures=True)
    # Each file many times: Grain's shuffle takes 0.4 ms an image in a set of 64, and 5 us in one
    # of a million.
    many = files * (EPOCH // len(files) + 1)
    epoch = FileSource(many, [0] * len(many))
    loops = {count: Loops(count, stack) for count in sorted({max(w, 1) for w in args.workers})}
    pipelines = {w: Pipeline(epoch, args.batch_size, args.size, w, stack) for w in args.workers}
    rates: dict[tuple[str, int], list[float]] = {}
    for round_ in tqdm(range(-1, args.repeats), desc="rounds", disable=None):
        for workers, pipeline in pipelines.items():
            images = args.batches * args.batch_size * max(workers, 1)
            plain = loops[max(workers, 1)]
            seed = 100 * (round_ + 1)
            found = {
                "decode": plain.rate(partial(decode_all, source), images, seed),
                "loop": plain.rate(partial(augment_all, source, args.size), images, seed),
                "pipeline": pipeline.rate(images),
            }
            if round_ >= 0:  # the first round warms up
                for name, rate in found.items():
                    rates.setdefault((name, workers), []).append(rate)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of JPEG files")
    parser.add_argument("--count", type=int, default=128, help="images that are made up")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batches", type=int, default=6, help="of a worker in one round")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak", type=float, default=989, help="teraflops a second; H200, bf16")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.5])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if not args.images:
            write_photographs(Path(folder), args.count)
        paths = sorted((args.images or Path(folder)).rglob("*.[jJ][pP]*[gG]"))
        if not paths:
            parser.error(f"{args.images} holds no JPEG files")
        rates = measure([str(path) for path in paths], args, stack)
        kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1000

    print(f"{len(paths)} JPEG files of {kilobytes:.0f} KB, batches of {args.batch_size}")
    rows = []
    for workers in args.workers:
        decode, loop, pipeline = (rates[name, workers] for name in ("decode", "loop", "pipeline"))
        ratios = [a / b for a, b in zip(pipeline, loop, strict=True)]
        medians = [statistics.median(values) for values in (decode, loop, pipeline)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((workers, *medians, medians[2] / medians[1], spread, medians[1] / medians[0]))
    headers = (
        "workers",
        "decode images/s",
        "loop images/s",
        "pipeline images/s",
        "pipeline / loop",
        "least to greatest",
        "loop / decode",
    )
    print(tabulate(rows, headers, floatfmt=("d", ".0f", ".0f", ".0f", ".2f", "", ".2f")))

    most = max(args.workers)
    per_core = statistics.median(rates["pipeline", most]) / max(most, 1)
    print(f"\nEstimate: to train a ViT-B/16 at {args.peak:g} teraflops a second of peak")
    for share in args.shares:
        needed = share * args.peak * 1e12 / (2 * 3 * VIT_B_MULTIPLICATIONS)
        print(
            f"  at {share:.0%} of it: {needed:.0f} images/s, {needed / per_core:.1f} cores at "
            f"{per_core:.0f} images/s each"
        )


if __name__ == "__main__":
    main()

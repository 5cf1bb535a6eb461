"""Digits from scratch: Gaudi, low-rank and dense ViTs over several seeds.

    python benchmarks/digits.py --seeds=5

Runs ``configs/digits_vit_gaudi.py`` through ``main.py``, two runs at a time with one core each, and
prints means and standard deviations. Finished runs are kept in a CSV file and not repeated. Choices
were made on the validation split; the test split is read once, at the end of each run.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "digits.csv"
VARIANTS = {
    "dense": "layer=dense",
    "gaudi": "layer=gaudi",
    "gaudi, paper's recipe": "layer=gaudi,recipe=paper",
    # Ranks are whole numbers: this budget gives 33.7 %, not less than the Gaudi runs.
    "low_rank": "layer=low_rank,budget=0.345",
}
COLUMNS = (
    "test_accuracy_soft",
    "test_accuracy_hard",
    "validation_accuracy",
    "relative_multiplications",
)
ONE_CORE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def run(variant: str, seed: int) -> dict:
    with tempfile.TemporaryDirectory() as workdir:
        start = time.perf_counter()
        command = [
            sys.executable,
            "main.py",
            f"--config=configs/digits_vit_gaudi.py:{VARIANTS[variant]}",
            f"--config.seed={seed}",
            f"--workdir={workdir}",
        ]
        subprocess.run(
            command, check=True, cwd=ROOT, env=os.environ | ONE_CORE, capture_output=True
        )
        summary = json.loads((Path(workdir) / "summary.json").read_text(encoding="utf-8"))
    row = {"variant": variant, "seed": seed, "seconds": round(time.perf_counter() - start)}
    return row | {name: summary[name] for name in COLUMNS}


def read_rows() -> list[dict]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(row: dict) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row.keys())
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict]) -> str:
    lines = []
    for variant in VARIANTS:
        chosen = [row for row in rows if row["variant"] == variant]
        if chosen:
            values = {name: np.array([float(row[name]) for row in chosen]) for name in COLUMNS}
            cells = [f"{100 * v.mean():.2f} ± {100 * v.std(ddof=1):.2f}" for v in values.values()]
            lines.append((variant, len(chosen), *cells))
    headers = ("layers", "seeds", "test, soft %", "test, hard %", "validation %", "cost %")
    return tabulate(lines, headers, tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    done = {(row["variant"], int(row["seed"])) for row in read_rows()}
    jobs = [(v, s) for s in range(args.seeds) for v in VARIANTS if (v, s) not in done]
    with ThreadPoolExecutor(2) as pool:
        for row in tqdm(pool.map(lambda job: run(*job), jobs), total=len(jobs), unit="run"):
            append_row(row)
    print(table(read_rows()))


if __name__ == "__main__":
    main()

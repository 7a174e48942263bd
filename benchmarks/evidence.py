"""Trains recipes over seeds on the same shards and cache, probes each student, and keeps a row of each.

python -m benchmarks.evidence --data NAME --train SHARDS --val SHARDS --cache CACHE --recipes five regression

Runs are resumed where they stopped, and rows that are there are not made again: the same command goes on. The page and
the figure are made from all rows of the file, those of other data and commands too.
"""

from __future__ import annotations

import csv
import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from benchmarks.results import append_rows, commit, hardware
from common.errors import UserError, run_command
from common.files import write_atomic
from distill.evaluation.figures import write_figure

RESULTS = Path(__file__).parent / "results" / "evidence.csv"
PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
# Of the student's EMA: top-1 in percent, cosines to the teacher, effective rank, mean IoU in percent; of training:
# divergence from DINO's target at the end in nats, median images/s.
MEASURES = (
    "knn", "linear", "cosine", "rankme", "patch_cosine", "miou", "miou_knn", "dino_kl", "images_per_second",
)  # fmt: skip
_SHOWN = ("knn", "linear", "cosine", "patch_cosine", "miou", "miou_knn")
_KEY = ("data", "recipe", "flags", "seed")


@dataclass(frozen=True)
class EvidenceArgs:
    """Options of the comparison."""

    data: str
    """Name of the data in the rows."""
    train: str
    """Folder of training shards."""
    val: str
    """Folder of validation shards."""
    cache: str
    """The teacher's outputs, one cache for all recipes."""
    recipes: tuple[str, ...]
    """Presets, each with flags over it where wanted: five "five --spd_loss_weight 20"."""
    teacher: str | None = None
    """`--teacher_arch` of every run, the cache's teacher: a place, so it is not in the rows."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the student's initialisation: one run each."""
    flags: str = ""
    """Flags of train.py for every run: crops, student, length. One word: --flags="--max_steps 300 ..."."""
    probe_flags: str = ""
    """Flags of probe.py for every run, as one word too."""
    output: str = "runs/evidence"
    """Folder of the runs."""
    results: str = str(RESULTS)
    """CSV file of the rows."""
    page: str = str(PAGE)
    """Markdown page of all rows; its figure stands beside it, as a PNG of the same name."""


def gather(args: EvidenceArgs) -> list[dict[str, str]]:
    """Make the rows that are missing, print the table and return the rows that were asked for.

    Raises:
        UserError: no recipe or seed, or a run or its probe failed.
    """
    if not args.recipes or not args.seeds:
        raise UserError("--recipes and --seeds: one of each at least. Name presets, as in --recipes five regression.")
    path = Path(args.results)
    for seed in args.seeds:  # seed by seed: a comparison that is cut short has whole seeds
        for recipe in args.recipes:
            if not any(_is(row, args, recipe, seed) for row in read_rows(path)):
                append_rows(path, [run(args, recipe, seed)])
    rows = read_rows(path)
    write_page(rows, Path(args.page))
    wanted = [row for row in rows for recipe in args.recipes for s in args.seeds if _is(row, args, recipe, s)]
    print(table(wanted, args.recipes))
    return wanted


def run(args: EvidenceArgs, recipe: str, seed: int) -> dict[str, Any]:
    """Train one recipe with one seed, probe the student and return its row."""
    folder = Path(args.output) / re.sub(r"[^A-Za-z0-9.]+", "_", f"{args.data} {recipe}").strip("_") / str(seed)
    name, *flags = shlex.split(recipe)
    before = _cpu_seconds()
    _python(
        "train.py", "--preset", name, "--data_path", args.train, "--val_data_path", args.val,
        "--cache_path", args.cache, "--output_dir", folder, "--seed", seed,
        *(("--teacher_arch", args.teacher) if args.teacher else ()), *shlex.split(args.flags), *flags,
    )  # fmt: skip
    trained = _cpu_seconds()
    _python("probe.py", "--run", folder, *shlex.split(args.probe_flags))
    report = json.loads((folder / "probe" / "probe.json").read_text())
    models = {model["name"]: model for model in report["models"]}
    student, teacher = models["student"], models.get("teacher")
    k = str(report["protocol"]["knn_k"][-1])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "data": args.data,
        "recipe": recipe,
        "flags": args.flags,
        "seed": seed,
        "steps": max(line["step"] for line in lines),
        "knn": student["knn"][k],
        "linear": student["best"]["top1"],
        "cosine": student["cosine"],
        "rankme": student["rankme"],
        "patch_cosine": student["patch_cosine"],
        **{name: (student["segmentation"] or {}).get(key) for name, key in (("miou", "linear"), ("miou_knn", "knn"))},
        "dino_kl": next(x["dino_kl"] for x in reversed(lines) if "dino_kl" in x) or None,  # 0 without that loss
        "images_per_second": statistics.median(x["images_per_second"] for x in lines if "images_per_second" in x),
        "cpu_seconds": trained - before,
        "teacher_knn": teacher and teacher["knn"][k],
        "teacher_linear": teacher and teacher["best"]["top1"],
        "protocol": report["protocol_sha256"][:12],
        "commit": commit(),
        "hardware": hardware(),
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of the CSV file, none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[dict[str, str]], recipes: Sequence[str]) -> str:
    """Return mean and spread (greatest less least) of each measure over the seeds, a line a recipe, as Markdown."""
    lines = ["| recipe | steps | seeds | " + " | ".join(MEASURES) + " |", "|---|---|---|" + "---|" * len(MEASURES)]
    for recipe in recipes:
        cells = []
        for measure in MEASURES:
            values = _values(rows, recipe, measure)
            spread = max(values) - min(values) if values else 0.0
            cells.append(f"{statistics.fmean(values):.4g} ({spread:.2g})" if values else "-")
        steps = {row["steps"] for row in rows if row["recipe"] == recipe}
        lines.append(
            f"| `{recipe}` | {', '.join(sorted(steps))} | {len(_values(rows, recipe, 'seed'))} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def write_page(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Write the Markdown page of all rows, a table for each data set and its flags, and the figure beside it."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["flags"]), []).append(row)
    parts = [
        "# Evidence\n\nMade by `make evidence` from `benchmarks/results/evidence.csv`: mean over seeds of each measure "
        f"of the student, in parentheses greatest less least.\n\n![Recipes compared]({path.with_suffix('.png').name})\n"
    ]
    for (data, flags), of_group in groups.items():
        recipes = list(dict.fromkeys(row["recipe"] for row in of_group))
        costs = ", ".join(f"`{r}` {statistics.fmean(_values(of_group, r, 'cpu_seconds')):.0f}" for r in recipes)
        machines = "; ".join(dict.fromkeys(row["hardware"] for row in of_group))
        parts.append(
            f"## {data}\n\n{table(of_group, recipes)}\n\n{_teacher(of_group)}"
            "Images/s are by the wall clock, with whatever else the machine did; CPU time counts the run alone. "
            f"Seconds of CPU time a run: {costs}. {machines}.\n\nFlags of every run: `{flags}`\n"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(parts).encode())
    write_figure(recipes_figure(groups), path.with_suffix(".png"))


def _teacher(rows: Sequence[dict[str, str]]) -> str:
    """Line on the teacher, which is the same in all rows; nothing where it was not probed."""
    knn, linear = rows[-1]["teacher_knn"], rows[-1]["teacher_linear"]
    return f"Teacher: knn {float(knn):.2f}, linear {float(linear):.2f}. " if knn else ""


def recipes_figure(groups: Mapping[tuple[str, str], Sequence[dict[str, str]]]) -> Figure:
    """Draw a panel for each data set and measure: a dot a seed, a line for the mean, a row a recipe."""
    shown = [m for m in _SHOWN if any(row[m] for rows in groups.values() for row in rows)]
    figure = Figure(figsize=(2.6 * len(shown), 2.6 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), len(shown), squeeze=False, sharey="row")
    for line, ((data, _), rows) in zip(axes, groups.items(), strict=True):
        recipes = list(dict.fromkeys(row["recipe"] for row in rows))[::-1]
        for axis, measure in zip(line, shown, strict=True):
            for place, recipe in enumerate(recipes):
                values = _values(rows, recipe, measure)
                axis.plot(values, [place] * len(values), "o", ms=4, alpha=0.6, color=f"C{place}")
                if values:
                    axis.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=f"C{place}")
            axis.set_title(f"{data}: {measure}", fontsize=7)
            axis.set_yticks(range(len(recipes)), recipes, fontsize=7)
            axis.tick_params(axis="x", labelsize=7)
    return figure


def _values(rows: Sequence[dict[str, str]], recipe: str, column: str) -> list[float]:
    """Figures of a recipe, one a seed; none where it was not measured."""
    return [float(row[column]) for row in rows if row["recipe"] == recipe and row[column]]


def _is(row: dict[str, str], args: EvidenceArgs, recipe: str, seed: int) -> bool:
    return tuple(row[name] for name in _KEY) == (args.data, recipe, args.flags, str(seed))


def _python(*words: object) -> None:
    done = subprocess.run([sys.executable, *map(str, words)], check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise UserError(f"`python {' '.join(map(str, words[:3]))} ...` ended with status {done.returncode}; see above.")


def _cpu_seconds() -> float:
    """CPU time of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Command line; returns the exit status."""
    args = tyro.cli(EvidenceArgs, prog="python -m benchmarks.evidence", use_underscores=True, description=__doc__)
    return run_command(lambda: gather(args))


if __name__ == "__main__":
    sys.exit(main())

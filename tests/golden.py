"""Fingerprints of what must not change when code moves: crops, order, masks, file bytes and loss curves.

    python tests/golden.py > before.txt     at the commit before
    python tests/golden.py > after.txt      at the commit after, on the same machine
    diff before.txt after.txt               empty where nothing changed

Plan, masks and order are exact everywhere (their own tests hold golden values); pixels, tokens and curves are equal
to the bit only on one machine with one set of library versions, which is why two outputs are compared and none is
checked in.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.inputs import compose_images  # noqa: E402
from distill.export import Card, export_model  # noqa: E402
from distill.models import create_backbone  # noqa: E402
from pipeline.augmentation import named_augmentation  # noqa: E402
from pipeline.loader import open_loader  # noqa: E402
from pipeline.masks import block_masks  # noqa: E402
from pipeline.order import epoch_order  # noqa: E402
from pipeline.plan import crop_plan  # noqa: E402

CROPS = "--global_crops_size 48 --global_crops_scale 0.5 1.0 --flip_prob 0.5 --backend cpu".split()
STUDENT = """--patch_size 8 --embed_dim 48 --depth 2 --num_heads 2 --layer_scale 0.5 --local_crops_size 24
    --local_crops_number 3 --mask_patch_size 16 --num_prototypes 32 --prototype_rows 128 --prototype_iterations 3
    --koleo_warmup_steps 4 --warmup_epochs 0.2 --lr 4e-3 --no_compile --device cpu --num_threads 1 --log_every 1
    --knn_every_epochs 0 --term_gradients_every 3 --checkpoint_every 4 --batch_size_per_gpu 16 --max_steps 8""".split()
RUNS = {
    "five, cached": ["--cache_path", "CACHE"],
    "five, live": [],
    "five, view sets, drop path, masked input": [
        *("--view_sets", "2", "--drop_path_rate", "0.2", "--mask_student_input"),
    ],
    "five, mlp head, calibrated": ["--cache_path", "CACHE", "--head", "mlp", "--teacher_temp", "calibrated"],
    "five, accumulated": ["--cache_path", "CACHE", "--accumulation_steps", "4"],
    **{
        name: ["--cache_path", "CACHE", "--preset", name]
        for name in ("five_plus_patch", "regression", "gram_like", "lightly_like")
    },
}
NOT_OF_THE_LEARNING = ("images_per_second", "step_time", "data_wait", "_share")


def say(name: str, parts: Iterable[bytes]) -> None:
    """Print the name and the sha256 of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    print(f"{digest.hexdigest()[:32]}  {name}", flush=True)


def of_files(folder: Path) -> Iterable[bytes]:
    """Names and bytes of all files below a folder."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        yield str(path.relative_to(folder)).encode()
        yield path.read_bytes()


def plans_masks_and_order() -> None:
    """Everything that is drawn by seed, uid, view set and epoch."""
    uids = np.arange(500, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    sizes = np.stack([200 + np.arange(500) % 300, 150 + np.arange(500) % 411], 1)
    for name in ("dino", "dinov2_released"):
        augmentation = named_augmentation(name)
        for view_set, epoch in ((0, 0), (1, 5)):
            plan = crop_plan(uids, sizes, view_set=view_set, epoch=epoch, seed=7, augmentation=augmentation)
            parts = (plan.boxes, plan.flips, plan.colour, plan.blur_sigma, plan.solarize)
            say(f"plan {name} {view_set} {epoch}", (np.ascontiguousarray(part).tobytes() for part in parts))
        masks = block_masks(uids, epoch=3, seed=7, augmentation=augmentation)
        say(f"masks {name}", (part.tobytes() for part in masks))
    say("order", [epoch_order(100_003, seed=3, epoch=2, block=512, window=16).tobytes()])


def batches(shards: Path) -> None:
    """Two batches of every backend."""
    for backend in ("cpu", "torch", "dali"):
        with open_loader(
            shards, device="cpu", global_batch_size=16, seed=5, augmentation=named_augmentation("dino"), backend=backend
        ) as loader:
            for step in range(2):
                batch = next(loader)
                tensors = [batch.global_crops, batch.local_crops, batch.teacher_crops, batch.masks, batch.labels]
                arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
                arrays += [batch.masked_indices.numpy(), batch.rows, batch.global_crops_spec]
                say(f"batch {step} of {backend}", (np.ascontiguousarray(array).tobytes() for array in arrays))


def command(*words: object) -> None:
    """Run one of the project's commands."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    texts = [sys.executable, *map(str, words)]
    done = subprocess.run(texts, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(texts)}\n{done.stdout}\n{done.stderr}")


def curve(run: Path) -> list[str]:
    """Every logged number of the learning, exactly."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        " ".join(f"{key}={float(line[key]).hex()}" for key in sorted(line) if not key.endswith(NOT_OF_THE_LEARNING))
        for line in lines
    ]


def main() -> None:
    """Print a line for each thing that must stay."""
    plans_masks_and_order()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        compose_images(root, train_per_scan=1, val_per_scan=1, seed=0)
        shards = root / "shards"
        command("-m", "shards", "pack", "--source", root / "images/val", "--output", shards, "--rows-per-shard", 128)
        say("shards", (path.read_bytes() for path in [*sorted(shards.glob("*.tar")), shards / "index.npz"]))
        batches(shards)
        torch.manual_seed(0)
        args = {"embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 0.5, "img_size": 48}
        card = Card("teacher", "vit_small", "random", "MIT", step=0, ema=False, img_size=48)
        export_model(create_backbone("vit_small", patch_size=8, model_args=args).eval(), root / "teacher", card=card)
        say("exported weights", [(root / "teacher/model.safetensors").read_bytes()])
        teacher = ["--teacher_arch", f"local-dir:{root / 'teacher'}", *CROPS]
        for codec in ("int8", "fp16"):
            target = root / f"cache_{codec}"
            command(
                *("-m", "cache_tools", "build", "--shards", shards, "--cache", target, "--view_sets", 2),
                *("--codec", codec, "--device", "cpu", *teacher),
            )
            say(f"cache {codec}", of_files(target / "data.zarr"))
        for name, flags in RUNS.items():
            run = root / name.replace(" ", "_")
            flags = [str(root / "cache_int8") if flag == "CACHE" else flag for flag in flags]
            command("train.py", "--data_path", shards, "--output_dir", run, *teacher, *STUDENT, *flags)
            lines = curve(run)
            say(f"run {name}: every logged number of 8 steps", (line.encode() for line in lines))
            final = torch.load(run / "checkpoints/step_000000008.pt", weights_only=True)
            values = [v for part in ("model", "ema") for _, v in sorted(final[part].items())]
            say(f"run {name}: weights, prototypes and EMA", (v.numpy().tobytes() for v in values))


if __name__ == "__main__":
    main()

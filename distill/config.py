"""The options of a training run: frozen dataclasses with the documented defaults, loss presets, and config.json.

Groups nest here and are flat on the command line: `TrainConfig.losses.dino_loss_weight` is
`--dino_loss_weight`. Every field name is therefore unique over all groups.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError, unknown_name
from common.files import write_atomic
from pipeline.augmentation import Augmentation, CropOptions
from pipeline.crops import ReadOptions

_log = logging.getLogger(__name__)

# Images that mean and deviation of the teacher's tokens are taken from, where nothing else is.
STATISTICS_ROWS = 8192
DEFAULT_TEACHER = "vit_large_patch16_dinov3.lvd1689m"


@dataclass(frozen=True)
class StudentConfig:
    """The student and its heads."""

    arch: str = "vit_small"
    """vit_tiny, vit_small, vit_base or vit_large (timm's DINOv3 family), or any timm ViT or CNN by name."""
    patch_size: int = 16
    """Side of a patch in pixels; of a CNN, pixels to a side of one place of its last map."""
    init: str | None = None
    """Weights to start from: an exported student's folder, a file of weights, or `pretrained` for timm's own."""
    embed_dim: int | None = None
    """Width, if not the architecture's own."""
    depth: int | None = None
    """Number of blocks, if not the architecture's own."""
    num_heads: int | None = None
    """Attention heads, if not the architecture's own."""
    layer_scale: float | None = None
    """Initial LayerScale, if not the architecture's own (1e-5 in the DINOv3 family)."""
    drop_path_rate: float = 0.0
    """Stochastic depth. Meta's distillation uses none."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Under bf16 autocast, what the blocks of a packed student add to. bf16 moves fewer bytes; with a LayerScale of
    1e-5 it loses what they add at first."""
    head: Literal["linear", "mlp"] = "linear"
    """linear: student width -> teacher width, sharing the frozen prototypes. mlp: DINO's three-layer head."""
    mlp_head_hidden_dim: int = 2048
    """Hidden width of the mlp head."""
    mlp_head_bottleneck_dim: int = 256
    """Width before the learned last layer of the mlp head."""
    mask_student_input: bool = False
    """Replace masked patches by the mask token. Off: masks only choose the iBOT tokens, as Meta distils."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen teacher and where its outputs come from."""

    teacher: Literal["auto", "live", "cache"] = "auto"
    """auto takes the cache when cache_path is given, else the live teacher."""
    teacher_arch: str = DEFAULT_TEACHER
    """A timm ViT by name, or local-dir:FOLDER (config.json and model.safetensors), or hf-hub:NAME."""
    teacher_pretrained_weights: str | None = None
    """A local file: Meta's .pth or timm's .safetensors. None downloads the weights that teacher_arch names."""
    cache_path: str | None = None
    """Folder written by `make cache`."""
    view_sets: int | None = None
    """View sets K with a live teacher: epoch e repeats the boxes of e mod K. None: fresh boxes every epoch.
    With a cache, the first K of those that it holds; None: all that are finished when the run begins."""


@dataclass(frozen=True)
class PrototypeConfig:
    """Prototypes of the DINO and iBOT targets, fitted once in the teacher's space and frozen."""

    num_prototypes: int = 16384
    """Prototypes for cls tokens, and as many for patch tokens; in small sets half the tokens, where that is less."""
    prototype_rows: int = 131072
    """Images whose teacher tokens are read for the fit, at most."""
    prototype_iterations: int = 20
    """Iterations of spherical k-means."""
    teacher_temp: Literal["schedule", "calibrated"] = "schedule"
    """calibrated: the temperature at which the median top-1 mass of the targets is target_top1_mass."""
    teacher_temp_start: float = 0.04
    """Teacher temperature of the first step, by the schedule."""
    teacher_temp_end: float = 0.07
    """Teacher temperature after the warm-up."""
    teacher_temp_warmup_epochs: float = 30.0
    """Epochs from teacher_temp_start to teacher_temp_end."""
    target_top1_mass: float = 0.6
    """Median largest probability of a calibrated target."""
    student_temp: float = 0.1
    """Student temperature."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms. A term of weight 0 is not computed."""

    dino_loss_weight: float = 1.0
    """Prototype cross-entropy of cls tokens over all crops."""
    ibot_loss_weight: float = 1.0
    """Prototype cross-entropy of masked patch tokens."""
    koleo_loss_weight: float = 0.1
    """Kozachenko-Leonenko spread of student cls tokens."""
    spd_loss_weight: float = 1.0
    """Log-Euclidean distance between SPD matrices of patch tokens."""
    cls_loss_weight: float = 1.0
    """One minus the cosine of projected student and teacher cls tokens."""
    patch_loss_weight: float = 0.0
    """Baseline: cosine and smooth L1 on standardised patch tokens."""
    mse_loss_weight: float = 0.0
    """Mean squared error on standardised cls and patch tokens: the preset regression, and part of recommended."""
    gram_loss_weight: float = 0.0
    """Baseline: DINOv3's mean squared error of patch Gram matrices."""
    softmax_gram_loss_weight: float = 0.0
    """Baseline: LightlyTrain's KL of softmax Gram matrices of projected patch tokens."""
    proteus_loss_weight: float = 0.0
    """Baseline: Proteus' three mean squared errors on raw tokens, one of them in a masked pass of the student."""
    dino_same_view: bool = False
    """Also match a global crop with itself in the DINO loss."""
    koleo_all_ranks: bool = True
    """Search the nearest neighbour over all ranks: the loss does not depend on the number of GPUs."""
    koleo_warmup_steps: int = 1000
    """Steps over which the KoLeo weight rises from 0: with LayerScale 1e-5 all cls tokens start equal."""
    spd_eps: float = 1.0
    """Added to the diagonal of the token Gram matrix."""
    spd_reduction: Literal["pool", "sample"] = "pool"
    """What makes spd_max_tokens of a larger patch grid: the mean of a window, or the token at its middle."""
    spd_max_tokens: int = 256
    """Patch tokens of a crop that the SPD loss takes, at most. 49 or 64 pool 14 x 14 to 7 x 7, for which a GPU takes
    the eigendecomposition, fused into one launch; above 64 it takes the resolvent."""
    spd_backend: Literal["auto", "eigh", "resolvent"] = "auto"
    """Implementation of the matrix logarithm."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedules."""

    epochs: float = 100.0
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after so many steps instead; the schedules then end there."""
    batch_size_per_gpu: int = 64
    """Images per GPU and optimizer step."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step; must divide batch_size_per_gpu."""
    lr: float = 5e-4
    """Learning rate for 256 images."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How lr grows with the global batch."""
    min_lr: float = 1e-6
    """Learning rate of the last step."""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    weight_decay: float = 0.04
    """Decoupled weight decay; none on biases, norms, tokens and LayerScale."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.999
    """AdamW's second moment decay."""
    clip_grad: float = 3.0
    """Largest norm of the gradient; 0 is none."""
    layer_decay: float = 1.0
    """Learning-rate factor per block, from the last to the first."""
    patch_embed_lr_scale: float = 0.2
    """Learning-rate factor of the patch embedding."""
    ema_momentum: float = 0.994
    """Momentum of the student's EMA at the first step; it rises to 1 by a cosine. 0 keeps no EMA."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(CropOptions, ReadOptions):
    """Shards, crops and the loader."""

    data_path: str = ""
    """Folder of training shards, written by `make shards`."""
    val_data_path: str | None = None
    """Folder of validation shards: k-NN during training and `make probe`."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """What to do with a sample that fails to decode."""
    skip_budget: float = 0.001
    """Share of the samples that `skip` may replace before it is an error."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how the run executes and what it writes."""

    output_dir: str = "runs/default"
    """Folder of checkpoints, logs and config.json. The same command again resumes."""
    seed: int = 0
    """Seed of the student's initialisation and of stochastic depth."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast of backbone and heads: bf16 on GPUs by default, fp32 on CPUs. The losses are always fp32."""
    compile: bool | None = None
    """torch.compile of the whole step; --no_compile runs eager. None: on a GPU, where it pays."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    combo_kernels: bool = False
    """Compiled on a GPU: let Inductor join small kernels that do not depend on each other into one launch."""
    check_compile: bool = False
    """Compare the compiled gradients with eager ones on the first batch, per parameter, and stop if they differ."""
    log_every: int = 50
    """Steps between two lines of the log."""
    term_gradients_every: int = 500
    """Steps between two measurements of each term's gradient norm; 0 never."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep, 1 at least."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 none."""
    knn_every_epochs: float = 10.0
    """Epochs between two k-NN evaluations on val_data_path; 0 never."""
    knn_max_rows: int = 100_000
    """Training rows in the k-NN bank during training, at most."""
    tensorboard: bool = False
    """Also write TensorBoard events to output_dir/tensorboard."""


# What is allowed, how it is told, and for which flags. A NaN is in none of these ranges.
_RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("a number of 0 or more", lambda x: 0 <= x < math.inf, (
        *(f.name for f in dataclasses.fields(LossConfig) if f.name.endswith("_loss_weight")), "min_lr", "warmup_epochs",
        "weight_decay", "clip_grad", "patch_embed_lr_scale", "koleo_warmup_steps", "teacher_temp_warmup_epochs",
        "knn_every_epochs", "term_gradients_every", "checkpoint_every", "keep_every", "prototype_iterations",
    )),
    ("a number above 0", lambda x: 0 < x < math.inf, (
        "lr", "epochs", "teacher_temp_start", "teacher_temp_end", "student_temp", "spd_eps", "layer_decay",
    )),
    ("1 or more", lambda x: x >= 1, (
        "batch_size_per_gpu", "accumulation_steps", "max_steps", "log_every", "keep_checkpoints", "knn_max_rows",
        "prototype_rows", "view_sets",
    )),
    ("2 or more", lambda x: x >= 2, ("num_prototypes", "spd_max_tokens")),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, ("beta1", "beta2", "ema_momentum", "drop_path_rate")),
    ("between 0 and 1", lambda x: 0 < x < 1, ("target_top1_mass",)),
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run; saved as config.json in the run's folder."""

    preset: str = "five"
    """What is learned, from which crops: five, recommended, regression, proteus or another; see docs/recipes.md."""
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    prototypes: PrototypeConfig = field(default_factory=PrototypeConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        flat = _flat(self)
        for allowed, holds, names in _RANGES:
            for name in names:
                if flat[name] is not None and not holds(flat[name]):
                    raise UserError(f"--{name} {flat[name]}: it must be {allowed}. Change --{name}.")
        batch, parts = self.optim.batch_size_per_gpu, self.optim.accumulation_steps
        if batch % parts:
            raise UserError(
                f"--accumulation_steps {parts}: it must be a divisor of --batch_size_per_gpu {batch}. "
                "Change one of them."
            )
        one_view = self.data.global_crops_number == 1 and not self.data.local_crops_number
        if self.losses.dino_loss_weight and one_view and not self.losses.dino_same_view:
            raise UserError(
                "--global_crops_number 1 --local_crops_number 0: DINO compares two views, and there is one. Give local "
                "crops, --dino_same_view or --dino_loss_weight 0."
            )

    def crops(self) -> Augmentation:
        """Return the crop plan's parameters: the preset with this run's sizes, scales and masks.

        Without the DINO loss, the only one that reads them, there are no local crops.
        """
        crops = self.data.crops(patch_size=self.student.patch_size)
        return crops if self.losses.dino_loss_weight else crops.global_only()

    def fitted_prototypes(self) -> PrototypeConfig:
        """Return what is fitted to the teacher's tokens: where no loss reads prototypes, mean and deviation alone."""
        if self.losses.dino_loss_weight or self.losses.ibot_loss_weight:
            return self.prototypes
        rows = min(self.prototypes.prototype_rows, STATISTICS_ROWS)
        return dataclasses.replace(self.prototypes, num_prototypes=0, prototype_rows=rows)

    def uses_cache(self) -> bool:
        """Return whether targets come from the cache; UserError where the flags contradict each other."""
        source, path = self.teacher.teacher, self.teacher.cache_path
        if source == "cache" and path is None:
            raise UserError(
                "--teacher cache: no cache_path was given. Pass --cache_path FOLDER (made by `make cache`) "
                "or --teacher live."
            )
        return source == "cache" or (source == "auto" and path is not None)

    def to_json(self, versions: Mapping[str, str] | None = None) -> str:
        """Return the resolved configuration as indented JSON, one flat object per group, beside the versions."""
        return json.dumps(dataclasses.asdict(self) | {"versions": versions or {}}, indent=2)

    @staticmethod
    def from_json(text: str) -> TrainConfig:
        """Read what `to_json` wrote. Fields that are absent keep their defaults; unknown ones are an error."""
        values = json.loads(text)
        values.pop("versions", None)
        return _from_dict(TrainConfig, values, "config.json")


def _from_dict(cls: Any, values: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{where}: unknown fields {unknown}; this version knows {sorted(known)}.")
    made = {}
    for name, value in values.items():
        default_factory = known[name].default_factory
        if isinstance(default_factory, type) and isinstance(value, dict):
            made[name] = _from_dict(default_factory, value, f"{where}: {name}")
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    return cls(**made)


_NO_LOSS = {f.name: 0.0 for f in dataclasses.fields(LossConfig) if f.name.endswith("_loss_weight")}

# Flags that a preset gives another default, compared with Proteus' code, DINOv3's ssl_meta_arch and LightlyTrain's
# distillationv3. docs/recipes.md says where a `_like` differs from its model.
PRESETS: dict[str, dict[str, Any]] = {
    "five": {},
    "recommended": {
        "mse_loss_weight": 1.0, "spd_loss_weight": 5.0, "dino_loss_weight": 0.03, "ibot_loss_weight": 0.03,
        "cls_loss_weight": 0.03, "koleo_loss_weight": 0.003, "augmentation": "clean",
    },
    "five_plus_patch": {"patch_loss_weight": 1.0},
    "regression": _NO_LOSS | {"mse_loss_weight": 1.0},
    "proteus": _NO_LOSS | {
        "proteus_loss_weight": 1.0, "global_crops_number": 1, "local_crops_number": 0, "augmentation": "clean",
        "global_crops_scale": (0.08, 1.0), "mask_ratio": 0.5,
    },
    "gram_like": {"spd_loss_weight": 0.0, "gram_loss_weight": 2.0},
    "lightly_like": _NO_LOSS | {"cls_loss_weight": 1.0, "softmax_gram_loss_weight": 1.0},
}  # fmt: skip


def preset(name: str) -> TrainConfig:
    """Return the default configuration with a preset's own defaults; UserError names the known ones."""
    if name not in PRESETS:
        raise unknown_name("--preset", name, PRESETS)
    groups = {f.name: f.default_factory() for f in dataclasses.fields(TrainConfig) if callable(f.default_factory)}
    for group, options in groups.items():
        own = {flag: value for flag, value in PRESETS[name].items() if hasattr(options, flag)}
        groups[group] = dataclasses.replace(options, **own)
    return TrainConfig(preset=name, **groups)


# What may change when a run that has a checkpoint is taken up again: where and how it executes, its learning rate and
# its length. The teacher may be called otherwise and lie elsewhere: the prototypes hold the hash of its weights.
FREE_SETTINGS = frozenset(
    {
        "init", "lr", "min_lr", "epochs", "max_steps", "accumulation_steps", "teacher_arch",
        "teacher_pretrained_weights", "data_path", "val_data_path", "cache_path", "num_threads", "on_bad_sample",
        "skip_budget", "batch_size_per_gpu", "output_dir", "device", "compile", "compile_backend", "check_compile",
        "log_every", "term_gradients_every", "checkpoint_every", "keep_checkpoints", "keep_every", "knn_every_epochs",
        "knn_max_rows", "tensorboard",
    }
)  # fmt: skip


def has_checkpoint(run_dir: Path) -> bool:
    """Return whether the run has begun in the sense that there is something to resume."""
    return any(run_dir.glob("checkpoints/step_*.json"))


def load_config(run_dir: Path) -> TrainConfig:
    """Read a run's config.json; UserError where there is none."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file, so {run_dir} is not the folder of a run. Check --run / --output_dir.")
    return read_config(path)


def read_config(path: Path) -> TrainConfig:
    """Read a config.json; UserError where it is none."""
    try:
        return TrainConfig.from_json(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config.json ({error}). Give the file of a run.") from error


def write_or_check_config(config: TrainConfig, run_dir: Path, versions: Mapping[str, str] | None = None) -> None:
    """Write config.json, after checking it against the run that the folder holds, if that has a checkpoint.

    Other versions than the run's so far are said and not refused.

    Raises:
        UserError: a setting that decides what is computed differs; the message lists each.
    """
    path = run_dir / "config.json"
    if path.is_file() and has_checkpoint(run_dir):
        before, now = _flat(load_config(run_dir)), _flat(config)
        lines = [
            f"{name}: the run has {before[name]!r}, now {now[name]!r}"
            for name in before
            if name not in FREE_SETTINGS and before[name] != now[name]
        ]
        if lines:
            raise UserError(
                f"{path}: this folder holds a run with other settings:\n  " + "\n  ".join(lines) + "\n"
                "Give the same settings to resume it, or another --output_dir to start anew. Learning rate, length, "
                "accumulation, paths, logging and workers may change."
            )
        earlier, new = json.loads(path.read_text()).get("versions", {}), versions or {}
        changed = [f"{name} {old}, now {new.get(name)}" for name, old in earlier.items() if new.get(name) != old]
        if changed:
            _log.warning("%s: the run goes on with other versions, so its numbers may differ: %s", path, changed)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(path, config.to_json(versions).encode())


def _flat(config: TrainConfig) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in dataclasses.asdict(config).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat

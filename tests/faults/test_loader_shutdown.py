"""However a run ends, the loader ends with it: no hang, no thread, no child, no descriptor, no shared memory."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.augmentation import Augmentation
from pipeline.loader import open_loader
from pipeline.readers import read_center_crops
from shards.pack import pack

# Longer than the import of torch and DALI on a loaded machine; a hang lasts for ever.
PATIENCE = 1000
ROOT = Path(__file__).resolve().parents[2]
SMALL = Augmentation(num_local_crops=1, global_crops_size=32, local_crops_size=16, patch_size=8, mask_patch_size=8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shutdown")
    rng = np.random.default_rng(2)
    for i in range(16):
        path = folder / "images" / "one" / f"img{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    pack(folder / "images", folder / "shards", rows_per_shard=8, workers=1, progress=False)
    return folder / "shards"


def _open(shards, backend="cpu", **changes):
    return open_loader(
        shards, device="cpu", backend=backend, global_batch_size=4, seed=0, augmentation=SMALL, num_threads=2,
        **changes,
    )  # fmt: skip


def _own_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith(("multi-crop", "crop", "decode"))]


def _children():
    """Child processes of this one; an earlier test may have left a helper of Python's own, such as its tracker."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found |= set((task / "children").read_text().split())
    return found


def _descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def _shared_memory():
    """Mapped or open files of /dev/shm."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    opened = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
    return {line.split()[-1] for line in maps if "/dev/shm" in line} | {p for p in opened if "/dev/shm" in p}


@pytest.mark.parametrize("end", ["close", "with", "drop", "exception"])
def test_no_thread_is_left_however_the_loop_ends(shards, backend, end):
    before = _children()
    if end == "close":
        loader = _open(shards, backend)
        next(loader)
        loader.close()
        with pytest.raises(StopIteration):
            next(loader)
    elif end == "with":
        with _open(shards, backend) as loader:
            for _ in loader:
                break
    elif end == "drop":
        loader = _open(shards, backend)
        next(loader)
        del loader
        gc.collect()
    else:
        with pytest.raises(ZeroDivisionError), _open(shards, backend) as loader:
            next(loader)
            raise ZeroDivisionError
    assert _own_threads() == []
    assert _children() <= before


def test_closing_before_the_first_batch_ends_at_once(shards, backend):
    _open(shards, backend).close()
    assert _own_threads() == []


def test_a_reader_that_ends_or_is_left_leaves_no_thread(shards, backend):
    assert sum(len(b.rows) for b in read_center_crops(shards, range(16), size=16, backend=backend)) == 16
    assert _own_threads() == []
    for _ in read_center_crops(shards, range(16), size=16, backend=backend, batch_size=2):
        break
    gc.collect()
    assert _own_threads() == []


def test_opening_and_closing_leaks_no_descriptor_and_no_shared_memory(shards, backend):
    def once():
        with _open(shards, backend) as loader:
            next(loader)

    once()  # libraries open what they keep
    gc.collect()
    before, memory = _descriptors(), _shared_memory()
    for _ in range(5):
        once()
    gc.collect()
    assert _descriptors() <= before
    assert _shared_memory() == memory


def _script(body):
    head = """
        import sys, time, itertools
        from pipeline.augmentation import Augmentation
        from pipeline.loader import open_loader
        a = Augmentation(num_local_crops=1, global_crops_size=32, local_crops_size=16, patch_size=8,
                         mask_patch_size=8)
        def start(**more):
            return open_loader(sys.argv[1], device="cpu", backend=sys.argv[2], global_batch_size=4, seed=0,
                               augmentation=a, num_threads=2, **more)
    """
    return textwrap.dedent(head) + textwrap.dedent(body)


def _run(shards, backend, body):
    return subprocess.Popen(
        [sys.executable, "-c", _script(body), str(shards), backend], cwd=ROOT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


ENDS = {
    "end": ("loader = start()\nnext(loader)\n", 0, ""),
    "exit": ("loader = start()\nnext(loader)\nsys.exit(7)\n", 7, ""),
    "exception": ("loader = start()\nnext(loader)\nraise ValueError('stop here')\n", 1, "ValueError: stop here"),
}


@pytest.mark.parametrize(
    ("backend", "end"),
    [("cpu", "end"), ("cpu", "exit"), ("cpu", "exception"), ("dali", "end"), ("dali", "exception")],
)
def test_a_program_that_never_closes_its_loader_ends(shards, backend, end):
    if backend == "dali":
        pytest.importorskip("nvidia.dali", reason="needs DALI: pip install nvidia-dali-cuda130")
    body, status, message = ENDS[end]
    process = _run(shards, backend, body)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, errors
    assert message in errors
    assert "Fatal" not in errors
    if not message:
        assert "Traceback" not in errors


@pytest.mark.parametrize("where", ["waiting", "training"])
def test_ctrl_c_ends_the_program(shards, where):
    hang = """
        import pipeline.jobs
        real = pipeline.jobs.crop_jobs
        def slow(*arguments):
            for item in real(*arguments):
                yield item
                time.sleep(1.0)
        pipeline.jobs.crop_jobs = slow
    """ if where == "waiting" else ""  # fmt: skip
    body = (
        textwrap.dedent(hang)
        + "loader = start()\nnext(loader)\nprint('ready', flush=True)\n"
        + ("for _ in loader: pass\n" if where == "waiting" else "time.sleep(600)\n")
    )
    process = _run(shards, "cpu", body)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert "Fatal" not in errors


def test_a_feeder_that_dies_ends_the_program_with_its_error(shards):
    body = """
        import pipeline.jobs
        real = pipeline.jobs.crop_jobs
        def dying(*arguments):
            yield next(real(*arguments))
            raise MemoryError("out of memory in the feeder")
        pipeline.jobs.crop_jobs = dying
        loader = start()
        for _ in loader:
            pass
    """
    process = _run(shards, "cpu", body)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "MemoryError: out of memory in the feeder" in errors


def test_a_forked_child_is_told_that_its_loader_has_no_feeder_and_ends(shards):
    """Forked at the worst moment: another thread holds the feeder's lock. The child leaves by its exit handlers."""
    body = """
        import os, threading
        loader = start()
        next(loader)
        held, release = threading.Event(), threading.Event()
        def hold():
            with loader._feeder._shared.changed:
                held.set()
                release.wait()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        child = os.fork()
        if child == 0:
            try:
                next(loader)
            except RuntimeError as error:
                print(error, flush=True)
                sys.exit(9)
        _, status = os.waitpid(child, 0)
        release.set()
        holder.join()
        assert os.waitstatus_to_exitcode(status) == 9
        next(loader)
        loader.close()
    """
    process = _run(shards, "cpu", body)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "A forked process has no threads of its parent" in output

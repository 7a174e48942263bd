"""Processes forked from one that has a single thread and no objects of other tests.

A fork of pytest's own process holds, without their threads, whatever earlier tests left to the garbage collector: a
DALI pipeline collected there waits for its threads for ever.
"""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.faults.test_shards_kill", "tests.faults.test_cache_interrupted"])

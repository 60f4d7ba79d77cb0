"""Settings of all tests."""

import os

from hypothesis import settings

from mal_train.core.threads import wait_passively

# Before any test imports torch: tests share few cores with servers and loader processes.
wait_passively()

# Before any test imports grpc: its fork handlers restart its threads in the training processes that tests fork, which
# make no calls. With open channels, forked processes crashed from it, and one hung.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# The same examples in every run, so that a failure is caused by the change under test.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

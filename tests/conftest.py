"""What holds for every test."""

import os

from hypothesis import settings

from mal_train.core.threads import wait_passively

# Before any test imports torch: suites run beside servers and loaders on few cores.
wait_passively()

# Before any test imports grpc: its handlers of forks bring its threads to life in the training processes that tests
# fork, which never call anybody. Beside open channels forked processes were seen to die of it, and one, in a long run,
# to wait for ever.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# The same examples in every run: a change is judged by itself, not by luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

"""What holds for every test."""

from hypothesis import settings

from mal_train.threads import wait_passively

# Before any test imports torch: suites run beside servers and loaders on few cores.
wait_passively()

# The same examples in every run: a change is judged by itself, not by luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

"""What holds for every test."""

from mal_train.threads import wait_passively

# Before any test imports torch: suites run beside servers and loaders on few cores.
wait_passively()

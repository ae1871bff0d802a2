"""A plugin, `pytest -p emulated`: the tests of a GPU with the emulator in its place."""

import os

from fixtures import built, loaded

os.environ["LOSSOPS_TEST_DEVICE"] = "cpu"

"""`python train.py` on two replicas of one process, as on two GPUs.

    python tests/mirrored.py FLAGS

The replicas are two logical CPUs: a machine without GPUs has no others.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tensorflow as tf  # noqa: E402

import train  # noqa: E402
import utils  # noqa: E402


def main(argv):
    cpu = tf.config.list_physical_devices("CPU")[0]
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, halves)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    utils.choose_strategy = lambda *_, **__: strategy
    train.main(argv)


if __name__ == "__main__":
    utils.run_main(main)

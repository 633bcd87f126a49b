"""Train networks of configs/cifar with the data on the device: what `mmrla train-cifar` does."""

import sys

from mmrla.commands.train_cifar import main

if __name__ == "__main__":
    sys.exit(main())

"""From a checkout, `python train.py CONFIG [section.field=value ...]` is `soflow train`."""

import sys

from soflow.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

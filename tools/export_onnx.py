"""Write a network as ONNX: what `mmrla export-onnx` does."""

import sys

from mmrla.commands.export_onnx import main

if __name__ == "__main__":
    sys.exit(main())

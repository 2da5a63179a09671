"""Lets these tests import the benchmarks' modules by their plain names."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

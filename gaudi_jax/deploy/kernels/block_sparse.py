"""stub"""
from typing import NamedTuple
import numpy as np
CELL = 64
class Table(NamedTuple):
    cells: np.ndarray
    counts: np.ndarray

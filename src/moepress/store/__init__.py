"""Experts on disk: models that are bigger than memory.

memory.py      how much memory there is, and how much of it a user gives
places.py      where the matrices of the experts lie in the files of a folder
uses.py        how often experts are used, from the calibration counts in the folder
hottest.py     which experts go into the fastest memory
attach.py      a model whose experts come from a store
forecast.py    how fast a folder will run, before it is opened
statistics.py  what a store did: hit rate, bytes read

The store itself is `kernels/cpu/store.h`: which experts stay in memory, and which make room.
"""

from moepress.store.memory import parse_memory
from moepress.store.statistics import Statistics, statistics

__all__ = ["Statistics", "parse_memory", "statistics"]

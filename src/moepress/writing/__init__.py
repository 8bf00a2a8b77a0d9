"""Output: files written whole or not at all, checks before any work, one run per folder.

Imports nothing of moepress but its errors and `reading`.
"""

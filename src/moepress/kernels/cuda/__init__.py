"""The operations on NVIDIA cards."""

"""CPU kernels for ARM, cross compiled and run under QEMU's user-mode emulation (run.py)."""

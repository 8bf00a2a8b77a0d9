"""`python -m moepress.cli` is the command `moepress`."""

from moepress.cli import main

if __name__ == "__main__":
    main()

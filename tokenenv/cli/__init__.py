"""The command line: one module for each command, its options and a call of a function."""

"""Examples: each file is a program to run and to read."""

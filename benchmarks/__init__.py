"""Benchmarks: each writes JSON and a page; what is compared is measured in turns."""

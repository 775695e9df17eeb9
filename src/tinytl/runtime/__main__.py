"""`python -m tinytl.runtime`: train, evaluate and predict with a compiled program, without PyTorch or numpy."""

from tinytl.runtime.command import main

main()

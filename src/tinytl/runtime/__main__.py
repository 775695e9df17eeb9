"""`python -m tinytl.runtime`: train, evaluate and predict with a compiled program, without PyTorch or numpy."""

from tinytl.runtime._later import UNUSED, load_later

load_later(*UNUSED)  # before anything imports them

from tinytl.runtime.command import main  # noqa: E402

main()

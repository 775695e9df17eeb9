"""One of several processes that torchrun starts for `test_supernet`: a run undisturbed, one that is stopped, its rest.

torchrun --nproc-per-node 2 -m tests.supernet_worker PHOTOS FOLDER
"""

from __future__ import annotations

import hashlib
import signal
import sys
from pathlib import Path

from tinytl._atomic import raw_bytes
from tinytl.backbones.once_for_all import SPACES
from tinytl.errors import Interrupted
from tinytl.spec import RunOptions
from tinytl.supernet.processes import joined
from tinytl.supernet.run import SupernetCallbacks, SupernetResult, train_supernet
from tinytl.supernet.spec import SupernetSpec

from .small_spaces import PROXYLESS

OPTIONS = RunOptions(workers=0, threads=1, checkpoint_seconds=None)


def weights(result: SupernetResult) -> str:
    """A hash of all parameters."""
    digest = hashlib.sha256()
    for parameter in result.net.parameters():
        digest.update(raw_bytes(parameter))
    return digest.hexdigest()


def main(photos: str, folder: Path) -> None:
    """Train three times; print what the test looks at."""
    SPACES[PROXYLESS.name] = PROXYLESS
    spec = SupernetSpec(
        photos,
        PROXYLESS.name,
        resolutions="32,40",
        epochs=2,
        phase_epochs=1,
        batch_size=4,
        val_fraction=0.25,
        measured=1,
    )
    print("weights", weights(train_supernet(spec, folder / "undisturbed", options=OPTIONS)), flush=True)
    # the first process alone is asked, in the middle of a phase that shrinks
    stop = SupernetCallbacks(on_step=lambda info, _: signal.raise_signal(signal.SIGTERM) if info.step == 10 else None)
    try:
        train_supernet(spec, folder / "disturbed", options=OPTIONS, callbacks=stop)
    except Interrupted as error:
        print(error, flush=True)
    print("weights", weights(train_supernet(spec, folder / "disturbed", options=OPTIONS, resume=True)), flush=True)


if __name__ == "__main__":
    with joined():  # once for all three runs
        main(sys.argv[1], Path(sys.argv[2]))

"""Libraries that talk over a program's own output, asked not to."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """No progress bars of transformers where models of seconds are read and written again and again,
    and no warnings of its and PEFT's deprecations, which are between those two. For a process of ours:
    a library leaves its caller's alone."""
    # Read when the tokenizers library first forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

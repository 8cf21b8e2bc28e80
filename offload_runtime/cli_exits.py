"""How a command ends: every expected failure is one line on stderr and an exit code."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import RunError, UserError

RUN_ERROR, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141  # the last two: 128 + SIGINT, SIGPIPE


@contextmanager
def clean_exit() -> Iterator[None]:
    """Turn the errors a user can cause or meet into a line and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        fail(str(error), USER_ERROR)
    except (RunError, MemoryError) as error:
        fail(str(error) or "out of host memory; lower --ctx", RUN_ERROR)
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it somewhere to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # how PyTorch reports a failed allocation on the CPU
            fail("out of host memory; lower --ctx, or free memory (`ds-offload plan`)", RUN_ERROR)
        if type(error).__name__ != "OutOfMemoryError":  # torch's, named so that torch need not be imported
            raise
        fail(
            "the GPU ran out of memory; lower --ctx, --budget or --slots, or free the GPU "
            "(`ds-offload plan` shows what is needed)",
            RUN_ERROR,
        )


def fail(message: str, code: int) -> None:
    line = " ".join(message.split())
    print(f"ds-offload: {line}", file=sys.stderr)
    sys.exit(code)


def warn(message: str) -> None:
    print(f"ds-offload: warning: {message}", file=sys.stderr)


def quiet_libraries() -> None:
    """Keep libraries' advice out of stderr unless the user asked for it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries are for terminals
    if not sys.warnoptions:
        warnings.simplefilter("ignore")

"""Errors of jobs: one document's, which becomes its line, and the input's as a whole, which ends the job."""

from ..errors import RunError


class DocumentError(Exception):
    """This document cannot be answered: empty, binary, too long, gone."""


class InputChanged(RunError):
    """The input is not what was listed at the start, so no later document can be trusted either."""

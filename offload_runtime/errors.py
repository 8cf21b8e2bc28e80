"""The two errors a user sees, each as one line."""


class UserError(Exception):
    """The request cannot be right: bad option, file or model. Exit code 2."""


class RunError(Exception):
    """The request is right but cannot be done here: memory, device, disk. Exit code 1."""

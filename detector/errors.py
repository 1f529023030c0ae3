"""What goes wrong by the user's hand, and how it is said.

Every error a user can cause is a `UserError` (or one of its kinds): one clear sentence that names the file, the key or
the annotation, what was found, what was expected and what to do.  The command-line tools print it without a traceback
and leave with exit code 2; anything else is a fault of ours and leaves with 1.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend; its text is all that he sees."""


class ConfigError(UserError):
    """A recipe, an override or a plug-in file is wrong: names file and key."""


class DataError(UserError):
    """An annotation file or an image is wrong: names file and annotation or image."""


class CheckpointError(UserError):
    """A checkpoint or weights file is missing, damaged, unsafe, or belongs to something else."""


class DeviceError(UserError):
    """A device was asked for that this machine does not have."""


class NonFiniteLoss(UserError):
    """Training diverged: names the step, the term and the images of the batch."""

"""Every error a user can meet. Each message names the value, the rank and the way out."""

from __future__ import annotations


class TriloomError(Exception):
    """Base of all errors raised on purpose by triloom."""


class ConfigError(TriloomError, ValueError):
    """A value given by the user cannot work; raised before anything is allocated."""


class MeshError(ConfigError):
    """The world does not factor into the mesh, or the mesh does not fit the model."""


class ProgramError(TriloomError):
    """The verifier refused a program; the message holds the rank-by-step grid."""


class DivergedError(TriloomError):
    """A number of the training is not finite any more; found at the same step on every rank."""


class CheckpointError(TriloomError):
    """A checkpoint cannot be written, is damaged, or is of another model; raised on every rank."""


class GroupError(TriloomError, RuntimeError):
    """A communication operation failed."""


class MismatchError(GroupError):
    """Ranks of a group issued different operations at the same place; no buffer was changed."""


class DeadlineError(GroupError, TimeoutError):
    """A wait passed its deadline; the message names the ranks that had not arrived."""


class DeadlockError(GroupError):
    """All ranks wait for each other (found at once by the Threads group)."""

"""Checkpoints: sharded safetensors with a manifest, written in the background, read on any mesh.

Three lines around a loop of one's own::

    checkpoints = triloom.Checkpoints(engine, "checkpoints", every=500, keep=3)
    checkpoints.resume()                                   # the newest that verifies, if there is one
    while engine.steps < 10_000:
        metrics = engine.step(*batch(engine.steps))
        checkpoints.after(metrics)                         # saves when due, in the background
    checkpoints.finish()

``engine.save(folder)`` and ``engine.load(folder)`` write and read one. ``read_manifest``, ``read_tensor`` and
``verify`` look at one without an engine.
"""

from .loading import Restored, load
from .manifest import Manifest, Tensor
from .read import read_manifest, read_tensor, verify
from .saving import save
from .series import Checkpoints, found, path_of

__all__ = [
    "Checkpoints",
    "Manifest",
    "Restored",
    "Tensor",
    "found",
    "load",
    "path_of",
    "read_manifest",
    "read_tensor",
    "save",
    "verify",
]

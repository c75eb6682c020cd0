"""Checkpoints that survive kill -9, a full disk and flipped bits; and the official SoFlow `.pt` format."""

from soflow.checkpoint.files import CheckpointError, naming, replacing
from soflow.checkpoint.official import (
    OfficialCheckpoint,
    infer_dit_shape,
    infer_unet_shape,
    is_unet,
    load_official,
    save_official,
)
from soflow.checkpoint.steps import (
    Checkpoint,
    delete_leftovers,
    drop_later,
    load,
    load_profiles,
    newest,
    read,
    save,
    saved_steps,
    verify,
)
from soflow.checkpoint.writer import Snapshots, Writer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "OfficialCheckpoint",
    "Snapshots",
    "Writer",
    "delete_leftovers",
    "drop_later",
    "infer_dit_shape",
    "infer_unet_shape",
    "is_unet",
    "load",
    "load_official",
    "load_profiles",
    "naming",
    "newest",
    "read",
    "replacing",
    "save",
    "save_official",
    "saved_steps",
    "verify",
]

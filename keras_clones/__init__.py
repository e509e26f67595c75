"""Clones for Keras 3: a model's computation on every device of a machine."""

from keras_clones.callbacks.backup import Backup
from keras_clones.callbacks.profiler import CloneProfiler
from keras_clones.callbacks.summaries import CloneSummaries
from keras_clones.cluster.connect import connect, disconnect
from keras_clones.cluster.worker_dataset import worker_dataset
from keras_clones.comparing.comparing import compare
from keras_clones.comparing.comparison import Comparison
from keras_clones.devices.config import DeploymentConfig
from keras_clones.devices.placement import PlacedClone
from keras_clones.devices.virtual import use_virtual_devices
from keras_clones.door.attach import (
    Deployment,
    clone_model,
    deployment,
    unclone_model,
)
from keras_clones.model_deploy.call import PerClone, split_batch
from keras_clones.model_deploy.clone_losses import optimize_clones
from keras_clones.model_deploy.clones import create_clones
from keras_clones.model_deploy.deployed_model import DeployedModel, deploy


def __getattr__(name: str) -> type:
    # What `PlacedClone` was called: `model_deploy.Clone` is another.
    if name == "Clone":
        return PlacedClone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "Backup",
    "CloneProfiler",
    "CloneSummaries",
    "Comparison",
    "DeployedModel",
    "Deployment",
    "DeploymentConfig",
    "PerClone",
    "PlacedClone",
    "clone_model",
    "compare",
    "connect",
    "create_clones",
    "deploy",
    "deployment",
    "disconnect",
    "optimize_clones",
    "split_batch",
    "unclone_model",
    "use_virtual_devices",
    "worker_dataset",
]

"""Loops of the user's own, under the names of TF-Slim's `model_deploy`.

In: a `DeploymentConfig` and a function of the model, run once a clone.
Out: clones, their total loss and gradients, a `DeployedModel`.
"""

from keras_clones.devices.config import DeploymentConfig
from keras_clones.model_deploy.call import PerClone, split_batch
from keras_clones.model_deploy.clone_losses import optimize_clones
from keras_clones.model_deploy.clones import Clone, create_clones
from keras_clones.model_deploy.deployed_model import DeployedModel, deploy

__all__ = [
    "Clone",
    "DeployedModel",
    "DeploymentConfig",
    "PerClone",
    "create_clones",
    "deploy",
    "optimize_clones",
    "split_batch",
]
